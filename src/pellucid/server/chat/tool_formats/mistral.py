"""Tool calls of Mistral (https://docs.mistral.ai/capabilities/function_calling/). Up to the third version of its
tokenizer, a list:

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "8KdNxzv3Q"}]

and later one after another, with or without an id:

    [TOOL_CALLS]get_weather[CALL_ID]8KdNxzv3Q[ARGS]{"city": "Paris"}
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pellucid.core.structural_tag import Format
from pellucid.server.chat.call_reader import CallReader, Outcome, random_id
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

TOOL_CALLS = "[TOOL_CALLS]"
CALL_ID = "[CALL_ID]"
ARGS = "[ARGS]"
_ID_LENGTH = 9
_NAME = re.compile(r"[A-Za-z0-9_-]*")
_ID = re.compile(r"[A-Za-z0-9]*")


class MistralReader(CallReader):
    """Reads calls of every version."""

    def __init__(self, names: Collection[str], *, apart: bool = False) -> None:
        super().__init__(names, (TOOL_CALLS,), apart=apart)

    def _new_call_id(self) -> str:
        return random_id(_ID_LENGTH)

    def _section(self, marker: str) -> Reading[Outcome]:
        stream = self._stream
        yield from stream.skip_space()
        if (yield from stream.peek()) in ("{", "["):
            return (yield from self._object_or_list())
        name = yield from self._run(_NAME)
        if name not in self._names:
            return Outcome.MALFORMED
        if (yield from stream.literal(CALL_ID)):
            yield from self._run(_ID)
        yield from stream.literal(ARGS)
        yield from stream.skip_space()
        if (yield from stream.peek()) != "{":
            return Outcome.MALFORMED
        return Outcome.CALLED if (yield from self._arguments(name)) else Outcome.BROKEN

    def _run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Pass as many characters as match."""
        stream, begin = self._stream, self._stream.position
        while True:
            match = pattern.match(stream.text, stream.position)
            assert match is not None
            stream.position = match.end()
            if stream.position < len(stream.text) or not (yield from stream.more()):
                return stream.text[begin : stream.position]


@dataclass(frozen=True)
class MistralFormat(ToolFormat):
    """Calls after `[TOOL_CALLS]`.

    Attributes:
        form: how the model writes them.
        space: what it writes between the marker and a list.
    """

    name: ClassVar[str] = "mistral"
    form: Literal["list", "args", "call_id"] = "list"
    space: str = " "

    @property
    def markers(self) -> tuple[str, ...]:
        return (TOOL_CALLS, CALL_ID, ARGS)

    def reader(self, names: Collection[str], *, apart: bool = False) -> CallReader:
        return MistralReader(names, apart=apart)

    def _tags(self, tools: Sequence[Tool]) -> list[Format]:
        if self.form == "args":
            return [tag(f"{TOOL_CALLS}{tool['name']}{ARGS}", arguments_format(tool), "") for tool in tools]
        call_id = {"type": "regex", "pattern": f"[A-Za-z0-9]{{{_ID_LENGTH}}}"}
        return [
            tag(
                f"{TOOL_CALLS}{tool['name']}{CALL_ID}",
                {"type": "sequence", "elements": [call_id, tag(ARGS, arguments_format(tool), "")]},
                "",
            )
            for tool in tools
        ]

    def _list(self, tools: Sequence[Tool], *, once: bool) -> Format:
        calls = separated([json_call(tool) for tool in tools], ", ", at_least_one=True, once=once)
        return tag(f"{TOOL_CALLS}{self.space}[", calls, "]")

    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        if self.form == "list":
            return triggered([TOOL_CALLS], [self._list(tools, once=not parallel)], once=True)
        return triggered([TOOL_CALLS], self._tags(tools), once=not parallel)

    def required(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        if self.form == "list":
            return self._list(tools, once=not parallel)
        return separated(self._tags(tools), "", at_least_one=True, once=not parallel)

    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        objects = (call_object(name, arguments) for name, arguments in calls)
        return f"{TOOL_CALLS}{self.space}[{', '.join(objects)}]"

    def instructions(self, tools: Sequence[Tool]) -> str:
        return (
            "You can call these functions:\n"
            f"{tool_lines(tools)}\n\n"
            "To call some, answer with nothing but a list of this form:\n"
            f'{TOOL_CALLS}{self.space}[{{"name": "function name", "arguments": {{"argument name": "value"}}}}]'
        )

    def call_id(self, call_id: str) -> str:
        """Nine letters and digits, which is what Mistral's templates insist on: others are hashed."""
        if re.fullmatch(f"[A-Za-z0-9]{{{_ID_LENGTH}}}", call_id):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:_ID_LENGTH]
