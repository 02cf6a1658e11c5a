"""What a model writes becomes events, however it is cut into pieces."""

from __future__ import annotations

from pellucid.server.chat.events import TextDelta
from pellucid.server.chat.formats import PLAIN_TEXT
from pellucid.server.chat.message import ChatMessage
from pellucid.server.chat.parser import read_message
from pellucid.server.chat.tools import ChatTurn


def test_plain_text_is_text_at_once() -> None:
    parser = PLAIN_TEXT.parser(ChatTurn())
    assert parser.push("a<") == [TextDelta("a<")]
    assert parser.push("") == parser.finish() == []
    assert read_message(PLAIN_TEXT.parser(ChatTurn()), "a<think>") == ChatMessage("a<think>")
