"""Messages as the Anthropic API writes them."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import Message

from pellucid.core.sampling_params import SamplingParams
from pellucid.server.anthropic.responses import message_body
from pellucid.server.openai.requests import GenerationRequest
from tests.support.scripted_formats import ANSWERS, SCRIPTED, TOKENIZER, answer


def request(**params: Any) -> GenerationRequest:
    return GenerationRequest(
        "m", [[1] * 7], SamplingParams(**{"max_tokens": 100, **params}), True, False, chat=SCRIPTED
    )


def body_of(said: str, asked: GenerationRequest | None = None, **ending: Any) -> dict[str, Any]:
    output, _ = answer(said, **ending)
    body = message_body(asked or request(), output, TOKENIZER, name="0")
    Message.model_validate(body)
    return body


def test_a_message() -> None:
    assert body_of("hello") == {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 6,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


@pytest.mark.parametrize("said", ANSWERS)
def test_the_client_reads_every_kind(said: str) -> None:
    body_of(said)


def test_thinking_and_tools() -> None:
    body = body_of('<so>[{"a": 1}]')
    assert [block["type"] for block in body["content"]] == ["thinking", "tool_use"]
    assert body["content"][1] == {"type": "tool_use", "id": "call_0", "name": "look", "input": {"a": 1}}
    assert body["stop_reason"] == "tool_use"
    assert body["usage"]["output_tokens_details"] == {"thinking_tokens": 4}


@pytest.mark.parametrize(
    ("said", "max_tokens", "ending", "reason", "sequence"),
    [
        ("hi", 100, {}, "end_turn", None),
        ("hi", 100, {"stop_reason": 5}, "end_turn", None),
        ("hi", 100, {"stop_reason": "."}, "stop_sequence", "."),
        ("hi", 2, {"finish_reason": "length"}, "max_tokens", None),
        ("hi", 3, {"finish_reason": "length"}, "model_context_window_exceeded", None),
        ("[{}]", 100, {}, "tool_use", None),
        ("[{", 2, {"finish_reason": "length"}, "max_tokens", None),
    ],
)
def test_why_it_ended(said: str, max_tokens: int, ending: Any, reason: str, sequence: str | None) -> None:
    body = body_of(said, request(max_tokens=max_tokens), **ending)
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)
