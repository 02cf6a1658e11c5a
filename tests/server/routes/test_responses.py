"""`/v1/responses`, asked by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.support.chat_models import write_chat_model
from tests.support.live_server import LiveServer, live_server

SAMPLED = {"top_k": 20, "seed": 7}
LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **body: Any) -> Response:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_output_tokens": 12,
        "input": "hi",
        "temperature": 1.5,
        "extra_body": SAMPLED,
        **body,
    }
    response: Response = client.responses.create(**asked)
    return response


def stream(client: openai.OpenAI, **body: Any) -> Response:
    """The response that a stream ends with."""
    events = list(ask(client, **body, stream=True))  # type: ignore[arg-type]
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    response: Response = last.response
    return response


def chat(client: openai.OpenAI, **body: Any) -> Any:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 1.5, "extra_body": SAMPLED, **body}
    return client.chat.completions.create(**asked)


def test_it_says_what_a_chat_completion_says(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    for options in ({}, {"temperature": 0}):
        response = ask(client, instructions="be brief", **options)
        completion = chat(client, messages=messages, **options)
        assert response.output_text == completion.choices[0].message.content
        assert response.usage is not None
        assert response.usage.input_tokens == completion.usage.prompt_tokens
        assert response.usage.output_tokens == completion.usage.completion_tokens == 12
        assert response.status == "incomplete"


def test_a_stream_ends_with_the_response_that_is_not_streamed(client: openai.OpenAI) -> None:
    def plain(response: Response) -> dict[str, Any]:
        told = response.to_dict()
        for item in told["output"]:  # type: ignore[attr-defined]
            del item["id"]
        return {**told, "id": "", "created_at": 0, "usage": None}

    assert plain(stream(client)) == plain(ask(client))
    assert plain(stream(client, include=LOGPROBS)) == plain(ask(client, include=LOGPROBS))


def test_the_client_follows_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny", input="hi", temperature=0, extra_body={"stop_token_ids": [10]}
    ) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        response = events.get_final_response()
    assert response.status == "completed"
    assert response.output_text == text


def test_log_probabilities_are_those_of_a_chat_completion(client: openai.OpenAI) -> None:
    response = ask(client, include=LOGPROBS, top_logprobs=2)
    completion = chat(client, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2)
    item: Any = response.output[0]
    steps = [step.to_dict() for step in item.content[0].logprobs]
    assert steps == [step.to_dict() for step in completion.choices[0].logprobs.content]


def test_a_conversation_goes_on_with_the_items_of_a_response(client: openai.OpenAI) -> None:
    first = ask(client)
    said = {"role": "assistant", "content": first.output_text}
    user = {"role": "user", "content": "and?"}
    items = [{"role": "user", "content": "hi"}, *[item.to_dict() for item in first.output], user]
    response = ask(client, input=items)
    completion = chat(client, messages=[{"role": "user", "content": "hi"}, said, user])
    assert response.output_text == completion.choices[0].message.content


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        ({"previous_response_id": "resp_0"}, openai.BadRequestError, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"input": "x" * 2000}, openai.BadRequestError, None),
    ],
)
def test_errors(client: openai.OpenAI, body: Any, kind: Any, param: str | None, streams: bool) -> None:
    with pytest.raises(kind) as caught:
        ask(client, **body, stream=streams)
    if param is not None:
        assert caught.value.param == param
