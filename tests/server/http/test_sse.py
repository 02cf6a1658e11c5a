"""Server-sent events over a real connection: whole, in order, kept alive, ended once, and closed with the client."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.core.errors import InvalidRequestError, PellucidError
from pellucid.server.app import ContainDefects
from pellucid.server.http import chunks
from pellucid.server.http.sse import HEARTBEAT, EventStream, event
from pellucid.server.settings import ServerSettings
from tests.support.raw_http import PATIENCE, RawServer, request, serving_http

Events = AsyncGenerator[bytes, None]
DATA = [event(b"%d" % number + b"x" * number * 100) for number in range(200)]


def tell(error: PellucidError) -> bytes:
    return event(f"failed: {error.message}".encode()) + event(b"[DONE]")


def stream(events: Callable[[], Events], test: Callable[[RawServer], Awaitable[None]], heartbeat: float = 60) -> None:
    """Runs `test` with a server that answers everything with `events`."""

    async def answer(request: Request) -> Response:
        return EventStream(events(), tell, heartbeat_seconds=heartbeat)

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    app.add_middleware(ContainDefects)

    async def run() -> None:
        async with serving_http(app, ServerSettings(model="m")) as server:
            await test(server)

    asyncio.run(run())


async def all_events() -> Events:
    for data in DATA:
        yield data
        await asyncio.sleep(0)


@pytest.mark.parametrize("has_short_way", [True, False])
def test_events_arrive_whole_and_the_connection_goes_on(monkeypatch: pytest.MonkeyPatch, has_short_way: bool) -> None:
    taken = []
    offer = chunks.chunk_writer
    if has_short_way:
        monkeypatch.setattr("pellucid.server.http.sse.chunk_writer", lambda scope: taken.append(1) or offer(scope))
    else:
        monkeypatch.setattr("pellucid.server.http.sse.chunk_writer", lambda scope: None)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        for _ in range(3):
            await client.send(request())
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"".join(DATA))
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["transfer-encoding"] == "chunked"
        client.close()

    stream(all_events, test)
    assert len(taken) == (3 if has_short_way else 0)


def test_where_there_are_no_chunks_there_is_no_short_way() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request().replace(b"HTTP/1.1", b"HTTP/1.0"))
        _, _, body = (await client.closed()).partition(b"\r\n\r\n")
        assert body == b"".join(DATA)
        client.close()

    stream(all_events, test)


def test_a_failure_before_the_first_event_is_an_answer_of_its_own() -> None:
    async def refused() -> Events:
        raise InvalidRequestError("no", param="top_p")
        yield b""

    async def test(server: RawServer) -> None:
        answer = await server.ask(request())
        assert (answer.status, answer.error["param"]) == (400, "top_p")

    stream(refused, test)


@pytest.mark.parametrize(
    ("error", "told"), [(InvalidRequestError("no"), b"failed: no"), (KeyError("secret"), b"failed: internal error")]
)
def test_a_later_failure_is_told_by_the_last_event(error: Exception, told: bytes) -> None:
    async def failing() -> Events:
        yield DATA[0]
        raise error

    async def test(server: RawServer) -> None:
        answer = await server.ask(request())
        assert answer.status == 200
        assert answer.body.startswith(DATA[0] + b"data: " + told)
        assert answer.body.endswith(event(b"[DONE]"))
        assert answer.body.count(b"[DONE]") == 1
        assert b"secret" not in answer.body

    stream(failing, test)


def test_a_defect_before_the_first_event_is_an_internal_error() -> None:
    async def defective() -> Events:
        raise KeyError("secret")
        yield b""

    async def test(server: RawServer) -> None:
        answer = await server.ask(request())
        assert answer.status == 500
        assert re.search("internal error [0-9a-f]{16}", answer.error["message"])
        assert b"secret" not in answer.body

    stream(defective, test)


def test_silence_is_filled_with_comments() -> None:
    go_on = asyncio.Event()

    async def slow() -> Events:
        await go_on.wait()
        yield DATA[1]
        go_on.clear()
        await go_on.wait()
        yield DATA[2]

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request())
        async with asyncio.timeout(PATIENCE):
            for _ in range(2):
                await client.reader.readuntil(HEARTBEAT)
                await client.reader.readuntil(HEARTBEAT)
                go_on.set()
                await client.reader.readuntil(b"data: ")
            await client.reader.readuntil(b"0\r\n\r\n")
        client.close()

    stream(slow, test, heartbeat=0.05)


def test_a_client_that_leaves_closes_the_events() -> None:
    closed = asyncio.Event()

    async def endless() -> Events:
        try:
            yield DATA[1]
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request())
        await client.reader.readuntil(DATA[1])
        client.close()
        async with asyncio.timeout(PATIENCE):
            await closed.wait()
            while server.state.tasks:
                await asyncio.sleep(0.01)

    stream(endless, test)


def test_a_slow_reader_is_waited_for() -> None:
    made = 0

    async def much() -> Events:
        nonlocal made
        for _ in range(1000):
            made += 1
            yield event(b"x" * 100_000)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request())
        before = -1
        while made != before:  # until nothing more is made
            before = made
            await asyncio.sleep(0.2)
        assert made < 500
        size, tail = 0, b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = await client.reader.read(1 << 20)
            assert data
            size, tail = size + len(data), (tail + data)[-10:]
        assert made == 1000
        assert size > 1000 * 100_000
        client.close()

    stream(much, test)
