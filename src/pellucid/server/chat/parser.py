"""From the text that a model writes to what it means."""

from __future__ import annotations

from pellucid.server.chat.events import ChatEvent, TextDelta
from pellucid.server.chat.message import ChatMessage, joined


class ChatParser:
    """Reads one answer, as the engine releases its text. However the text is cut into pieces, the events join to the
    same message."""

    def push(self, text: str) -> list[ChatEvent]:
        """What is now certain, up to and with the next piece."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[ChatEvent]:
        """The answer is over: what was held back."""
        return []


def read_message(parser: ChatParser, text: str) -> ChatMessage:
    """The message that a whole answer is. `parser` is new."""
    return joined([*parser.push(text), *parser.finish()])
