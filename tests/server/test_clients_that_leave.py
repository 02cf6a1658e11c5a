"""Clients that leave, at every moment. After each: the books balance, nothing is left over, and the next request is
answered as ever (ServedEngine.check_well)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pellucid.server.generation import Generation
from pellucid.server.http.sse import EventStream
from tests.support.engines import load_fake_backend
from tests.support.gated_backend import GatedBackend
from tests.support.mutants import mutant
from tests.support.raw_http import request
from tests.support.served_engine import CHAT, COMPLETIONS, LONG, MARK, SHORT, ServedEngine, body_of, marked, run, until


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


@pytest.mark.parametrize("kind", ["close", "reset"])
@pytest.mark.parametrize("sent", [0, 1, 20, 60, -30, -1])
def test_a_client_that_leaves_before_its_request_is_whole(backend: GatedBackend, sent: int, kind: str) -> None:
    """Before its first byte, in the first line, in the headers, in the body, and one byte before its end."""

    async def test(server: ServedEngine) -> None:
        client = await server.http.connect()
        await client.send(request(body_of(marked(3)), path=COMPLETIONS)[:sent])
        await until(lambda: len(server.http.state.connections) == 1)
        client.close() if kind == "close" else client.writer.transport.abort()
        await until(lambda: not server.http.state.connections)
        await server.check_well()
        assert MARK not in backend.tokens_seen

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_leaves_while_queued(backend: GatedBackend, path: str, stream: bool) -> None:
    leave_while_queued(backend, path, stream)


def leave_while_queued(backend: GatedBackend, path: str, stream: bool, *, is_noticed: bool = True) -> None:
    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        first = asyncio.create_task(server.post(SHORT))
        await backend.arrived()
        fields = {"messages": [{"role": "user", "content": ";" * 9}]} if path == CHAT else {"prompt": [MARK] * 3}
        client = await server.begin({**fields, "max_tokens": 50, "stream": stream}, path)
        await until(lambda: len(server.engine._requests) == 2)
        client.close()
        await until(lambda: len(server.http.state.connections) == 1)
        if is_noticed:
            await until(lambda: len(server.http.state.tasks) == 1)
        backend.open()
        assert (await first).status == 200
        await server.check_well()
        assert MARK not in backend.tokens_seen, "somebody was computed who had left"

    run(test, max_num_seqs=1)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": False}, {"prompt": [[MARK] * 180, [MARK] * 70]}])
@pytest.mark.parametrize("forwards", [0, 1, 2, 3, 4, 9])
def test_a_client_that_leaves_while_it_is_computed(
    backend: GatedBackend, forwards: int, fields: dict[str, Any]
) -> None:
    """In any chunk of its prefill (three of 64 tokens), after its first token, and later; another goes on."""

    async def test(server: ServedEngine) -> None:
        other = json.loads((await server.post(LONG)).body)["choices"]
        backend.close_gate()
        client = await server.begin({**marked(180, stream=True), **fields})
        await backend.arrived()
        begun = backend.num_forwards
        backend.let(forwards)
        await until(lambda: backend.num_forwards == begun + forwards)
        beside = await server.begin({**LONG})
        await until(lambda: len(server.http.state.tasks) == 2)
        client.close()
        await until(lambda: len(server.http.state.tasks) == 1)
        backend.open()
        assert json.loads((await beside.answer()).body)["choices"] == other
        beside.close()
        assert backend.num_forwards - begun < 3 * 200
        await server.check_well()

    run(test)


@pytest.mark.parametrize("fields", [{}, {"n": 2, "stream_options": {"include_usage": True}}])
def test_a_client_that_leaves_between_the_last_token_and_the_terminal_event(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    ended = asyncio.Event()
    original = Generation.stream

    async def stream(self: Generation) -> AsyncIterator[Any]:
        async for tokens in original(self):
            yield tokens
        ended.set()
        await asyncio.Event().wait()

    async def test(server: ServedEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "stream", stream)
            left = await server.stream({**SHORT, **fields})
            await ended.wait()
            left.abort()
            await server.settled()
        await server.check_well()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_as_its_answer_ends(backend: GatedBackend, stream: bool) -> None:
    """The abort races the last steps, and the reply of the engine that of the server."""

    async def test(server: ServedEngine) -> None:
        for number in range(40):
            backend.close_gate()
            client = await server.begin(marked(3, max_tokens=3, stream=stream))
            await backend.arrived()
            backend.let(number % 3)
            for _ in range(number // 3):
                await asyncio.sleep(0)
            client.close() if number % 2 else client.writer.transport.abort()
            backend.open()
            await server.settled()
        await server.check_well()

    run(test)


def test_a_client_that_ends_its_side_is_gone(backend: GatedBackend) -> None:
    """As for every server on asyncio's streams: half a connection is none."""

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        client = await server.begin(marked(3, stream=True))
        await backend.arrived()
        client.writer.write_eof()
        await until(lambda: not server.http.state.tasks)
        backend.open()
        await server.check_well()
        client.close()

    run(test)


def test_a_mutant_that_does_not_see_clients_leave_is_caught(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = mutant(EventStream.__call__, "(sending, leaving), return_when=asyncio.FIRST_COMPLETED", "(sending,)")
    monkeypatch.setattr(EventStream, "__call__", changed)
    with pytest.raises(AssertionError, match="somebody was computed who had left"):
        leave_while_queued(backend, COMPLETIONS, True, is_noticed=False)
