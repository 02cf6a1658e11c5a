from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.client import event_stream
from pellucid.client.errors import ProtocolError
from pellucid.client.event_stream import EventStreamParser, ServerSentEvent

FIRST, SECOND = ("message", "first event"), ("message", "second event")
CASES: list[tuple[bytes, list[tuple[str, str]]]] = [
    # The examples of the specification (9.2.6).
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10")]),
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event", [FIRST, SECOND]),
    (b"data\n\ndata\ndata\n\ndata:", [("message", ""), ("message", "\n")]),
    (b"data:test\n\ndata: test\n\n", [("message", "test"), ("message", "test")]),
    # Line ends, and what is no field.
    (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [("message", "a"), ("message", "b"), ("message", "c")]),
    (b"data: a\r\ndata: b\r\n\r\n", [("message", "a\nb")]),
    (b"event: error\ndata: x\n\ndata: y\n\n", [("error", "x"), ("message", "y")]),
    (b"event: lost\n\ndata: y\n\n", [("message", "y")]),
    (b"retry: 100\nnonsense: 1\n data: no\nDATA: no\ndata: yes\n\n", [("message", "yes")]),
    (b"\xef\xbb\xbfdata: marked\n\n", [("message", "marked")]),
    (b"data: a: b\n\n", [("message", "a: b")]),
    ("data: 日本 🎈\u2028\x0b\x85\n\n".encode(), [("message", "日本 🎈\u2028\x0b\x85")]),
    (b"data: \xff\xc3\n\n", [("message", "��")]),
    (b"data: never ended\n", []),
]  # fmt: skip


def parse(*pieces: bytes) -> list[ServerSentEvent]:
    parser = EventStreamParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(("stream", "expected"), CASES)
def test_events(stream: bytes, expected: list[tuple[str, str]]) -> None:
    assert [event[:2] for event in parse(stream)] == expected


@pytest.mark.parametrize("stream", [stream for stream, _ in CASES])
def test_every_cut_gives_the_same_events(stream: bytes) -> None:
    whole = parse(stream)
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == whole
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            assert parse(stream[:first], stream[first:second], stream[second:]) == whole


@given(
    st.lists(st.sampled_from([b"data", b"event", b":", b" ", b"\r", b"\n", b"\xef\xbb\xbf", b"\xe2", b"id", b"x"])),
    st.data(),
)
def test_random_streams_cut_at_random(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*pieces) == parse(stream)


def test_an_event_is_given_with_the_byte_that_ends_it() -> None:
    for end in (b"\n", b"\r"):
        parser = EventStreamParser()
        assert parser.feed(b"data: now" + end) == []
        assert [event.data for event in parser.feed(end)] == ["now"]


def test_ids_stay_until_another_is_given() -> None:
    events = parse(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\0\ndata: c\n\nid\ndata: d\n\n")
    assert [event.last_event_id for event in events] == ["1", "1", "1", ""]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_EVENT_BYTES", 100)
    parser = EventStreamParser()
    for _ in range(30):
        parser.feed(b"data: 0123456789\n\n")  # of any number of events, each may be as large
    with pytest.raises(ProtocolError, match="an event of more than"):
        parse(*[b"data: 01234"] * 30)
    with pytest.raises(ProtocolError, match="an event of more than"):
        parse(*[b"data: 0123456789\n"] * 30)


def test_a_parser_that_forgets_a_line_feed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: a CR at the end of a piece ends a line, and the LF that follows ends another.
    feed = EventStreamParser.feed

    def forgetful(parser: EventStreamParser, piece: bytes) -> list[ServerSentEvent]:
        parser._is_after_cr = False
        return feed(parser, piece)

    monkeypatch.setattr(EventStreamParser, "feed", forgetful)
    with pytest.raises(AssertionError):
        test_every_cut_gives_the_same_events(b"data: a\r\ndata: b\r\n\r\n")
