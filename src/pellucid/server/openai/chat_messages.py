"""The assistant's messages of chat completions: whole, and as deltas.

Reasoning is in `reasoning_content`, where DeepSeek's API has it.
"""

from __future__ import annotations

from typing import Any

from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallBegin
from pellucid.server.chat.message import ChatMessage


def message_body(message: ChatMessage) -> dict[str, Any]:
    """A whole message. With calls and without text, its content is null."""
    body: dict[str, Any] = {"role": "assistant", "content": message.text, "refusal": None}
    if message.reasoning is not None:
        body["reasoning_content"] = message.reasoning
    if message.tool_calls:
        body["content"] = message.text or None
        body["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return body


def delta_body(piece: ChatEvent) -> dict[str, Any]:
    """What a piece adds to a message."""
    if isinstance(piece, TextDelta):
        return {"content": piece.text}
    if isinstance(piece, ReasoningDelta):
        return {"reasoning_content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, ToolCallBegin):
        call |= {"id": piece.call_id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": piece.text}
    return {"tool_calls": [call]}


def finish_reason_of(finish_reason: str, stop_reason: int | str | None, *, has_tool_calls: bool) -> str:
    """Why an answer ended: "tool_calls" where it has calls and no stop string, which may stand within one, cut it."""
    is_whole = finish_reason == "stop" and not isinstance(stop_reason, str)
    return "tool_calls" if has_tool_calls and is_whole else finish_reason
