"""Server-sent events, parsed as they come (WHATWG HTML, 9.2.6, https://html.spec.whatwg.org/#parsing-an-event-stream).

Bytes may be cut anywhere: between CR and LF, within a character, within the byte order mark.
"""

from __future__ import annotations

from typing import NamedTuple

from pellucid.client.errors import ProtocolError

MAX_EVENT_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ServerSentEvent(NamedTuple):
    """One event: its type ("message" where the stream gave none), its lines of data, and the last id given so far."""

    event: str
    data: str
    last_event_id: str


class EventStreamParser:
    """Gives the events that each piece of a stream completes.

    What is left when the stream ends is no event. `retry` fields are passed over: nobody reconnects here.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._size = 0  # of these, and of the data below
        self._is_after_cr = False
        self._is_first_line = True
        self._data: list[str] = []
        self._event = ""
        self._last_event_id = ""

    def feed(self, piece: bytes) -> list[ServerSentEvent]:
        """Take the next bytes, and give the events that are whole with them.

        Raises:
            ProtocolError: an event has more than 16 MiB.
        """
        if self._is_after_cr and piece:
            self._is_after_cr = False
            piece = piece.removeprefix(b"\n")
        if not piece:
            return []
        self._grow(len(piece))
        if b"\n" not in piece and b"\r" not in piece:
            self._line.append(piece)
            return []
        if self._line:
            piece = b"".join((*self._line, piece))
            self._line.clear()
        lines = piece.splitlines()  # of bytes: ends at CR, LF and CRLF only
        self._is_after_cr = piece.endswith(b"\r")
        if not piece.endswith((b"\r", b"\n")):
            self._line.append(lines.pop())
        events: list[ServerSentEvent] = []
        for line in lines:
            self._take(line, events)
        return events

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_EVENT_BYTES:
            raise ProtocolError(f"the server sent an event of more than {MAX_EVENT_BYTES // 2**20} MiB")

    def _take(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            if self._data:
                events.append(ServerSentEvent(self._event or "message", "\n".join(self._data), self._last_event_id))
                self._data = []
            self._event = ""
            self._size = sum(map(len, self._line))
            return
        name, _, value = line.partition(b":")  # without a name it is a comment
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value.decode(errors="replace"))
        elif name == b"event":
            self._event = value.decode(errors="replace")
        elif name == b"id" and b"\0" not in value:
            self._last_event_id = value.decode(errors="replace")
