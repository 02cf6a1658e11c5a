"""Tool calls of SmolLM2 (https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B-Instruct):

    <tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>

one block with a list of all calls, which is empty where none helps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pellucid.core.structural_tag import Format
from pellucid.server.chat.call_reader import CallReader
from pellucid.server.chat.tool_formats.base import (
    Tool,
    ToolFormat,
    call_object,
    json_call,
    separated,
    tag,
    tool_lines,
    triggered,
)
from pellucid.server.chat.tool_formats.hermes import CLOSE, OPEN, HermesReader


@dataclass(frozen=True)
class SmolLMFormat(ToolFormat):
    """One `<tool_call>` block with a list of calls."""

    name = "smollm"
    markers = (OPEN, CLOSE)

    def reader(self, names: Collection[str], *, apart: bool = False) -> CallReader:
        return HermesReader(names, apart=apart)

    def _block(self, tools: Sequence[Tool], *, at_least_one: bool, once: bool) -> Format:
        calls = separated([json_call(tool) for tool in tools], ", ", at_least_one=at_least_one, once=once)
        return tag(f"{OPEN}[", calls, f"]{CLOSE}")

    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        block = self._block(tools, at_least_one=False, once=not parallel)
        return triggered([OPEN], [block], once=True)

    def required(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        return self._block(tools, at_least_one=True, once=not parallel)

    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        objects = (call_object(name, arguments) for name, arguments in calls)
        return f"{OPEN}[{', '.join(objects)}]{CLOSE}"

    def instructions(self, tools: Sequence[Tool]) -> str:
        return (
            "You are good at choosing and calling functions. These are the functions that you can call:\n"
            f"{tool_lines(tools)}\n\n"
            "If functions help to answer, write their calls and nothing else, in this form:\n"
            f'{OPEN}[{{"name": "function name", "arguments": {{"argument name": "value"}}}}]{CLOSE}\n'
            "Give every argument that is required, with a value of the right type. If no function helps, answer in "
            "words."
        )
