"""What tests of chat parsers share: a text cut into pieces in every way that matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Protocol

from pellucid.server.chat.events import ChatEvent
from pellucid.server.chat.message import ChatMessage, joined


class Reader(Protocol):
    def push(self, text: str) -> list[ChatEvent]: ...
    def finish(self) -> list[ChatEvent]: ...


def cuts(text: str, rng: random.Random) -> Iterator[list[str]]:
    """`text` whole, in single characters, cut in two everywhere, and cut at random; with empty pieces in between."""
    yield [text]
    yield list(text)
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]
    for _ in range(5):
        places = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(1, 8)))
        yield [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def message_of(reader: Reader, pieces: list[str]) -> ChatMessage:
    """What `reader` makes of `pieces`; ids, which are drawn at random, as their index."""
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    message = joined(events)
    for index, call in enumerate(message.tool_calls):
        call.call_id = str(index)
    return message


def same_however_cut(make: Callable[[], Reader], text: str, seed: int = 0) -> ChatMessage:
    """The message of `text`.

    Raises:
        AssertionError: it depends on how the text is cut.
    """
    whole = message_of(make(), [text])
    for pieces in cuts(text, random.Random(seed)):
        assert message_of(make(), pieces) == whole, pieces
    return whole
