from __future__ import annotations

import asyncio
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid.client.load import generator
from pellucid.client.load.arrivals import Concurrency, Load, Rate
from pellucid.client.load.generator import Extent, LoadGenerator, LoadResult, Work
from pellucid.client.load.own_cost import OwnCost
from pellucid.client.load.record import ABORTED, COMPLETED
from pellucid.client.openai import OpenAIClient, Usage
from tests.support.fake_api_server import FakeApiServer, FakeReply, FakeRequest, Script, telling, text_chunk

PATIENCE = 60  # seconds
WORK = Work("chat", "fake", 4)


def put(
    script: Script, load: Load, extent: Extent, work: Work = WORK, **options: Any
) -> tuple[LoadResult, FakeApiServer]:
    async def run(url: str) -> LoadResult:
        client = OpenAIClient(url, read_timeout=PATIENCE)
        prompts = (f"prompt {number}" for number in itertools.count())
        async with asyncio.timeout(PATIENCE):
            try:
                return await LoadGenerator(client, work, prompts, **options).run(load, extent)
            finally:
                await client.aclose()

    with FakeApiServer(script) as server:
        return asyncio.run(run(server.url)), server


def test_requests_of_a_fixed_concurrency() -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        # Nobody is answered until three are there, and nobody is the fourth.
        while server_of[0].most_under_way < 3:
            await asyncio.sleep(0.001)
        await telling("a", "b")(request, reply)

    server_of: list[FakeApiServer] = []

    async def run(server: FakeApiServer) -> LoadResult:
        prompts = (f"prompt {number}" for number in itertools.count())
        client = OpenAIClient(server.url)
        return await LoadGenerator(client, WORK, prompts).run(Concurrency(3), Extent(requests=10))

    with FakeApiServer(script) as server:
        server_of.append(server)
        result = asyncio.run(run(server))
    assert server.most_under_way == 3
    assert server.connections == 3
    assert {request.body["messages"][0]["content"] for request in server.requests} == {f"prompt {i}" for i in range(10)}
    assert len(result.records) == 10
    for record in result.records:
        assert record.outcome == COMPLETED
        assert (record.usage, record.finish_reason) == (Usage(7, 2), "stop")
        assert record.started <= record.event_times[0] <= record.event_times[1] <= record.ended


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_bodies(endpoint: Any) -> None:
    work = Work(endpoint, "fake", 4, {"ignore_eos": True, "temperature": 0.5})
    _, server = put(telling("a"), Concurrency(1), Extent(requests=1), work)
    asked = (
        {"prompt": "prompt 0"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "prompt 0"}]}
    )
    assert server.requests[0].body == {
        "model": "fake",
        **asked,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.5,
    }


def test_requests_of_a_rate_do_not_wait_for_one_another() -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        while server_of[0].under_way < 8 and server_of[0].most_under_way < 8:
            await asyncio.sleep(0.001)
        await telling("a")(request, reply)

    server_of: list[FakeApiServer] = []

    async def run(server: FakeApiServer, load: Load) -> LoadResult:
        prompts = (f"prompt {number}" for number in itertools.count())
        async with asyncio.timeout(PATIENCE):
            return await LoadGenerator(OpenAIClient(server.url), WORK, prompts).run(load, Extent(requests=8))

    for load in (Rate(math.inf), Rate(200.0)):
        with FakeApiServer(script) as server:
            server_of[:] = [server]
            assert len(asyncio.run(run(server, load)).records) == 8


@pytest.mark.parametrize("load", [Concurrency(2), Rate(100.0)])
def test_for_some_seconds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()  # of a clock that moves by a millisecond each time it is read
    monkeypatch.setattr(generator, "time", SimpleNamespace(perf_counter=lambda: next(readings) / 1000))
    result, server = put(telling("a"), load, Extent(seconds=0.3))
    assert result.records
    assert len(result.records) == len(server.requests)
    if isinstance(load, Rate):
        due = itertools.accumulate(load.gaps("0 arrivals"))
        assert len(result.records) <= sum(1 for _ in itertools.takewhile(lambda seconds: seconds < 0.3, due))
    else:
        assert max(record.started for record in result.records) <= 0.3


def test_aborted_requests_disconnect_at_points_all_over_the_answer() -> None:
    left: list[bool] = []

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        if int(request.body["messages"][0]["content"].split()[1]) % 2:
            await reply.until_client_leaves()  # nothing comes: only an early disconnection ends this
        for _ in range(4):
            await reply.event(text_chunk(request, "a"))
        await reply.until_client_leaves()
        left.append(True)

    work = Work("chat", "fake", 4, abort_share=1.0)

    async def run(url: str) -> LoadResult:
        client = OpenAIClient(url, read_timeout=0.5)
        prompts = (f"prompt {number}" for number in itertools.count())
        return await LoadGenerator(client, work, prompts, seed=1).run(Concurrency(16), Extent(requests=64))

    with FakeApiServer(script) as server:
        result = asyncio.run(run(server.url))
    aborted = [record for record in result.records if record.outcome == ABORTED]
    assert len(aborted) >= 32
    assert {len(record.event_times) for record in aborted} >= {0, 1, 2, 3, 4}
    # What else ended is what nobody answered, where the client had wanted to hear something first.
    assert {record.outcome for record in result.records} == {ABORTED, "server_timeout"}


def test_the_share_of_aborts() -> None:
    work = Work("chat", "fake", 4, abort_share=0.25)
    points = [LoadGenerator(None, work, iter(()), seed=7)._abort_point() for _ in range(1)]  # type: ignore[arg-type]
    drawn = LoadGenerator(None, work, iter(()), seed=7)  # type: ignore[arg-type]
    several = [drawn._abort_point() for _ in range(4000)]
    assert several[0] == points[0]
    assert sum(point is not None for point in several) / 4000 == pytest.approx(0.25, abs=0.03)


def test_errors_do_not_end_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "PAUSE_AFTER_ERROR", 0.0)

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        number = int(request.body["messages"][0]["content"].split()[1])
        if number % 4 == 0:
            await reply.json({"error": {"message": "full"}}, 429, {"Retry-After": "1"})
        elif number % 4 == 1:
            await reply.begin_events()
            await reply.event(text_chunk(request, "a"))
            reply.reset()
        elif number % 4 == 2:
            await reply.begin_events()
            await reply.event({"error": {"message": "broke"}})
            await reply.end_events()
        else:
            await telling("a")(request, reply)

    for load in (Concurrency(3), Rate(math.inf)):
        result, _ = put(script, load, Extent(requests=20))
        outcomes = [record.outcome for record in result.records]
        assert {outcome: outcomes.count(outcome) for outcome in outcomes} == {
            "429": 5,
            "connection_lost": 5,
            "error_event": 5,
            COMPLETED: 5,
        }
        assert sum(record.has_retry_after for record in result.records) == 5


def test_a_lagging_loop_is_noticed() -> None:
    async def run() -> OwnCost:
        import time

        with OwnCost() as cost:
            for _ in range(3):
                await asyncio.sleep(0.03)
                time.sleep(0.2)
            await asyncio.sleep(0.03)
        return cost

    cost = asyncio.run(run())
    assert cost.lag_p99 > 0.1
    assert cost.seconds > 0.6
