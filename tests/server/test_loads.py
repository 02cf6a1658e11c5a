"""Many clients at once: those who leave, those who do not read, those who are too many. All by counting; how long it
takes is for benchmarks to say."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import pytest

from pellucid.engine.async_engine import AsyncEngine
from pellucid.engine.scheduler import Scheduler
from pellucid.server.http import protocol
from tests.support.engines import load_fake_backend
from tests.support.gated_backend import GatedBackend
from tests.support.raw_http import RawClient, request
from tests.support.served_engine import (
    CHAT,
    COMPLETIONS,
    LONG,
    SHORT,
    OpenStream,
    ServedEngine,
    body_of,
    check_events,
    run,
    until,
)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


# Clients that leave


async def leave_at_random(server: ServedEngine, rng: random.Random) -> int:
    """One request, and away: with some of it sent, at once, after the head of the answer, or after some events. How
    many tokens it asked for."""
    path = rng.choice([COMPLETIONS, CHAT])
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 1000]), "n": rng.choice([1, 1, 2]), "ignore_eos": True}
    body["stream"] = rng.random() < 0.7
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "hello" * rng.randrange(1, 40)}]
    else:
        body["prompt"] = [rng.randrange(1, 60)] * rng.randrange(1, 200)
    client = await server.http.connect()
    whole = request(body_of(body), path=path)
    if rng.random() < 0.2:
        await client.send(whole[: rng.randrange(len(whole))])
    else:
        await client.send(whole)
        if rng.random() < 0.5 and body["stream"]:
            stream = OpenStream(client, *await client.head())
            for _ in range(rng.randrange(4)):
                await stream.next_events()
    await asyncio.sleep(rng.choice([0, 0, 0.001, 0.01]))
    client.close() if rng.random() < 0.5 else client.writer.transport.abort()
    max_tokens: int = body["max_tokens"]
    return max_tokens


async def storm(server: ServedEngine, count: int) -> None:
    """`count` clients that leave, up to 32 at a time."""
    seeds = iter(range(count))
    before = server.engine.metrics().counters
    asked: list[int] = []

    async def leave_one_after_the_other() -> None:
        for seed in seeds:
            asked.append(await leave_at_random(server, random.Random(seed)))

    await asyncio.gather(*(leave_one_after_the_other() for _ in range(32)))
    await server.get("/health")  # by now the connections before it were taken up
    await server.settled()
    counters = server.engine.metrics().counters
    num_finished = counters.requests_finished - before.requests_finished
    num_short = sum(max_tokens < 1000 for max_tokens in asked)
    assert num_finished <= num_short, "who left was computed to the end"
    assert counters.requests_aborted > 0, "who left was computed to the end"
    assert (counters.requests_failed, counters.requests_refused) == (0, 0)


def test_a_storm_of_clients_that_leave(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        before = (await server.post(LONG)).body
        await storm(server, 1000)
        await server.check_well()
        assert json.loads((await server.post(LONG)).body)["choices"] == json.loads(before)["choices"]

    run(test, max_num_seqs=8, kv_cache_memory=200_000)


def test_a_mutant_that_aborts_nothing_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncEngine, "_drop", lambda self, request: setattr(request, "is_dropped", True))
    with pytest.raises(AssertionError, match="computed to the end"):
        run(lambda server: storm(server, 20), survives=False, max_num_seqs=8)


# Clients that are many


def test_any_number_of_requests_at_once(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        bodies = [
            {**SHORT, "prompt": [1 + number % 50] * (1 + number), "seed": number, "temperature": number % 2}
            for number in range(128)
        ]
        alone = [json.loads((await server.post(body)).body)["choices"] for body in bodies]

        async def streamed(body: dict[str, Any]) -> Any:
            stream = await server.stream(body)
            events = check_events(await stream.rest())
            text = "".join(event["choices"][0]["text"] for event in events)
            return [{**events[-1]["choices"][0], "text": text}]

        async def whole(body: dict[str, Any]) -> Any:
            answer = await server.post(body)
            assert answer.status == 200, answer.body
            return json.loads(answer.body)["choices"]

        for concurrency in (1, 2, 4, 8, 16, 32, 64, 128):
            asked = [(whole, streamed)[number % 2](bodies[number]) for number in range(concurrency)]
            assert await asyncio.gather(*asked) == alone[:concurrency]

    run(test, max_num_seqs=16)


async def crowd(server: ServedEngine, backend: GatedBackend) -> None:
    """One request runs, three wait, and all further ones are refused until there is room."""
    backend.close_gate()
    clients = [await server.begin(LONG)]
    await backend.arrived()
    for number in range(40):
        clients.append(await server.begin({**LONG, "stream": number % 2 == 0}))
    answering = [asyncio.create_task(client.answer()) for client in clients]
    await until(lambda: sum(task.done() for task in answering) == 37)
    refused = [task.result() for task in answering if task.done()]
    assert [answer.status for answer in refused] == [429] * 37
    assert {answer.error["code"] for answer in refused} == {"queue_full"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert (await server.get("/health")).status == 200
    backend.open()
    answers = await asyncio.gather(*answering)
    assert sorted(answer.status for answer in answers) == [200] * 4 + [429] * 37
    for client in clients:
        client.close()


def test_a_full_queue_refuses_and_says_when_to_come_again(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        for _ in range(2):
            await crowd(server, backend)
            await server.settled()
            while backend.arrivals.acquire(blocking=False):
                pass

    run(test, max_num_seqs=1, max_waiting=3)


def test_a_mutant_that_queues_without_end_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "check_queue", lambda self, num_coming=0: None)

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        clients = [await server.begin(LONG) for _ in range(6)]
        await until(lambda: len(server.engine._requests) == 6 or len(server.http.state.tasks) == 4)
        assert len(server.http.state.tasks) == 4, "more wait than may"
        for client in clients:
            client.close()

    with pytest.raises(AssertionError, match="more wait than may"):
        run(test, survives=False, max_num_seqs=1, max_waiting=3)


# Clients that do not read

UNREAD = {**LONG, "max_tokens": 600, "return_token_ids": True, "stream": True}
MAX_BUFFERED = 64 * 1024


async def slow_reader(server: ServedEngine, body: dict[str, Any]) -> RawClient:
    """A client that has sent a request, on a connection that takes in next to nothing until it is read."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", server.http.port))
    client = RawClient(*await asyncio.open_connection(sock=narrow, limit=1024))
    address = narrow.getsockname()

    def other_ends() -> list[Any]:
        transports: list[Any] = [connection.transport for connection in server.http.state.connections]  # type: ignore[union-attr]
        return [each for each in transports if each.get_extra_info("peername") == address]

    await until(lambda: len(other_ends()) == 1)
    (other_end,) = other_ends()
    other_end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    other_end.set_write_buffer_limits(high=4096)
    await client.send(request(body_of(body), path=COMPLETIONS))
    await until(lambda: any(asked.stream for asked in server.engine._requests.values()))
    return client


def num_paused(server: ServedEngine) -> int:
    return server.engine.metrics().paused_sequences


def check_buffers(server: ServedEngine) -> None:
    """No answer takes more memory than it may, whoever does not read it."""
    for asked in server.engine._requests.values():
        assert asked.num_unread <= server.engine._max_unread_tokens + 1
    for connection in server.http.state.connections:
        assert connection.transport.get_write_buffer_size() < MAX_BUFFERED  # type: ignore[union-attr]


async def all_at_once(server: ServedEngine, backend: GatedBackend) -> tuple[int, list[Any]]:
    """Eight who read their answers, which are computed together however far apart they asked: how many steps that took,
    and the answers."""
    fast = [{**LONG, "seed": number, "temperature": 1} for number in range(8)]
    num_others, begun = len(server.engine._requests), backend.num_forwards
    backend.close_gate()
    asking = [asyncio.create_task(server.post(body)) for body in fast]
    await server.handed_over(num_others + len(fast))
    backend.open()
    answers = [json.loads(answer.body)["choices"] for answer in await asyncio.gather(*asking)]
    return backend.num_forwards - begun, answers


async def hold_up(server: ServedEngine, backend: GatedBackend, count: int) -> None:
    """Others get their answers, in as many steps as without them, while `count` clients do not read theirs."""
    num_steps, alone = await all_at_once(server, backend)
    slow = [await slow_reader(server, {**UNREAD, "prompt": [1 + number % 50] * 3}) for number in range(count)]
    await until(lambda: num_paused(server) == count)
    check_buffers(server)
    num_steps_beside, beside = await all_at_once(server, backend)
    assert num_steps_beside <= num_steps + 8, "slow readers are computed"
    assert beside == alone
    assert num_paused(server) == count
    check_buffers(server)
    for number, client in enumerate(slow):
        if number % 50:
            client.close()
        else:  # at last it reads
            bodies = check_events(await OpenStream(client, *await client.head()).rest())
            assert sum(len(body["choices"][0]["token_ids"]) for body in bodies) == UNREAD["max_tokens"]


def test_a_hundred_clients_that_do_not_read_hold_up_nobody(backend: GatedBackend) -> None:
    run(lambda server: hold_up(server, backend, 100), max_num_seqs=16, kv_cache_memory=400_000)


def test_a_mutant_that_computes_for_nobody_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncEngine, "_pause", lambda self, request: None)

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        client = await slow_reader(server, UNREAD)
        backend.open()
        await until(lambda: not server.engine._requests or num_paused(server) == 1)
        assert num_paused(server) == 1, "it ran on"
        client.close()

    with pytest.raises(AssertionError, match="it ran on"):
        run(test, survives=False)


def test_a_client_that_never_reads_is_dropped(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.2)

    async def test(server: ServedEngine) -> None:
        client = await slow_reader(server, UNREAD)
        await server.settled()
        counters = server.engine.metrics().counters
        assert counters.requests_aborted == 1
        await server.check_well()
        client.close()

    run(test)
