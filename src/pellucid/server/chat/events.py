"""What an answer in a chat is made of, piece by piece, whatever the API that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A function is called; its arguments follow.

    Attributes:
        index: from 0, in the order of the calls.
        call_id: unique.
        name: of a function that the request offers.
    """

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the arguments of call `index`: joined, they are a JSON object as the model wrote it, cut short
    where the answer is."""

    index: int
    text: str


ChatEvent: TypeAlias = ReasoningDelta | TextDelta | ToolCallBegin | ToolCallArguments
