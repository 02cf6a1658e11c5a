"""The prompts of one request body that are to become vectors, with the engine."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from pellucid.core.outputs import EmbeddingOutput
from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.errors import DeadlineError
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.openai.embeddings import PoolingRequest
from pellucid.server.serving import serving_of
from pellucid.server.settings import ServerSettings


async def embed_all(request: Request, asked: PoolingRequest) -> list[EmbeddingOutput]:
    """One output for each prompt of `asked`, the body of `request`. Those that run are aborted when the client leaves,
    when one fails, and when the time is up.

    Raises:
        NotReadyError: the model is not loaded.
        PellucidError: one of them was refused or failed.
        DeadlineError: the time was up.
        starlette.requests.ClientDisconnect: the client left.
    """
    serving = serving_of(request)
    settings = serving.settings
    salt = request.state.api_key if settings.per_key_cache_salt else ""
    work = _embed_all(serving.engine, asked, salt + asked.cache_salt, _num_at_once(settings))
    try:
        async with asyncio.timeout(settings.request_timeout):
            outputs = await unless_disconnected(request, work)
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


async def _embed_all(engine: AsyncEngine, asked: PoolingRequest, salt: str, num_at_once: int) -> list[EmbeddingOutput]:
    outputs: dict[int, EmbeddingOutput] = {}
    to_come = iter(enumerate(asked.prompts))

    async def embed_some() -> None:
        for place, prompt in to_come:
            outputs[place] = await engine.embed(
                prompt,
                pooling=asked.params.pooling,
                normalize=asked.params.normalize,
                priority=asked.priority,
                cache_salt=salt,
            )

    running = [asyncio.create_task(embed_some()) for _ in range(min(num_at_once, len(asked.prompts)))]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [outputs[place] for place in range(len(asked.prompts))]
