"""How a model writes what is not plain text: tool calls and reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pellucid.server.chat.parser import ChatParser
from pellucid.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pellucid.server.chat.tools import ChatTurn


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model writes what is not plain text.

    Attributes:
        name: of the format of its tool calls.
    """

    name: str

    def parser(self, turn: ChatTurn) -> ChatParser:
        """For one answer (one choice) of `turn`."""
        return ChatParser()


PLAIN_TEXT = ChatFormat("plain")
"""Neither tool calls nor reasoning."""


def chat_format_of(
    tokenizer: Tokenizer, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto"
) -> ChatFormat:
    """The format of a model, from its chat template and its vocabulary."""
    return PLAIN_TEXT
