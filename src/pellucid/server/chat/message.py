"""A whole answer in a chat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallBegin


@dataclass(slots=True)
class ToolCall:
    """A function that is called.

    Attributes:
        arguments: the text of a JSON object, as the model wrote it; cut short where the answer is.
    """

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ChatMessage:
    """What the model answered.

    Attributes:
        reasoning: what it thought before; None if it did not.
    """

    text: str = ""
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def joined(events: Iterable[ChatEvent]) -> ChatMessage:
    """The message that `events` are the pieces of."""
    message = ChatMessage()
    for event in events:
        if isinstance(event, TextDelta):
            message.text += event.text
        elif isinstance(event, ReasoningDelta):
            message.reasoning = (message.reasoning or "") + event.text
        elif isinstance(event, ToolCallBegin):
            message.tool_calls.append(ToolCall(event.call_id, event.name))
        else:
            message.tool_calls[event.index].arguments += event.text
    return message
