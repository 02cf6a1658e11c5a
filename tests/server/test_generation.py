"""Errors of a grammar that a request did not write itself name what it did write."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
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

    async def read(self) -> Any:
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
