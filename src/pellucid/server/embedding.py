"""The prompts of one request body that are to be read and not continued, with the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from pellucid.core.outputs import EmbeddingOutput, LabelOutput
from pellucid.server.errors import DeadlineError
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.openai.embeddings import PoolingRequest
from pellucid.server.serving import serving_of
from pellucid.server.settings import ServerSettings

Output = TypeVar("Output", EmbeddingOutput, LabelOutput)


async def embed_all(request: Request, asked: PoolingRequest) -> list[EmbeddingOutput]:
    """An embedding for each prompt of `asked`, the body of `request`. What runs is aborted when the client leaves, when
    one of them fails, and when the time is up.

    Raises:
        NotReadyError: the model is not loaded.
        PellucidError: one of them was refused or failed.
        DeadlineError: the time was up.
        starlette.requests.ClientDisconnect: the client left.
    """
    engine = serving_of(request).engine
    params = asked.params
    return await _read_all(
        request, asked, partial(engine.embed, pooling=params.pooling, normalize=params.normalize), num_first=0
    )


async def label_all(request: Request, asked: PoolingRequest) -> list[LabelOutput]:
    """As `embed_all`, the log-probabilities of labels. The first prompt goes ahead: the others, which have a long
    beginning in common with it, then find that in the prefix cache."""
    engine = serving_of(request).engine
    run = partial(engine.label_logprobs, label_token_ids=asked.params.label_token_ids)
    return await _read_all(request, asked, run, num_first=1)


async def _read_all(
    request: Request, asked: PoolingRequest, run: Callable[..., Coroutine[Any, Any, Output]], *, num_first: int
) -> list[Output]:
    settings = serving_of(request).settings
    salt = request.state.api_key if settings.per_key_cache_salt else ""
    run = partial(run, priority=asked.priority, cache_salt=salt + asked.cache_salt)
    at_once = _num_at_once(settings)

    async def run_all() -> list[Output]:
        first = await _run_all(asked.prompts[:num_first], run, at_once)
        return first + await _run_all(asked.prompts[num_first:], run, at_once)

    try:
        async with asyncio.timeout(settings.request_timeout):
            outputs = await unless_disconnected(request, run_all())
    except TimeoutError:
        raise DeadlineError(
            f"{len(asked.prompts)} prompts took longer than the {settings.request_timeout:g} s that a request may "
            "take: send fewer at once, or try again when less is going on"
        ) from None
    request.state.pooled = outputs
    return outputs


def _num_at_once(settings: ServerSettings) -> int:
    """Prompts of one request that the engine has at a time: as many wait as run, and others find room in the queue."""
    most = 2 * settings.max_num_seqs
    return most if settings.max_waiting is None else min(most, max(1, settings.max_waiting // 2))


async def _run_all(
    prompts: list[list[int]], run: Callable[[list[int]], Coroutine[Any, Any, Output]], num_at_once: int
) -> list[Output]:
    outputs: dict[int, Output] = {}
    to_come = iter(enumerate(prompts))

    async def run_some() -> None:
        for place, prompt in to_come:
            outputs[place] = await run(prompt)

    running = [asyncio.create_task(run_some()) for _ in range(min(num_at_once, len(prompts)))]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [outputs[place] for place in range(len(prompts))]
