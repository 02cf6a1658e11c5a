"""Input items of the Responses API as chats."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.openai.responses_api_items import read_input

HI = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "a cat"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a cat"}
REASONING = {"type": "reasoning", "id": "rs_0", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def said(text: str, **fields: Any) -> dict[str, Any]:
    """A message of the assistant, as a response has it."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": [], "parsed": {"a": 1}}
    return {"type": "message", "id": "msg_0", "role": "assistant", "status": "completed", "content": [part], **fields}


def test_a_string() -> None:
    assert read_input(None, "hi") == [HI]
    assert read_input("be brief", "hi") == [{"role": "system", "content": "be brief"}, HI]


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([HI], [HI]),
        ([{**HI, "type": "message", "status": None, "phase": None}], [HI]),
        ([{"role": "developer", "content": "x"}, HI], [{"role": "developer", "content": "x"}, HI]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": "a\nb"}],
        ),
        (
            [{**HI, "content": [{"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}]}],
            [{"role": "user", "content": "a"}],
        ),
        (
            [HI, {**CALL, "parsed_arguments": {"a": 1}}],
            [HI, {"role": "assistant", "content": None, "tool_calls": [CALLED]}],
        ),
        ([HI, said("yes"), HI], [HI, {"role": "assistant", "content": "yes"}, HI]),
        ([HI, {"role": "assistant", "content": "yes"}, HI], [HI, {"role": "assistant", "content": "yes"}, HI]),
        (
            [HI, REASONING, said("yes"), HI],
            [HI, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, HI],
        ),
        ([HI, CALL, OUTPUT], [HI, {"role": "assistant", "content": None, "tool_calls": [CALLED]}, RESULT]),
        (
            [HI, REASONING, said("so"), CALL, {**CALL, "call_id": "c2"}, OUTPUT, {**OUTPUT, "call_id": "c2"}],
            [
                HI,
                {
                    "role": "assistant",
                    "content": "so",
                    "reasoning_content": "hm",
                    "tool_calls": [CALLED, {**CALLED, "id": "c2"}],
                },
                RESULT,
                {**RESULT, "tool_call_id": "c2"},
            ],
        ),
        (
            [HI, CALL, OUTPUT, {**CALL, "call_id": "c2"}],
            [
                HI,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                RESULT,
                {"role": "assistant", "content": None, "tool_calls": [{**CALLED, "id": "c2"}]},
            ],
        ),
        (
            [HI, said("a"), said("b")],
            [HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        ([HI, REASONING], [HI, {"role": "assistant", "content": "", "reasoning_content": "hm"}]),
        (
            [HI, {**REASONING, "content": None, "summary": [{"type": "summary_text", "text": "in short"}]}, said("a")],
            [HI, {"role": "assistant", "content": "a", "reasoning_content": "in short"}],
        ),
        ([HI, {"type": "reasoning", "summary": [], "encrypted_content": None}], [HI]),
        ([{**OUTPUT, "output": [{"type": "input_text", "text": "a cat"}], "id": "x"}], [RESULT]),
    ],
)
def test_items(items: list[Any], messages: list[Any]) -> None:
    assert read_input(None, items) == messages


@pytest.mark.parametrize(
    ("items", "param"),
    [
        (5, "input"),
        ([], "input"),
        ("\ud800", "input"),
        (["hi"], "input[0]"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{**HI, "content": 5}], "input[0].content"),
        ([{**HI, "name": "me"}], "input[0].name"),
        ([{**HI, "status": "done"}], "input[0].status"),
        ([{**HI, "phase": "commentary"}], "input[0].phase"),
        ([HI, {**HI, "content": [{"type": "input_image", "image_url": "x"}]}], "input[1].content[0]"),
        ([{**HI, "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0]"),
        ([{**HI, "content": [{"text": "x"}]}], "input[0].content[0].type"),
        ([{**HI, "content": [{"type": "input_text", "text": 5}]}], "input[0].content[0].text"),
        ([{**HI, "content": [{"type": "output_text", "text": "x"}]}], "input[0].content[0]"),
        ([{"id": "msg_0"}], "input[0]"),
        ([{"type": "item_reference", "id": "msg_0"}], "input[0]"),
        ([{"type": "web_search_call"}], "input[0]"),
        ([{"type": []}], "input[0]"),
        (
            [said("a", content=[{"type": "output_text", "text": "a", "annotations": [{}]}])],
            "input[0].content[0].annotations",
        ),
        ([said("a", content=[{"type": "refusal", "refusal": "no"}])], "input[0].content[0]"),
        ([{**CALL, "arguments": {}}], "input[0].arguments"),
        ([{**CALL, "call_id": None}], "input[0].call_id"),
        ([{**CALL, "namespace": "x"}], "input[0].namespace"),
        ([{**OUTPUT, "output": None}], "input[0].output"),
        ([{**OUTPUT, "output": [{"type": "input_image"}]}], "input[0].output[0]"),
        ([{**REASONING, "encrypted_content": "x"}], "input[0].encrypted_content"),
        ([{**REASONING, "content": "hm"}], "input[0].content"),
    ],
)
def test_what_is_refused(items: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_input(None, items)
    assert caught.value.param == param


def test_instructions_are_a_string() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_input([HI], "hi")
    assert caught.value.param == "instructions"
