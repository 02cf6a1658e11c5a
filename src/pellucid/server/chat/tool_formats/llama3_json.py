"""Tool calls of Llama 3.1 and 3.2 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/):

    {"name": "get_weather", "parameters": {"city": "Paris"}}

several separated by `;`, with or without `<|python_tag|>` before them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structural_tag import Format
from pellucid.server.chat.call_reader import CallReader, Outcome
from pellucid.server.chat.text_stream import Reading
from pellucid.server.chat.tool_formats.base import (
    Tool,
    ToolFormat,
    arguments_format,
    call_object,
    json_call,
    separated,
    tag,
    tool_lines,
    triggered,
    with_lazy_begin,
)

PYTHON_TAG = "<|python_tag|>"
SEPARATOR = "; "


# How a call may begin in the midst of text, up to its arguments: before and after the name. Any other JSON is text: an
# answer may hold an object that has a name.
BEGINNINGS = (
    ('{"name": "', '", "parameters": '),
    ('{"name":"', '","parameters":'),
    ('{"type": "function", "name": "', '", "parameters": '),
    ('{"type":"function","name":"', '","parameters":'),
)


class Llama3JsonReader(CallReader):
    """Reads calls in text, and those after `<|python_tag|>`."""

    def __init__(self, names: Collection[str], *, apart: bool = False) -> None:
        self._named = {f"{before}{name}{after}{{": name for name in names for before, after in BEGINNINGS}
        super().__init__(names, (PYTHON_TAG, *self._named), apart=apart)

    def _section(self, marker: str) -> Reading[Outcome]:
        stream = self._stream
        if marker == PYTHON_TAG:
            yield from stream.skip_space()
            outcome = yield from self._object()
        else:
            stream.position -= 1  # the arguments' bracket
            outcome = yield from self._call(self._named[marker])
        while outcome is Outcome.CALLED:
            stream.drop()
            yield from stream.skip_space()
            if not (yield from stream.literal(";")):
                return Outcome.BROKEN
            yield from stream.skip_space()
            if stream.ended and not stream.rest:
                return Outcome.CALLED
            if marker == PYTHON_TAG:
                outcome = yield from self._object()
            else:
                name = yield from self._beginning()
                outcome = Outcome.BROKEN if name is None else (yield from self._call(name))
            if outcome is Outcome.MALFORMED:
                return Outcome.BROKEN
        return outcome

    def _call(self, name: str) -> Reading[Outcome]:
        if not (yield from self._arguments(name)):
            return Outcome.BROKEN
        yield from self._stream.skip_space()
        return Outcome.CALLED if (yield from self._stream.literal("}")) else Outcome.BROKEN

    def _beginning(self) -> Reading[str | None]:
        """Pass the beginning of another call; its name, or None if none comes next."""
        stream = self._stream
        while True:
            found = self._markers.find(stream.text, stream.position)
            if found is not None:
                place, marker = found
                if place > stream.position or marker == PYTHON_TAG:
                    return None
                stream.position += len(marker) - 1
                return self._named[marker]
            if self._markers.held(stream.rest) < len(stream.rest) or not (yield from stream.more()):
                return None


@dataclass(frozen=True)
class Llama3JsonFormat(ToolFormat):
    """JSON objects with a name and parameters."""

    name = "llama3_json"
    markers = (PYTHON_TAG,)

    def reader(self, names: Collection[str], *, apart: bool = False) -> CallReader:
        return Llama3JsonReader(names, apart=apart)

    def _tagged(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        return tag(PYTHON_TAG, self.required(tools, parallel=parallel), "")

    def _tags(self, tools: Sequence[Tool]) -> list[Format]:
        """Calls, however they begin."""
        return [
            tag(f"{before}{tool['name']}{after}", arguments_format(tool), "}")
            for tool in tools
            for before, after in BEGINNINGS
        ]

    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        tags = [self._tagged(tools, parallel=parallel), *self._tags(tools)]
        triggers = [before for before, _ in BEGINNINGS]
        return {**triggered([PYTHON_TAG, *triggers], tags, once=not parallel), "or_text": triggers}

    def either(self, tools: Sequence[Tool], content: Format, *, parallel: bool) -> Format:
        if content["type"] == "grammar" or "whitespace_pattern" in content:
            raise InvalidRequestError(
                "a grammar, or JSON with a whitespace_pattern, cannot be told from calls in the format of this model: "
                'ask for another form, leave tools out, or set tool_choice to "none"',
                param="structured_outputs",
            )
        is_json = content["type"] == "json_schema"
        if is_json:
            content = {**content, "json_schema": _no_call(content["json_schema"])}
        tags = (
            [_like_json(tool) for tool in tools] if is_json else [{**each, "lazy": True} for each in self._tags(tools)]
        )
        calls = separated(tags, SEPARATOR, at_least_one=True, once=not parallel)
        tagged = with_lazy_begin(self._tagged(tools, parallel=parallel), PYTHON_TAG)
        return {"type": "or", "elements": [tagged, calls, content]}

    def required(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        calls = [json_call(tool, "parameters") for tool in tools]
        return separated(calls, SEPARATOR, at_least_one=True, once=not parallel)

    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        return SEPARATOR.join(call_object(name, arguments, "parameters") for name, arguments in calls)

    def instructions(self, tools: Sequence[Tool]) -> str:
        return (
            "You have access to these functions:\n"
            f"{tool_lines(tools)}\n\n"
            "To call one, answer with nothing but a JSON object of this form, without variables:\n"
            '{"name": "function name", "parameters": {"argument name": "value"}}'
        )


def _like_json(tool: Tool) -> Format:
    """A call made of the same pieces as JSON: one that was written at once would keep JSON beside it from beginning."""
    pieces = ("{", '"name"', ": ", json.dumps(tool["name"]), ", ", '"parameters"', ": ")
    literals = [{"type": "const_string", "value": piece} for piece in pieces]
    return tag("", {"type": "sequence", "elements": [*literals, arguments_format(tool)]}, "}")


def _no_call(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` without what would be read as a call: the object that an answer is has no `parameters`.

    Raises:
        InvalidRequestError: it must have them.
    """
    properties, required, others = (schema.get(keyword, []) for keyword in ("properties", "required", "allOf"))
    if not (isinstance(properties, list | dict) and isinstance(required, list) and isinstance(others, list)):
        return dict(schema)  # malformed, which is told when it is compiled
    if schema.get("additionalProperties") is False and "patternProperties" not in schema and "name" not in properties:
        return dict(schema)
    if "parameters" in required:
        raise InvalidRequestError(
            "the schema requires parameters and allows a name, which is what a call looks like in the format of this "
            "model: call them something else, set additionalProperties to false, leave tools out, or set "
            'tool_choice to "none"',
            param="response_format",
        )
    return {**schema, "allOf": [*others, {"properties": {"parameters": False}}]}
