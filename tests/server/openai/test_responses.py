"""Answers as the OpenAI API writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pellucid.core.errors import BackendError, InvalidRequestError, PellucidError, QueueFullError
from pellucid.core.outputs import CompletionOutput, Logprob, RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.openai.responses import error_body, response_body


class ByteTokenizer:
    """Token i is byte i; 0 stands for no text."""

    special_ids = frozenset({0})
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i or not skip_special_tokens).decode("utf-8", "replace")


TOKENIZER: Any = ByteTokenizer()
NOTHING_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def output_of(data: bytes, text: str, *, index: int = 0, logprobs: bool = True) -> CompletionOutput:
    """A completion of byte tokens, each with itself at rank 2 and `!` at rank 1."""
    steps = [
        {
            byte: Logprob(-1.5, 2, bytes([byte]).decode(errors="replace")),
            33: Logprob(float("-inf") if byte == 0 else -0.5, 1, "!"),
        }
        for byte in data
    ]
    return CompletionOutput(index, text, list(data), "stop", None, steps if logprobs else None)


def body_of(is_chat: bool, *outputs: RequestOutput, **options: Any) -> dict[str, Any]:
    params = options.get("params", SamplingParams())
    prompt_only = options.get("is_prompt_only", False)
    request = GenerationRequest("m", ["p"], params, is_chat, options.get("return_token_ids", False), prompt_only)
    for output in outputs:
        output.metrics.output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    body = response_body(request, outputs, TOKENIZER, name="0123", created=17)
    json.dumps(body, allow_nan=False)
    return body


def test_a_chat_completion() -> None:
    output = RequestOutput("r", None, [1, 2, 3], [output_of(b"hi", "hi", logprobs=False)])
    assert body_of(True, output) == {
        "id": "chatcmpl-0123",
        "object": "chat.completion",
        "created": 17,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, **NOTHING_CACHED},
    }


def test_a_completion_of_several_prompts() -> None:
    outputs = [
        RequestOutput(
            "r", None, [1], [output_of(b"a", "a", logprobs=False), output_of(b"b", "b", index=1, logprobs=False)]
        ),
        RequestOutput("s", None, [2, 3], [output_of(b"c", "c", logprobs=False)]),
    ]
    body = body_of(False, *outputs, return_token_ids=True)
    assert (body["id"], body["object"]) == ("cmpl-0123", "text_completion")
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "b"), (2, "c")]
    assert [choice["token_ids"] for choice in body["choices"]] == [[97], [98], [99]]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[1], [1], [2, 3]]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, **NOTHING_CACHED}


def test_log_probabilities_of_a_chat() -> None:
    output = RequestOutput("r", None, [1], [output_of("é".encode() + b"\0", "é")])
    content = body_of(True, output)["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == ["bytes:\\xc3", "bytes:\\xa9", "\0"]
    assert [item["bytes"] for item in content] == [[0xC3], [0xA9], [0]]
    assert content[0]["top_logprobs"] == [
        {"token": "!", "logprob": -0.5, "bytes": [33]},
        {"token": "bytes:\\xc3", "logprob": -1.5, "bytes": [0xC3]},
    ]
    assert content[2]["top_logprobs"][0]["logprob"] == -9999.0


def test_log_probabilities_of_a_completion() -> None:
    output = RequestOutput("r", None, [1], [output_of("aé\0bcd".encode(), "aéb")])
    logprobs = body_of(False, output)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "\0", "b", "c", "d"]
    assert logprobs["token_logprobs"] == [-1.5] * 7
    assert logprobs["top_logprobs"][0] == {"a": -1.5, "!": -0.5}
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 3, 3]  # beyond the stop string at "c" there is no text


def test_an_echo() -> None:
    completion = output_of("é: ab".encode(), "é: a")
    assert completion.logprobs is not None
    completion.logprobs[0] = {}
    choice = body_of(False, RequestOutput("r", None, [1, 2, 3], [completion]), params=SamplingParams(echo=True))[
        "choices"
    ][0]
    assert choice["text"] == "é: a"
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", ":", " ", "a", "b"],
        "token_logprobs": [None, -1.5, -1.5, -1.5, -1.5, -1.5],
        "top_logprobs": [None, {"bytes:\\xa9": -1.5, "!": -0.5}, {":": -1.5, "!": -0.5}]
        + [{character: -1.5, "!": -0.5} for character in " ab"],
        "text_offset": [0, 0, 1, 2, 3, 4],
    }


def test_the_prompt_alone() -> None:
    completion = output_of(b" hello", " hello")
    output = RequestOutput("r", None, list(b" hell"), [completion])
    body = body_of(False, output, params=SamplingParams(echo=True, max_tokens=1), is_prompt_only=True)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" hell", "length")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5, **NOTHING_CACHED}
    stripped = body_of(False, output, params=SamplingParams(echo=True, strip=True, max_tokens=1), is_prompt_only=True)
    assert stripped["choices"][0]["text"] == "hell"
    assert stripped["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]


def test_what_is_generated_and_not_returned_is_used() -> None:
    output = RequestOutput("r", None, [1], [output_of(b"ab", "ab")])
    output.metrics.output_tokens = 9
    request = GenerationRequest("m", ["p"], SamplingParams(best_of=5), False, False)
    assert response_body(request, [output], TOKENIZER, name="0", created=1)["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("is_chat", [False, True])
def test_log_probabilities_of_the_prompt(is_chat: bool) -> None:
    entries = [None, {97: Logprob(-1.0, None, "a"), 98: Logprob(float("-inf"), 1, "b")}]
    output = RequestOutput("r", None, [1, 97], [output_of(b"c", "c", logprobs=False)], prompt_logprobs=entries)
    assert body_of(is_chat, output)["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -1.0, "rank": None, "decoded_token": "a"},
            "98": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"},
        },
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("no", param="top_p"), "invalid_request_error"),
        (QueueFullError("full"), "rate_limit_error"),
        (BackendError("broken"), "server_error"),
    ],
)
def test_errors(error: PellucidError, kind: str) -> None:
    expected = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    assert error_body(error) == {"error": expected}
