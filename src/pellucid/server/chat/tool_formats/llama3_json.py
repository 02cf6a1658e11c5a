"""Tool calls of Llama 3.1 and 3.2 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/):

    {"name": "get_weather", "parameters": {"city": "Paris"}}

several separated by `;`, with or without `<|python_tag|>` before them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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

    def __init__(self, names: Collection[str]) -> None:
        self._named = {f"{before}{name}{after}{{": name for name in names for before, after in BEGINNINGS}
        super().__init__(names, (PYTHON_TAG, *self._named))

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

    def reader(self, names: Collection[str]) -> CallReader:
        return Llama3JsonReader(names)

    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        calls = [
            tag(f"{before}{tool['name']}{after}", arguments_format(tool), "}")
            for tool in tools
            for before, after in BEGINNINGS
        ]
        tagged = tag(PYTHON_TAG, self.required(tools, parallel=parallel), "")
        triggers = [before for before, _ in BEGINNINGS]
        return {**triggered([PYTHON_TAG, *triggers], [tagged, *calls], once=not parallel), "or_text": triggers}

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
