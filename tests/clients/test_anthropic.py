"""The `anthropic` client, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool

from tests.clients.conftest import KEY
from tests.support.server_process import MODEL, SECONDS, ServerProcess

HI: list[Any] = [{"role": "user", "content": "Hi"}]
SEEDED: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "extra_body": {"seed": 7, "temperature": 1.0}}
TOOL: Any = {
    "name": "paint",
    "description": "Paints the wall",
    "input_schema": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "twice": {"type": "boolean"}},
        "required": ["colour", "twice"],
    },
}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_stream_is_the_answer(client: Anthropic) -> None:
    whole = client.messages.create(messages=HI, system="Be brief", **SEEDED)
    with client.messages.stream(messages=HI, system="Be brief", **SEEDED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == text_of(final)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tokens_are_counted_as_they_are_used(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=HI).input_tokens
    usage = client.messages.create(messages=HI, **SEEDED).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_tool_is_called(client: Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    asked: dict[str, Any] = {**SEEDED, "max_tokens": 200, "messages": HI, "tools": [TOOL], "tool_choice": choice}
    message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "paint"
    assert call.input["colour"] in ("red", "green")
    with client.messages.stream(**asked) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    going_on = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model=MODEL, messages=going_on, tools=[TOOL], max_tokens=5).type == "message"


def test_tools_are_run(client: Anthropic) -> None:
    """The client asks for the conversation to be kept, is told that it is not, and sends it whole from there on."""
    painted: list[str] = []

    @beta_tool
    def paint(colour: Literal["red", "green"]) -> str:
        """Paints the wall.

        Args:
            colour: of the paint
        """
        painted.append(colour)
        return "done"

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=200, messages=HI, tools=[paint], tool_choice={"type": "any"}, max_iterations=2
    )
    assert runner.until_done().stop_reason in ("tool_use", "max_tokens")
    assert painted


def test_errors_have_their_class(server: ServerProcess, client: Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError), Anthropic(base_url=server.url, api_key="wrong") as stranger:
        stranger.messages.create(messages=HI, **SEEDED)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", messages=HI, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model=MODEL, messages=HI, max_tokens=5, extra_body={"temperature": -1})
    assert "temperature" in caught.value.message


def test_async_answers_are_the_same(server: ServerProcess, client: Anthropic) -> None:
    async def ask() -> list[str]:
        async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=SECONDS) as other:
            return await asyncio.gather(*(stream(other) for _ in range(4)))

    async def stream(other: AsyncAnthropic) -> str:
        async with other.messages.stream(messages=HI, **SEEDED) as stream:
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == [text_of(client.messages.create(messages=HI, **SEEDED))] * 4
