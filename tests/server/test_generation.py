"""Errors of a grammar that a request did not write itself name what it did write; how many tokens come together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import TokenOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.chat.tools import ChatTurn
from pellucid.server.generation import Generation
from pellucid.server.openai.requests import GenerationRequest


class Refusing:
    """An engine that refuses a grammar, or the stream of one."""

    error = InvalidRequestError(
        'structured_outputs.structural_tag: Unimplemented keys: ["not"]', param="structured_outputs"
    )

    async def complete(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self

    async def read(self, num_wanted: int = 1) -> Any:
        raise self.error

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [ChatTurn(), ChatTurn(callable_names=("f",))])
def test_a_grammar_that_tools_asked_for_is_blamed_on_them(stream: bool, chat: ChatTurn) -> None:
    request = GenerationRequest("m", [[1]], SamplingParams(), True, False, chat=chat)
    generation = Generation(Refusing(), request, "r")  # type: ignore[arg-type]

    async def run() -> None:
        if not stream:
            await generation.complete()
        async for _ in generation.stream():
            pass

    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(run())
    assert caught.value.param == ("tools" if chat.callable_names else "structured_outputs")
    assert caught.value.message.endswith('Unimplemented keys: ["not"]')


class Counting:
    """An engine whose stream notes how many tokens are waited for."""

    def __init__(self) -> None:
        self.wanted: list[int] = []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.request_output = None
        return self

    async def read(self, num_wanted: int = 1) -> list[TokenOutput]:
        self.wanted.append(num_wanted)
        return [TokenOutput("r", 0, 1, "a")] if len(self.wanted) < 4 else []

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_the_first_token_comes_at_once_and_others_together(num_prompts: int) -> None:
    request = GenerationRequest("m", [[1]] * num_prompts, SamplingParams(n=2), False, False)
    engine = Counting()

    async def run() -> None:
        async for _ in Generation(engine, request, "r", stream_interval=5).stream():  # type: ignore[arg-type]
            pass

    asyncio.run(run())
    assert engine.wanted[:num_prompts] == [1] * num_prompts
    assert set(engine.wanted[num_prompts:]) == {10}
