"""The `openai` client, unchanged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from pellucid.weights.catalog import DEFAULT_MODEL
from tests.clients.conftest import KEY
from tests.support.chat_models import TOKENS
from tests.support.server_process import MODEL, SECONDS, ServerProcess

HI: list[Any] = [{"role": "user", "content": "Hi"}]
SEEDED: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "seed": 7, "temperature": 1.0}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints the wall",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "twice": {"type": "boolean"}},
            "required": ["colour", "twice"],
        },
    },
}


class Wall(BaseModel):
    colour: Literal["red", "green"]
    twice: bool


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_stream_is_the_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=HI, **SEEDED)
    stream = client.chat.completions.create(messages=HI, stream=True, stream_options={"include_usage": True}, **SEEDED)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) <= {None}


def test_several_answers_with_log_probabilities(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=HI, n=3, logprobs=True, top_logprobs=2, **SEEDED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    told = 0
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        told += len(choice.logprobs.content)
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert told == answer.usage.completion_tokens


def test_completions(client: OpenAI) -> None:
    whole = client.completions.create(prompt=["Hi", "Ho"], logprobs=1, stop=["\n"], **SEEDED)
    assert len(whole.choices) == 2
    assert not [choice for choice in whole.choices if "\n" in choice.text]
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=["Hi", "Ho"], stop=["\n"], stream=True, **SEEDED):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in whole.choices}
    echoed = client.completions.create(prompt="Hi", echo=True, **SEEDED)
    assert echoed.choices[0].text.startswith("Hi")


def test_fields_beyond_the_api(client: OpenAI) -> None:
    beyond = {"top_k": 1, "repetition_penalty": 1.1, "return_token_ids": True}
    answer = client.chat.completions.create(messages=HI, extra_body=beyond, **SEEDED)
    assert answer.usage is not None
    assert len(answer.choices[0].model_extra["token_ids"]) == answer.usage.completion_tokens  # type: ignore[index]


def test_an_answer_is_held_to_a_class(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=HI, response_format=Wall, max_tokens=100, temperature=1.0, seed=3
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Wall)
    # What this client adds to an answer may be sent back with it.
    dumped = message.model_dump(warnings=False)
    assert client.chat.completions.create(model=MODEL, messages=[*HI, dumped, *HI], max_tokens=5).choices
    response = client.responses.parse(model=MODEL, input=HI, text_format=Wall, max_output_tokens=100, temperature=1.0)
    assert isinstance(response.output_parsed, Wall)
    items: list[Any] = [item.model_dump(warnings=False) for item in response.output]
    going_on: list[Any] = [*HI, *items, *HI]
    seeded = {"seed": 7}  # without, now and then nothing but tokens that stand for no text
    assert client.responses.create(model=MODEL, input=going_on, max_output_tokens=5, extra_body=seeded).output


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_tool_is_called(client: OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"messages": HI, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    asked |= {"model": MODEL, "max_tokens": 200, "seed": 5}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "paint"
    Wall.model_validate_json(call.function.arguments)
    name, arguments = "", ""
    for chunk in client.chat.completions.create(stream=True, **asked):
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == ("paint", call.function.arguments)
    going_on = [*HI, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert client.chat.completions.create(model=MODEL, messages=going_on, tools=[TOOL], max_tokens=5).choices
    with client.chat.completions.stream(**asked) as stream:
        joined = stream.get_final_completion().choices[0].message
    assert joined.tool_calls is not None
    assert joined.tool_calls[0].function.arguments == call.function.arguments
    for sent in (joined, joined.model_dump()):
        going_on = [*HI, sent, {"role": "tool", "tool_call_id": joined.tool_calls[0].id, "content": "done"}]
        assert client.chat.completions.create(model=MODEL, messages=going_on, tools=[TOOL], max_tokens=5).choices


def test_a_class_beside_tools(client: OpenAI) -> None:
    """As agents ask: an answer of a class, unless a tool is called for."""
    tool: Any = openai.pydantic_function_tool(Wall, name="paint")
    for seed in range(6):
        asked: Any = {"model": MODEL, "messages": HI, "response_format": Wall, "tools": [tool], "max_tokens": 300}
        asked |= {"temperature": 1.0, "seed": seed}
        if seed % 2:  # what calls begin with
            asked["logit_bias"] = {TOKENS.index("<"): -100}
        message = client.chat.completions.parse(**asked).choices[0].message
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0].message
        assert (streamed.content or None, streamed.parsed) == (message.content or None, message.parsed)
        arguments = [call.function.parsed_arguments for call in message.tool_calls or ()]
        assert [call.function.parsed_arguments for call in streamed.tool_calls or ()] == arguments
        assert all(isinstance(each, Wall) for each in arguments or [message.parsed])
        assert bool(arguments) != bool(message.parsed)
        assert not (seed % 2 and arguments)


def test_embeddings(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["Hi", "Hi", "Ho"])
    one, same, other = (item.embedding for item in answer.data)
    assert one == same != other
    assert sum(value * value for value in one) == pytest.approx(1, abs=1e-4)
    plain = client.embeddings.create(model=MODEL, input="Hi", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(one)


def test_responses(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Hi", "max_output_tokens": 24, "temperature": 1.0}
    asked["extra_body"] = {"seed": 7}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text
    assert whole.usage is not None
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    parsed = client.responses.parse(model=MODEL, input="Hi", text_format=Wall, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Wall)


def test_errors_have_their_class(server: ServerProcess, client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as stranger:
        stranger.models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_request")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 1000}])
    assert caught.value.code == "context_length_exceeded"


def test_async_answers_are_the_same(server: ServerProcess, client: OpenAI) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as other:
            streams = [stream(other) for _ in range(4)]
            return await asyncio.gather(*streams)

    async def stream(other: AsyncOpenAI) -> str:
        text = ""
        async for chunk in await other.chat.completions.create(messages=HI, stream=True, **SEEDED):
            text += chunk.choices[0].delta.content or ""
        return text

    whole = client.chat.completions.create(messages=HI, **SEEDED).choices[0].message.content
    assert asyncio.run(ask()) == [whole] * 4


def unfinished(server: ServerProcess) -> float:
    """How many requests the engine has begun and not ended."""
    text = server.text("/metrics", Authorization=f"Bearer {KEY}")
    (line,) = [line for line in text.splitlines() if line.startswith("pellucid_num_requests_unfinished ")]
    return float(line.split()[1])


def test_a_stream_that_is_left_ends_at_the_server(full_server: ServerProcess) -> None:
    with OpenAI(base_url=f"{full_server.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        endless: dict[str, Any] = {"model": MODEL, "extra_body": {"ignore_eos": True}, "max_tokens": 900}
        with client.chat.completions.create(messages=HI, stream=True, **endless) as stream:
            next(iter(stream))
        deadline = time.monotonic() + SECONDS
        while unfinished(full_server):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_too_many_requests_and_too_long_ones(full_server: ServerProcess) -> None:
    """One is computed until its time is up, one waits, and the others are told so."""

    async def ask(number: int) -> str:
        try:
            async with AsyncOpenAI(base_url=f"{full_server.url}/v1", api_key=KEY, max_retries=0) as client:
                body = {"ignore_eos": True, "n": 1}
                await client.chat.completions.create(
                    model=MODEL, messages=HI, max_tokens=900, extra_body=body, timeout=SECONDS
                )
        except openai.RateLimitError as error:
            return f"429 {error.code}, again in {error.response.headers['retry-after']} s"
        except openai.InternalServerError as error:
            return f"{error.status_code} {error.code}"
        return "200"

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(number) for number in range(8)))

    outcomes = asyncio.run(ask_all())
    assert "429 queue_full, again in 1 s" in outcomes
    assert set(outcomes) <= {"200", "429 queue_full, again in 1 s", "504 deadline_exceeded"}


def test_a_client_that_does_not_wait(full_server: ServerProcess) -> None:
    with (
        OpenAI(base_url=f"{full_server.url}/v1", api_key=KEY, max_retries=0, timeout=0.05) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(model=MODEL, messages=HI, max_tokens=900, extra_body={"ignore_eos": True})


def test_a_model_that_can_be_understood(real_server: ServerProcess) -> None:
    with OpenAI(base_url=f"{real_server.url}/v1", api_key=KEY, timeout=SECONDS) as client:
        question: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=DEFAULT_MODEL, messages=question, temperature=0, max_tokens=30)
        assert "Paris" in (answer.choices[0].message.content or "")
