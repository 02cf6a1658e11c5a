"""`/v1/messages`, asked by Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.support.chat_models import write_chat_model
from tests.support.live_server import LiveServer, live_server

HI: Any = [{"role": "user", "content": "hi"}]
SAMPLED = {"temperature": 1.5, "seed": 7, "top_k": 20}
KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf"), api_keys=(KEY,)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def ask(client: anthropic.Anthropic, **body: Any) -> anthropic.types.Message:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": HI, "extra_body": SAMPLED, **body}
    message: anthropic.types.Message = client.messages.create(**asked)
    return message


def stream(client: anthropic.Anthropic, **body: Any) -> anthropic.types.Message:
    """The message that the client makes of a stream."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": HI, "extra_body": SAMPLED, **body}
    with client.messages.stream(**asked) as events:
        return events.get_final_message()


def said(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def chat(server: LiveServer, **body: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 12, "messages": HI, **SAMPLED, **body}
    return server.post("/v1/chat/completions", body, Authorization=f"Bearer {KEY}")


def test_it_says_what_a_chat_completion_says(server: LiveServer, client: anthropic.Anthropic) -> None:
    for options in (SAMPLED, {"temperature": 0}):
        message = ask(client, system="be brief", extra_body=options)
        messages = [{"role": "system", "content": "be brief"}, *HI]
        completion = chat(server, **{"temperature": 1, "seed": None, "top_k": None, **options}, messages=messages)
        assert said(message) == completion["choices"][0]["message"]["content"]
        usage = message.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == completion["usage"]["prompt_tokens"]
        assert usage.output_tokens == completion["usage"]["completion_tokens"] == 12
        assert message.stop_reason == "max_tokens"


def test_a_stream_is_the_message_that_is_not_streamed(client: anthropic.Anthropic) -> None:
    whole, streamed = ask(client).to_dict(), stream(client).to_dict()
    assert {**streamed, "id": "", "stop_details": None} == {**whole, "id": "", "stop_details": None}


def test_a_stop_sequence(client: anthropic.Anthropic) -> None:
    text = said(ask(client))
    last = text[len(text) // 2]
    for message in (ask(client, stop_sequences=[last]), stream(client, stop_sequences=[last])):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", last)
        assert said(message) == text.partition(last)[0]


def test_an_answer_goes_on_from_how_it_begins(client: anthropic.Anthropic) -> None:
    begun = [*HI, {"role": "assistant", "content": "Well"}]
    message = ask(client, messages=begun)
    assert message.usage.input_tokens == ask(client).usage.input_tokens + 4


def test_the_context_is_full_before_max_tokens(client: anthropic.Anthropic) -> None:
    message = ask(client, max_tokens=5000, extra_body={"temperature": 0, "ignore_eos": True})
    assert message.stop_reason == "model_context_window_exceeded"


def test_counting_tokens(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="tiny", system="be brief", messages=HI)
    usage = ask(client, system="be brief").usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_the_order_of_events(client: anthropic.Anthropic) -> None:
    events = client.messages.create(model="tiny", max_tokens=2, messages=HI, stream=True, extra_body=SAMPLED)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("ask_one", [ask, stream])
@pytest.mark.parametrize(
    ("body", "kind", "told"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "tiny"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"extra_body": {"container": "x"}}, anthropic.BadRequestError, "container"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, anthropic.BadRequestError, "1024"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError, "image"),
    ],
)
def test_errors(client: anthropic.Anthropic, ask_one: Any, body: Any, kind: Any, told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        ask_one(client, **body)
    error: Any = caught.value
    anthropic.types.ErrorResponse.model_validate(error.body)


def test_a_key_that_is_not_known(server: LiveServer) -> None:
    stranger = anthropic.Anthropic(base_url=server.url, api_key="another-key-that-is-long", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        ask(stranger)
