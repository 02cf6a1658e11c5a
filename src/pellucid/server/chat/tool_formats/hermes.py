"""Tool calls of Hermes (https://github.com/NousResearch/Hermes-Function-Calling), Qwen 2.5 and 3, and SmolLM3:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

one such block for each call.
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
    call_object,
    json_call,
    separated,
    tool_lines,
    triggered,
)

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesReader(CallReader):
    """Reads `<tool_call>` blocks, with one call in each or a list of them."""

    def __init__(self, names: Collection[str], *, apart: bool = False) -> None:
        super().__init__(names, (OPEN,), apart=apart)

    def _section(self, marker: str) -> Reading[Outcome]:
        stream, calls = self._stream, self._num_calls
        yield from stream.skip_space()
        outcome = yield from self._object_or_list()
        if outcome is not Outcome.CALLED:
            return outcome
        if self._num_calls > calls:
            stream.drop()
        yield from stream.skip_space()
        if (yield from stream.literal(CLOSE)):
            return Outcome.CALLED
        if self._num_calls == calls:
            return Outcome.MALFORMED
        if stream.ended and CLOSE.startswith(stream.rest):  # the answer was cut off
            stream.take()
            return Outcome.CALLED
        return Outcome.BROKEN


@dataclass(frozen=True)
class HermesFormat(ToolFormat):
    """`<tool_call>` blocks with one call in each."""

    name = "hermes"
    markers = (OPEN, CLOSE)

    def reader(self, names: Collection[str], *, apart: bool = False) -> CallReader:
        return HermesReader(names, apart=apart)

    def _tags(self, tools: Sequence[Tool]) -> list[Format]:
        return [json_call(tool, before=f"{OPEN}\n", after=f"\n{CLOSE}") for tool in tools]

    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        return triggered([OPEN], self._tags(tools), once=not parallel)

    def required(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        return separated(self._tags(tools), "\n", at_least_one=True, once=not parallel)

    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        return "\n".join(f"{OPEN}\n{call_object(name, arguments)}\n{CLOSE}" for name, arguments in calls)

    def instructions(self, tools: Sequence[Tool]) -> str:
        return (
            "You can call functions to help with the request. Their signatures, in JSON, are between "
            f"<tools></tools>:\n{tool_lines(tools)}\n\n"
            f"To call a function, write a JSON object with its name and its arguments between {OPEN}{CLOSE}:\n"
            f'{OPEN}\n{{"name": <function name>, "arguments": <arguments as a JSON object>}}\n{CLOSE}'
        )
