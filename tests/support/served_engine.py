"""A server and its engine in the event loop of a test, which can look into both and talks to them over sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.app import create_app
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from tests.support.raw_http import PATIENCE, Answer, RawClient, RawServer, request, serving_http

MODEL = "tiny"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PROBE = {"prompt": "how are you", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
MARK = 60
"""A token that only the request has that is to fail or to leave."""
LONG = {"prompt": "once upon", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "banned_token_ids": [MARK]}
SHORT = {**LONG, "max_tokens": 4}


def body_of(body: dict[str, Any]) -> bytes:
    return json.dumps({"model": MODEL, **body}).encode()


def marked(num_tokens: int, **fields: Any) -> dict[str, Any]:
    """LONG, with a prompt of `num_tokens` MARKs."""
    return {**LONG, "prompt": [MARK] * num_tokens, **fields}


async def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition` has come about."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


class OpenStream:
    """An answer that is being streamed.

    Attributes:
        status, headers: of the answer.
        events: the data of what has come so far.
    """

    def __init__(self, client: RawClient, status: int, headers: dict[str, str]) -> None:
        self.client = client
        self.status = status
        self.headers = headers
        self.events: list[str] = []
        self._pieces = client.chunks()

    async def next_events(self) -> list[str]:
        """Those of the next piece that comes; none at the end. Each piece holds whole events, in UTF-8."""
        piece = await anext(self._pieces, b"")
        assert piece.endswith(b"\n\n") or not piece, f"half an event: {piece!r}"
        events = []
        for block in piece.decode().split("\n\n")[:-1]:
            if not block.startswith(":"):
                assert block.startswith("data: "), block
                assert "\n" not in block
                events.append(block.removeprefix("data: "))
        self.events += events
        return events if events or not piece else await self.next_events()

    async def rest(self) -> list[str]:
        """All events, to the last."""
        while await self.next_events():
            pass
        self.client.close()
        return self.events

    def abort(self) -> None:
        """Break the connection off."""
        self.client.writer.transport.abort()


def check_events(events: list[str]) -> list[dict[str, Any]]:
    """What `events` hold but for the terminal one, which must be there once, at the end. An error is told once, and
    nothing but the terminal event comes after it."""
    assert events.count("[DONE]") == 1, f"{events.count('[DONE]')} terminal events"
    assert events[-1] == "[DONE]", "something comes after the terminal event"
    bodies = [json.loads(event) for event in events[:-1]]
    assert not any("error" in body for body in bodies[:-1]), "something comes after an error"
    return bodies


@dataclass(slots=True)
class ServedEngine:
    """Attributes:
    http: what listens.
    serving: what it serves.
    engine: what computes.
    errors: what was logged as an error; a test takes out what it expects.
    probe: what PROBE is answered with.
    """

    http: RawServer
    serving: Serving
    engine: AsyncEngine
    errors: list[str]
    probe: Any = None

    async def get(self, path: str) -> Answer:
        return await self.http.ask(request(method="GET", path=path))

    async def post(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        return await self.http.ask(request(body_of(body), path=path))

    async def begin(self, body: dict[str, Any], path: str = COMPLETIONS) -> RawClient:
        """A connection on which a request was sent, and nothing was read."""
        client = await self.http.connect()
        await client.send(request(body_of(body), path=path))
        return client

    async def stream(self, body: dict[str, Any], path: str = COMPLETIONS) -> OpenStream:
        """An answer of which the head has come."""
        client = await self.begin({**body, "stream": True}, path)
        return OpenStream(client, *await client.head())

    async def handed_over(self, count: int) -> None:
        """So many requests are unfinished, and have left the threads that tokenize: those that the engine does not have
        yet, it takes in before its next step."""
        engine = self.engine
        await until(lambda: len(engine._requests) == count and engine._inbox.qsize() == engine._num_coming)

    async def settled(self) -> None:
        """Nothing is in progress any more."""
        engine = self.engine
        await until(lambda: not self.http.state.tasks and not engine._requests and not engine._engine.has_unfinished())

    async def check_well(self) -> None:
        """Nothing is left of the requests there were, and the next one is answered as ever."""
        await self.settled()
        for _ in range(2):
            scheduler, metrics = self.engine._engine.scheduler, self.engine.metrics()
            scheduler.check_integrity()
            scheduler.check_idle()
            assert metrics.used_blocks == 0
            assert metrics.free_blocks + metrics.cached_blocks == self.engine.num_kv_blocks
            assert metrics.unfinished_requests == 0
            assert self.engine._num_coming == 0
            assert not self.engine._engine._output_processor._texts
            assert (await self.get("/health")).status == 200
            answer = await self.post(PROBE)
            assert answer.status == 200, answer.body
            assert json.loads(answer.body)["choices"] == self.probe
            await self.settled()
        await until(lambda: not self.http.state.connections)
        assert self.errors == []

    def take_errors(self) -> list[str]:
        """The errors that were logged, the lines of requests left out."""
        errors = [error for error in self.errors if error != "request"]
        self.errors.clear()
        return errors


class _ErrorLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info is not None and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self.errors.append(text)


@asynccontextmanager
async def served_engine(*, survives: bool = True, **settings: Any) -> AsyncIterator[ServedEngine]:
    """A server that is ready. At the end it must be as well as at the beginning, unless it `survives` not; and nothing
    of it may be left, no task and no thread."""
    before, threads = asyncio.all_tasks(), set(threading.enumerate())
    log = _ErrorLog()
    logging.getLogger().addHandler(log)
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "seed": 5, **settings}
    serving = Serving(ServerSettings(**{"model": MODEL, "served_model_names": (MODEL,), **options}))
    engine = AsyncEngine(serving.settings.model, **serving.settings.engine_options())
    serving.set_ready(engine)
    try:
        async with serving_http(create_app(serving), serving.settings) as http:
            server = ServedEngine(http, serving, engine, log.errors)
            server.probe = json.loads((await server.post(PROBE)).body)["choices"]
            yield server
            if survives:
                await server.check_well()
            await until(lambda: not http.state.tasks)
            assert asyncio.all_tasks() == before, "tasks are left over"
    finally:
        if (gate := getattr(engine.backend, "open", None)) is not None:
            gate()
        await serving.close()
        logging.getLogger().removeHandler(log)
    # Those for grammars end when nobody holds the engine any more.
    kinds = ("pellucid-engine", "pellucid-tokenizer", "pellucid-parsing")
    await until(lambda: not [each for each in set(threading.enumerate()) - threads if each.name.startswith(kinds)])


def run(test: Callable[[ServedEngine], Any], **settings: Any) -> None:
    """`test` with a server of its own, as `served_engine` makes it."""

    async def main() -> None:
        async with served_engine(**settings) as server, asyncio.timeout(10 * PATIENCE):
            await test(server)

    asyncio.run(main())
