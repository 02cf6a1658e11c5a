"""The content blocks of an Anthropic message, from the pieces of a chat answer: as events, or whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pellucid.server.anthropic.partial_json import read_partial_object
from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallBegin

_DELTAS = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}


class ContentEvents:
    """Makes `content_block_start`, `content_block_delta` and `content_block_stop` of the pieces of an answer.

    Attributes:
        has_tool_use: whether a tool was called.
        has_thinking: whether the model thought before it answered.
    """

    def __init__(self) -> None:
        self.has_tool_use = False
        self.has_thinking = False
        self._index = -1
        self._kind: str | None = None

    def push(self, event: ChatEvent) -> list[dict[str, Any]]:
        """What the next piece makes."""
        if isinstance(event, TextDelta):
            return [*self._within("text", {"text": ""}), self._delta("text_delta", event.text)]
        if isinstance(event, ReasoningDelta):
            self.has_thinking = True
            # Nobody signs it, and it is taken back without.
            begin = self._within("thinking", {"thinking": "", "signature": ""})
            return [*begin, self._delta("thinking_delta", event.text)]
        if isinstance(event, ToolCallBegin):
            self.has_tool_use = True
            return self._begin("tool_use", {"id": event.call_id, "name": event.name, "input": {}})
        return [self._delta("input_json_delta", event.text)]

    def end(self) -> list[dict[str, Any]]:
        """The answer is over."""
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": self._index}]

    def _within(self, kind: str, empty: dict[str, Any]) -> list[dict[str, Any]]:
        """What begins a block of this kind, unless the last one is."""
        return [] if self._kind == kind else self._begin(kind, empty)

    def _begin(self, kind: str, empty: dict[str, Any]) -> list[dict[str, Any]]:
        stop = self.end()
        self._kind = kind
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **empty}}
        return [*stop, start]

    def _delta(self, kind: str, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, _DELTAS[kind]: text}}


def content_of(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that such events make. What a call that was cut short says of its input is what was complete of it."""
    blocks: list[dict[str, Any]] = []
    inputs: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            inputs.append("")
        elif event["type"] == "content_block_delta":
            kind = event["delta"]["type"]
            text = event["delta"][_DELTAS[kind]]
            if kind == "input_json_delta":
                inputs[-1] += text
            else:
                blocks[-1][_DELTAS[kind]] += text
        elif blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = read_partial_object(inputs[-1])
    return blocks
