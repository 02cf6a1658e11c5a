"""From the text of an answer to the calls in it, as it comes."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection
from enum import Enum

from pellucid.server.chat.events import ChatEvent, TextDelta, ToolCallArguments, ToolCallBegin
from pellucid.server.chat.text_stream import Brackets, Markers, Reading, TextStream

ARGUMENTS_KEYS = ("arguments", "parameters")
_ALPHANUMERIC = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Outcome(Enum):
    """What became of text that began like a call."""

    CALLED = 1
    """All of it was read."""
    BROKEN = 2
    """A call was told of. What came since the stream was last dropped belongs to none: it is text."""
    MALFORMED = 3
    """No call was told of: all of it is text."""


class CallReader(ABC):
    """Reads one answer: text and calls, the same however it is cut into pieces.

    What begins like a call and is none is given back as text, whole. A call is told of when its name is known and its
    arguments begin; from then on its arguments are passed on as they come, and stay a call's if the answer is cut off.
    White space beside calls is left out, and so is that at the ends of an answer that has calls.

    Args:
        names: functions that may be called. What calls another one is text.
        markers: what calls begin with.
        apart: an answer that does not begin with a call has none.
    """

    def __init__(self, names: Collection[str], markers: Collection[str], *, apart: bool = False) -> None:
        self._names = frozenset(names)
        self._markers = Markers(markers)
        self._apart = apart
        self._stream = TextStream()
        self._events: list[ChatEvent] = []
        self._num_calls = 0
        self._has_text = False
        self._held_space = ""
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> list[ChatEvent]:
        """What is now certain."""
        self._stream.feed(text)
        next(self._reading)
        return self._told()

    def finish(self) -> list[ChatEvent]:
        """The answer is over: what was held back."""
        self._stream.ended = True
        for _ in self._reading:
            pass
        if not self._num_calls and self._held_space:
            self._events.append(TextDelta(self._held_space))
        return self._told()

    # What a format says

    @abstractmethod
    def _section(self, marker: str) -> Reading[Outcome]:
        """Read what follows a marker."""

    def _new_call_id(self) -> str:
        return "call_" + random_id(24)

    def _read(self) -> Reading[None]:
        stream = self._stream
        yield  # a reader begins with no text at all
        if self._apart and not (yield from self._begins_with_call()):
            return (yield from self._read_text())
        while (marker := (yield from self._find())) is not None:
            outcome = yield from self._section(marker)
            if outcome is Outcome.MALFORMED:
                stream.position = len(marker)
                self._tell_text(marker)
                if self._apart and not self._num_calls:
                    stream.drop()
                    return (yield from self._read_text())
            elif outcome is Outcome.BROKEN:
                stream.position = 0
            stream.drop()

    def _begins_with_call(self) -> Reading[bool]:
        stream = self._stream
        while (found := self._markers.find(stream.text)) is None:
            if self._markers.held(stream.text) < len(stream.text) or not (yield from stream.more()):
                return False
        return found[0] == 0

    def _read_text(self) -> Reading[None]:
        while True:
            self._tell_text(self._stream.take())
            if not (yield from self._stream.more()):
                return

    def _find(self) -> Reading[str | None]:
        """Tell of the text up to the next marker, and pass that; None at the end of the answer."""
        stream = self._stream
        while True:
            found = self._markers.find(stream.text)
            if found is not None:
                place, marker = found
                self._tell_text(stream.text[:place])
                stream.position = place
                stream.drop()
                stream.position = len(marker)
                return marker
            stream.position = len(stream.text) - self._markers.held(stream.text)
            self._tell_text(stream.text[: stream.position])
            stream.drop()
            if not (yield from stream.more()):
                self._tell_text(stream.take())
                return None

    # What formats are made of

    def _object(self) -> Reading[Outcome]:
        """Pass a call that is a JSON object with `name` and one of ARGUMENTS_KEYS, and maybe others, in any order."""
        stream = self._stream
        name = arguments = None
        bad = Outcome.MALFORMED
        if not (yield from stream.literal("{")):
            return bad
        while True:
            yield from stream.skip_space()
            field = yield from stream.string()
            yield from stream.skip_space()
            if field is None or not (yield from stream.literal(":")):
                return bad
            yield from stream.skip_space()
            if field == "name" and name is None:
                name = yield from stream.string()
                if name not in self._names:
                    return bad
            elif field in ARGUMENTS_KEYS and arguments is None:
                if (yield from stream.peek()) != "{":
                    return bad
                if name is not None:
                    bad, arguments = Outcome.BROKEN, ""
                    if not (yield from self._arguments(name)):
                        return bad
                elif (arguments := (yield from stream.value())) is None:
                    return bad
            elif (yield from stream.value()) is None:
                return bad
            yield from stream.skip_space()
            if (yield from stream.literal("}")):
                break
            if not (yield from stream.literal(",")):
                return bad
        if bad is Outcome.MALFORMED:
            if name is None:
                return bad
            self._tell_call(name, arguments or "{}")  # they came before the name, or not at all
        return Outcome.CALLED

    def _arguments(self, name: str) -> Reading[bool]:
        """Tell of a call of `name`, and pass on the JSON object that follows; False where that is cut off or broken."""
        self._tell_call(name, "")
        stream, brackets = self._stream, Brackets()
        while True:
            begin, stream.position = stream.position, brackets.scan(stream.text, stream.position)
            self._tell_arguments(stream.text[begin : stream.position])
            stream.drop()
            if brackets.closed or brackets.broken or not (yield from stream.more()):
                return brackets.closed

    def _list(self) -> Reading[Outcome]:
        """Pass a JSON list of such objects, which may be empty."""
        stream = self._stream
        if not (yield from stream.literal("[")):
            return Outcome.MALFORMED
        yield from stream.skip_space()
        if (yield from stream.literal("]")):
            return Outcome.CALLED
        outcome = yield from self._object()
        while outcome is Outcome.CALLED:
            stream.drop()
            yield from stream.skip_space()
            if (yield from stream.literal("]")):
                return Outcome.CALLED
            if not (yield from stream.literal(",")):
                return Outcome.BROKEN
            yield from stream.skip_space()
            if (yield from self._object()) is not Outcome.CALLED:
                return Outcome.BROKEN
        return outcome

    def _object_or_list(self) -> Reading[Outcome]:
        """Pass one such object, or a list of them."""
        if (yield from self._stream.peek()) == "[":
            return (yield from self._list())
        return (yield from self._object())

    # What is told

    def _told(self) -> list[ChatEvent]:
        told, self._events = self._events, []
        return told

    def _tell_text(self, text: str) -> None:
        text = self._held_space + text
        if self._num_calls and not self._has_text:
            text = text.lstrip()
        kept = text.rstrip()
        self._held_space = text[len(kept) :]
        if kept:
            self._has_text = True
            self._events.append(TextDelta(kept))

    def _tell_call(self, name: str, arguments: str) -> None:
        self._events.append(ToolCallBegin(self._num_calls, self._new_call_id(), name))
        self._num_calls += 1
        self._tell_arguments(arguments)

    def _tell_arguments(self, text: str) -> None:
        if text:
            self._events.append(ToolCallArguments(self._num_calls - 1, text))


def random_id(length: int) -> str:
    """Letters and digits drawn at random."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))
