"""Text that comes in pieces, for readers that are written as if it were all there."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

Reading: TypeAlias = Generator[None, None, T]
"""A reader: it stops wherever it needs more text, and returns its result in the end."""

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING_REST = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_STRUCTURE = re.compile(r'["{}\[\]]')
_SCALAR = re.compile(r"[^\s,:\]}\"{\[]*")
_CLOSING = {"{": "}", "[": "]"}


class TextStream:
    """Text as far as it has come, and where its reader stands.

    Attributes:
        text: what may still be looked at.
        position: where the reader stands in it.
        ended: no more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False

    def feed(self, text: str) -> None:
        self.text += text

    def drop(self) -> None:
        """Forget what is before `position`: nobody goes back there."""
        self.text, self.position = self.text[self.position :], 0

    @property
    def rest(self) -> str:
        return self.text[self.position :]

    def take(self) -> str:
        """All that is there."""
        taken, self.text, self.position = self.rest, "", 0
        return taken

    def more(self) -> Reading[bool]:
        """Wait for text beyond what is there; False where none comes."""
        length = len(self.text) - self.position
        while len(self.text) - self.position == length:
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, which stays; "" at the end."""
        if self.position == len(self.text):
            yield from self.more()
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> Reading[None]:
        """Pass JSON's white space."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or not (yield from self.more()):
                return

    def literal(self, wanted: str) -> Reading[bool]:
        """Pass `wanted` if it comes next."""
        while len(self.text) - self.position < len(wanted):
            if not wanted.startswith(self.rest) or not (yield from self.more()):
                return False
        if not self.text.startswith(wanted, self.position):
            return False
        self.position += len(wanted)
        return True

    def string(self) -> Reading[str | None]:
        """Pass a JSON string; its value, or None if none comes next or it is cut off or malformed."""
        begin = self.position
        if not (yield from self.literal('"')):
            return None
        end = self.position
        while True:
            match = _STRING_REST.match(self.text, end)
            assert match is not None
            end = match.end()
            if end < len(self.text) and self.text[end] == '"':
                self.position = end + 1
                return _value_of_string(self.text[begin : self.position])
            if not (yield from self.more()):
                return None

    def value(self) -> Reading[str | None]:
        """Pass a JSON value; its text, or None if it is cut off or its brackets do not match."""
        begin = self.position
        first = yield from self.peek()
        if first == '"':
            value = yield from self.string()
            return None if value is None else self.text[begin : self.position]
        if first not in _CLOSING:
            while True:
                match = _SCALAR.match(self.text, self.position)
                assert match is not None
                self.position = match.end()
                if self.position < len(self.text) or not (yield from self.more()):
                    return self.text[begin : self.position] or None
        brackets = Brackets()
        while not brackets.closed:
            self.position = brackets.scan(self.text, self.position)
            if brackets.broken or (not brackets.closed and not (yield from self.more())):
                return None
        return self.text[begin : self.position]


class Brackets:
    """Finds the end of a JSON object or array in text that comes in pieces, from its first bracket on. What is between
    its brackets is not looked at more closely.

    Attributes:
        closed: the end was found.
        broken: a bracket closes what another kind opened.
    """

    def __init__(self) -> None:
        self.closed = False
        self.broken = False
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, position: int) -> int:
        """Go on at `position`; where the value ends, is broken, or the text does."""
        while position < len(text) and not (self.closed or self.broken):
            if self._in_string:
                position = self._string(text, position)
                continue
            match = _STRUCTURE.search(text, position)
            if match is None:
                return len(text)
            position = match.end()
            character = match[0]
            if character == '"':
                self._in_string = True
            elif character in _CLOSING:
                self._open.append(_CLOSING[character])
            elif self._open and self._open[-1] == character:
                self._open.pop()
                self.closed = not self._open
            else:
                self.broken = True
                return position - 1
        return position

    def _string(self, text: str, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        match = _STRING_REST.match(text, position)
        assert match is not None
        position = match.end()
        if position < len(text):
            # A quotation mark, or a backslash at the very end.
            self._in_string, self._escaped = text[position] != '"', text[position] == "\\"
            position += 1
        return position


class Markers:
    """Strings to look for in text that comes in pieces. None begins within another, but where they begin alike."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._sorted = sorted(markers)
        self._longest = max(map(len, self._sorted))
        self._firsts = re.compile("|".join({re.escape(marker[0]) for marker in self._sorted}))

    def find(self, text: str, position: int = 0) -> tuple[int, str] | None:
        """Where the first marker from `position` on is, and which; of several there, the longest."""
        for match in self._firsts.finditer(text, position):
            marker = self._at(text[match.start() : match.start() + self._longest])
            if marker is not None:
                return match.start(), marker
        return None

    def _at(self, text: str) -> str | None:
        """The longest marker that `text` begins with."""
        place = len(self._sorted)
        while text and (place := bisect_right(self._sorted, text, 0, place)):
            marker = self._sorted[place - 1]
            if text.startswith(marker):
                return marker
            common = (one == other for one, other in zip(marker, text, strict=False))
            text = text[: len(list(takewhile(bool, common)))]
        return None

    def held(self, text: str) -> int:
        """How much of the end of `text`, in which there is no marker, may be the beginning of one."""
        for match in self._firsts.finditer(text, max(0, len(text) - self._longest + 1)):
            rest = text[match.start() :]
            place = bisect_left(self._sorted, rest)
            if place < len(self._sorted) and self._sorted[place].startswith(rest):
                return len(rest)
        return 0


def _value_of_string(text: str) -> str | None:
    try:
        value: Any = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
