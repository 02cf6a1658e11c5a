"""Streams of chat completions: OpenAI's client makes of them what is answered at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.openai.responses import response_body
from pellucid.server.openai.streams import CompletionEvents
from tests.server.openai.test_chat_messages import accumulated
from tests.support.scripted_formats import ANSWERS, SCRIPTED, TOKENIZER, answer


def request(**fields: Any) -> GenerationRequest:
    params = SamplingParams(logprobs=fields.pop("logprobs", None))
    return GenerationRequest(
        "m", [[1] * 7], params, True, fields.pop("return_token_ids", False), chat=SCRIPTED, **fields
    )


def chunks_of(asked: GenerationRequest, said: str, size: int, **ending: Any) -> list[dict[str, Any]]:
    """The events of an answer of which `size` tokens come at a time."""
    output, tokens = answer(said, **ending)
    events = CompletionEvents(asked, TOKENIZER, name="0", created=17)
    data = b"".join(
        events.events((0, token) for token in tokens[begin : begin + size]) for begin in range(0, len(tokens), size)
    )
    *chunks, done, rest = (data + events.end([output])).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    read = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    for chunk in read:
        ChatCompletionChunk.model_validate(chunk)
    return read


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("said", ANSWERS)
def test_a_stream_is_what_is_answered_at_once(said: str, size: int) -> None:
    asked = request(logprobs=1, return_token_ids=True)
    choices = [choice for chunk in chunks_of(asked, said, size, logprobs=True) for choice in chunk["choices"]]
    (whole,) = response_body(asked, [answer(said, logprobs=True)[0]], TOKENIZER, name="0", created=17)["choices"]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert accumulated([choice["delta"] for choice in choices]) == whole["message"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [whole["finish_reason"]]
    content = [step for choice in choices if choice["logprobs"] for step in choice["logprobs"]["content"]]
    assert content == whole["logprobs"]["content"]
    assert [token_id for choice in choices for token_id in choice.get("token_ids", ())] == whole["token_ids"]


def test_an_answer_that_calls_ends_with_calls() -> None:
    for size in (1, 1000):
        last = chunks_of(request(), "[{}]", size)[-1]["choices"][0]
        assert last["finish_reason"] == "tool_calls"
        last = chunks_of(request(), "[{", size, finish_reason="length")[-1]["choices"][0]
        assert last["finish_reason"] == "length"
