"""Puts a load on a server, and notes what comes of each request."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pellucid.client.errors import ServerError
from pellucid.client.load.arrivals import Concurrency, Load, Rate
from pellucid.client.load.own_cost import OwnCost
from pellucid.client.load.prompts import Prompt
from pellucid.client.load.record import ABORTED, RequestRecord
from pellucid.client.openai import Endpoint, OpenAIClient

PAUSE_AFTER_ERROR = 0.1
"""Seconds that one of several clients waits after an error: a server that is gone is not asked a thousand times."""
EARLY_SECONDS = 0.2
"""A disconnection before the first output comes within so many seconds."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every request asks for.

    Attributes:
        endpoint: chat or completions.
        model: its name.
        max_tokens: tokens of each answer.
        fields: further fields of the body.
        abort_share: share of the requests that disconnect at a random point, instead of hearing the answer out.
    """

    endpoint: Endpoint
    model: str
    max_tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    abort_share: float = 0.0

    def body(self, prompt: Prompt) -> dict[str, Any]:
        if self.endpoint == "completions":
            asked: dict[str, Any] = {"prompt": prompt}
        else:
            asked = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        return {
            "model": self.model,
            **asked,
            "max_tokens": self.max_tokens,
            "stream_options": {"include_usage": True},
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a load lasts: so many requests, or as many as can be sent in so many seconds."""

    requests: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class AbortPoint:
    """Where a request disconnects: after so many events with output, or for 0 after so many seconds."""

    events: int
    seconds: float


@dataclass(slots=True)
class LoadResult:
    """What a load came to: every request that was sent, and what measuring cost."""

    records: list[RequestRecord]
    own_cost: OwnCost


class LoadGenerator:
    """Sends requests to one server.

    Args:
        prompts: one for each request.
        seed: of the moments at which requests are sent and aborted.
        on_record: told of each request that has ended.
    """

    def __init__(
        self,
        client: OpenAIClient,
        work: Work,
        prompts: Iterator[Prompt],
        *,
        seed: int | str = 0,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self._client = client
        self._work = work
        self._prompts = prompts
        self._seed = seed
        self._aborts = random.Random(f"{seed} aborts")
        self._on_record = on_record
        self._records: list[RequestRecord] = []
        self._sent = 0

    async def run(self, load: Load, extent: Extent) -> LoadResult:
        """Put `load` on the server until `extent` is reached, and wait for the last answer."""
        deadline = time.perf_counter() + (float("inf") if extent.seconds is None else extent.seconds)
        limit = float("inf") if extent.requests is None else extent.requests

        def claim() -> bool:
            """Whether one more request is to be sent, which then counts as sent."""
            if self._sent >= limit or time.perf_counter() >= deadline:
                return False
            self._sent += 1
            return True

        with OwnCost() as own_cost:
            if isinstance(load, Concurrency):
                await asyncio.gather(*(self._be_a_client(claim) for _ in range(load.clients)))
            else:
                await self._send_at(load, claim, deadline)
        return LoadResult(self._records, own_cost)

    async def _be_a_client(self, claim: Callable[[], bool]) -> None:
        while claim():
            record = await self._request()
            if record.error:
                await asyncio.sleep(PAUSE_AFTER_ERROR)

    async def _send_at(self, rate: Rate, claim: Callable[[], bool], deadline: float) -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for gap in rate.gaps(f"{self._seed} arrivals"):
                due += gap
                if due >= deadline or not claim():
                    return
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._request())

    async def _request(self) -> RequestRecord:
        body = self._work.body(next(self._prompts))
        point = self._abort_point()
        record = RequestRecord(time.perf_counter())
        try:
            if point is not None and point.events == 0:
                async with asyncio.timeout(point.seconds):
                    await self._read_answer(body, record, None)
            else:
                await self._read_answer(body, record, None if point is None else point.events)
        except TimeoutError:
            record.outcome = ABORTED
        except ServerError as error:
            record.fail(error)
        record.ended = time.perf_counter()
        self._records.append(record)
        self._on_record(record)
        return record

    async def _read_answer(self, body: dict[str, Any], record: RequestRecord, abort_after: int | None) -> None:
        async with self._client.stream(self._work.endpoint, body) as stream:
            async for chunk in stream:
                if chunk.has_output:
                    record.event_times.append(time.perf_counter())
                    if len(record.event_times) == abort_after:
                        record.outcome = ABORTED
                        return
                record.finish_reason = chunk.finish_reason or record.finish_reason
                record.usage = chunk.usage or record.usage

    def _abort_point(self) -> AbortPoint | None:
        """Where the next request disconnects; one in four of those that do, before anything came."""
        if self._aborts.random() >= self._work.abort_share:
            return None
        is_early = self._aborts.random() < 0.25
        seconds = self._aborts.uniform(0, EARLY_SECONDS)
        return AbortPoint(0 if is_early else self._aborts.randint(1, self._work.max_tokens), seconds)
