"""Conversations of the Anthropic API as chats."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.anthropic.conversation import read_conversation

HI = {"role": "user", "content": "hi"}
CALL = {"type": "tool_use", "id": "c1", "name": "look", "input": {"where": "dé"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "a cat"}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def messages(*given: Any, system: Any = None) -> list[dict[str, Any]]:
    conversation = read_conversation(system, list(given))
    assert conversation.prefill == ""
    return conversation.messages


def test_texts() -> None:
    assert messages(HI) == [HI]
    assert messages(user(text("a"), text("b", **CACHED))) == [{"role": "user", "content": "a\nb"}]
    assert messages(user(text("a", citations=None))) == [{"role": "user", "content": "a"}]
    assert messages(user()) == [{"role": "user", "content": ""}]


def test_the_system_comes_first() -> None:
    told = {"role": "system", "content": "be brief\nbe kind"}
    assert messages(HI, system=[text("be brief"), text("be kind", **CACHED)]) == [told, HI]
    assert messages(HI, system="be brief\nbe kind") == [told, HI]
    assert messages(HI, system="") == [{"role": "system", "content": ""}, HI]
    assert messages(HI, system=[]) == [HI]
    assert messages({"role": "system", "content": "be kind"}, HI, system="be brief") == [told, HI]
    assert messages(HI, {"role": "system", "content": "x"}, HI) == [HI, {"role": "system", "content": "x"}, HI]


def test_messages_of_one_role_in_a_row_are_one_turn() -> None:
    assert messages(HI, user(text("there")), assistant(text("a")), assistant(text("b")), HI) == [
        {"role": "user", "content": "hi\nthere"},
        {"role": "assistant", "content": "a\nb"},
        HI,
    ]


def test_tools() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"where": "dé"}'}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "a cat"}
    assert messages(HI, assistant(CALL), user(RESULT, text("so?"))) == [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        result,
        {"role": "user", "content": "so?"},
    ]
    second = {**CALL, "id": "c2", "caller": {"type": "direct"}}
    both = messages(HI, assistant(text("hm"), CALL, second), user(RESULT), user({**RESULT, "tool_use_id": "c2"}))
    assert both[1:] == [
        {"role": "assistant", "content": "hm", "tool_calls": [call, {**call, "id": "c2"}]},
        result,
        {**result, "tool_call_id": "c2"},
    ]


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"content": [text("a"), text("b")]}, "a\nb"),
        ({"content": None}, ""),
        ({"is_error": True}, "Error: a cat"),
        ({"is_error": False}, "a cat"),
        (CACHED, "a cat"),
    ],
)
def test_results(fields: dict[str, Any], content: str) -> None:
    assert messages(HI, assistant(CALL), user({**RESULT, **fields}))[-1]["content"] == content


def test_thinking_goes_with_its_turn() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    assert messages(HI, assistant(thought, text("a")), HI)[1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
    }


def test_a_last_turn_of_the_assistant_is_how_its_answer_begins() -> None:
    conversation = read_conversation(None, [HI, assistant(text("Well")), {"role": "assistant", "content": "{"}])
    assert (conversation.messages, conversation.prefill) == ([HI], "Well\n{")
    assert read_conversation(None, [HI, assistant()]).messages == [HI]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{**HI, "role": "tool"}], "messages[0].role"),
        ([{**HI, "name": "me"}], "messages[0].name"),
        ([{**HI, "content": 5}], "messages[0].content"),
        ([{**HI, "content": "\ud800"}], "messages[0].content"),
        ([user("hi")], "messages[0].content[0]"),
        ([user({"text": "hi"})], "messages[0].content[0].type"),
        ([user({"type": "text"})], "messages[0].content[0].text"),
        ([user(text(5))], "messages[0].content[0].text"),  # type: ignore[arg-type]
        ([user(text("hi", citations=[{}]))], "messages[0].content[0].citations"),
        ([user(text("hi", colour="red"))], "messages[0].content[0].colour"),
        ([user(text("hi", cache_control={}))], "messages[0].content[0].cache_control.type"),
        ([user(text("hi", cache_control={"type": "forever"}))], "messages[0].content[0].cache_control.type"),
        ([user(text("hi", cache_control={"type": "ephemeral", "ttl": 5}))], "messages[0].content[0].cache_control.ttl"),
        ([HI, user({"type": "image", "source": {}})], "messages[1].content[0]"),
        ([user({"type": "document", "source": {}})], "messages[0].content[0]"),
        ([user({"type": []})], "messages[0].content[0]"),
        ([user(CALL)], "messages[0].content[0]"),
        ([HI, assistant(RESULT)], "messages[1].content[0]"),
        ([HI, assistant({"type": "redacted_thinking", "data": ""})], "messages[1].content[0]"),
        ([HI, assistant({**CALL, "input": "{}"})], "messages[1].content[0].input"),
        ([HI, assistant({**CALL, "id": None})], "messages[1].content[0].id"),
        ([HI, assistant({**CALL, "caller": {"type": "x"}})], "messages[1].content[0].caller"),
        ([HI, assistant(CALL)], "messages"),
        ([HI, assistant({"type": "thinking", "thinking": "hm"})], "messages"),
        ([user(RESULT)], "messages[0].content[0].tool_use_id"),
        ([HI, assistant(CALL), user(RESULT, RESULT)], "messages[2].content[1].tool_use_id"),
        ([HI, assistant(CALL), user({**RESULT, "is_error": 1})], "messages[2].content[0].is_error"),
        (
            [HI, assistant(CALL), user({**RESULT, "content": [{"type": "image"}]})],
            "messages[2].content[0].content[0]",
        ),
        ([{"role": "system", "content": "x"}], "messages"),
        ([assistant(text("Well"))], "messages"),
    ],
)
def test_what_is_refused(given: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_conversation(None, given)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("system", "param"),
    [(5, "system"), ([{"type": "image"}], "system[0]"), ([text(None)], "system[0].text")],  # type: ignore[arg-type]
)
def test_what_no_system_is(system: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_conversation(system, [HI])
    assert caught.value.param == param
