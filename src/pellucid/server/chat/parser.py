"""From the text that a model writes to what it means."""

from __future__ import annotations

from collections.abc import Collection

from pellucid.server.chat.call_reader import CallReader
from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta
from pellucid.server.chat.message import ChatMessage, joined
from pellucid.server.chat.reasoning import ReasoningReader
from pellucid.server.chat.text_stream import Markers


class ChatParser:
    """Reads one answer, as the engine releases its text. However the text is cut into pieces, the events join to the
    same message.

    Args:
        reasoning: parts the reasoning from the rest; None where there is none.
        calls: reads the calls in the rest; None where no tools are offered.
        dropped: spellings of special tokens that are no part of the answer.
    """

    def __init__(
        self,
        reasoning: ReasoningReader | None = None,
        calls: CallReader | None = None,
        dropped: Collection[str] = (),
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._dropped = Markers(dropped) if dropped else None
        self._pending = ""

    def push(self, text: str) -> list[ChatEvent]:
        """What is now certain, up to and with the next piece."""
        if self._dropped is not None:
            text = self._without_dropped(self._dropped, self._pending + text)
        reasoning, text = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return self._events(reasoning, text)

    def finish(self) -> list[ChatEvent]:
        """The answer is over: what was held back."""
        pending, self._pending, self._dropped = self._pending, "", None
        events = self.push(pending)
        if self._reasoning is not None:
            events += self._events(*self._reasoning.finish())
        if self._calls is not None:
            events += self._calls.finish()
        return events

    def _events(self, reasoning: str, text: str) -> list[ChatEvent]:
        events: list[ChatEvent] = [ReasoningDelta(reasoning)] if reasoning else []
        if text:
            events += [TextDelta(text)] if self._calls is None else self._calls.push(text)
        return events

    def _without_dropped(self, dropped: Markers, text: str) -> str:
        kept = []
        position = 0
        while (found := dropped.find(text, position)) is not None:
            kept.append(text[position : found[0]])
            position = found[0] + len(found[1])
        end = len(text) - dropped.held(text[position:])
        self._pending = text[end:]
        return "".join([*kept, text[position:end]])


def read_message(parser: ChatParser, text: str) -> ChatMessage:
    """The message that a whole answer is. `parser` is new."""
    return joined([*parser.push(text), *parser.finish()])
