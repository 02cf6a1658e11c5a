"""Messages of chat completions: deltas join to the whole."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.server.chat.message import joined
from pellucid.server.openai.chat_messages import delta_body, finish_reason_of, message_body
from tests.support.scripted_formats import ANSWERS, ScriptedParser


def accumulated(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """What clients make of deltas."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message:
        message["content"] = message["content"] or None
    return message


@pytest.mark.parametrize("said", ANSWERS)
def test_deltas_join_to_the_message(said: str) -> None:
    parser = ScriptedParser()
    pieces = [*parser.push(said), *parser.finish()]
    assert accumulated([delta_body(piece) for piece in pieces]) == message_body(joined(pieces))


def test_a_message_with_everything() -> None:
    assert message_body(joined(ScriptedParser().push('<hm>[{"a": 1}]'))) == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
        ],
    }


def test_why_it_ended() -> None:
    assert finish_reason_of("stop", None, has_tool_calls=True) == "tool_calls"
    assert finish_reason_of("stop", 2, has_tool_calls=True) == "tool_calls"  # a token that ends answers
    assert finish_reason_of("stop", '"', has_tool_calls=True) == "stop"  # the arguments may be cut short
    assert finish_reason_of("length", None, has_tool_calls=True) == "length"
    assert finish_reason_of("stop", None, has_tool_calls=False) == "stop"
