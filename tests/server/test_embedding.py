"""The prompts of a request and the engine: how many at a time, and what is left when one ends early."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pellucid import AsyncEngine
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.server import embedding
from pellucid.server.app import create_app
from pellucid.server.routes import embeddings as routes
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from tests.support.engines import load_fake_backend
from tests.support.fake_backend import FakeBackend
from tests.support.mutants import mutant

PATIENCE = 600  # seconds, for a machine that is busy or stands still


class GatedBackend(FakeBackend):
    """Computes nothing until its gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        assert self.gate.wait(PATIENCE)
        return super().forward(batch)


class Server:
    """An application over the fake backend, and one request to it.

    Attributes:
        status: of the answer; None while there is none.
        most: most requests that the engine had at a time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.backend = load_fake_backend(monkeypatch, GatedBackend)
        options = {"model": "fake", "served_model_names": ("m",), **settings}
        self.serving = Serving(ServerSettings(**options))
        self.engine = AsyncEngine("fake", **self.serving.settings.engine_options())
        self.serving.set_ready(self.engine)
        self.status: int | None = None
        self.body = b""
        self.most = 0
        self._app = create_app(self.serving)
        self._has_left = asyncio.Event()

    def leave(self) -> None:
        self._has_left.set()

    async def ask(self, path: str, body: Any) -> None:
        to_come = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if not to_come:
                await self._has_left.wait()
                return {"type": "http.disconnect"}
            return to_come.pop()

        async def send(message: Any) -> None:
            self.status = message.get("status", self.status)
            self.body += message.get("body", b"")

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path}
        scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "state": {}}
        scope |= {"server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 5000)}
        await self._app(scope, receive, send)  # type: ignore[arg-type]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not is_so():
                self.most = max(self.most, len(self.engine._requests))
                await asyncio.sleep(0.001)


def run(monkeypatch: pytest.MonkeyPatch, scene: Callable[[Server], Awaitable[None]], **settings: Any) -> None:
    """Play `scene`; nothing may be left of it."""

    async def main() -> None:
        server = Server(monkeypatch, **settings)
        try:
            await scene(server)
            server.backend.gate.set()
            await server.until(lambda: not server.engine._requests)
            assert not server.engine._engine._pooling
            assert server.engine.metrics().used_blocks == 0
        finally:
            server.backend.gate.set()
            await server.serving.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"max_num_seqs": 2}, 4), ({"max_num_seqs": 8, "max_waiting": 5}, 2), ({"max_waiting": 1}, 1)],
)
def test_the_engine_has_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], most: int) -> None:
    async def scene(server: Server) -> None:
        asking = asyncio.create_task(server.ask("/v1/embeddings", {"input": ["a" * 30] * 20}))
        await server.until(lambda: len(server.engine._requests) == most)
        server.backend.gate.set()
        await server.until(asking.done)
        assert server.status == 200
        assert len(json.loads(server.body)["data"]) == 20
        assert server.most == most

    run(monkeypatch, scene, **settings)


def test_nothing_long_is_done_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, str] = {}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            threads[name] = threading.current_thread().name
            return function(*arguments, **options)

        return noted

    names = ("parse_embeddings", "embeddings_body", "parse_score", "similarity_body", "label_body")
    for name in names:
        monkeypatch.setattr(routes, name, noting(name, getattr(routes, name)))

    async def scene(server: Server) -> None:
        server.backend.gate.set()
        await server.ask("/v1/embeddings", {"input": "a"})
        await server.ask("/v1/score", {"text_1": "a", "text_2": "b"})
        await server.ask("/v1/score", {"query": "a", "items": "b", "label_token_ids": [1]})
        assert threads.keys() == set(names)
        assert all(name.startswith("pellucid-parsing") for name in threads.values())

    run(monkeypatch, scene)


async def leaves(server: Server) -> None:
    asking = asyncio.create_task(server.ask("/v1/embeddings", {"input": ["abc"] * 20}))
    await server.until(lambda: len(server.engine._requests) == 4)
    await server.until(lambda: server.engine._inbox.qsize() == server.engine._num_coming)  # all are tokenized
    server.leave()
    await server.until(asking.done)
    server.backend.gate.set()
    await server.until(lambda: not server.engine._requests)
    counters = server.engine.metrics().counters
    assert counters.requests_received == counters.requests_aborted + counters.requests_finished <= 4
    assert counters.requests_aborted


def test_nothing_is_left_of_a_client_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, leaves, max_num_seqs=2)


def test_the_mutant_that_lets_them_run_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(embedding._read_all, "await unless_disconnected(request, run_all())", "await run_all()")
    monkeypatch.setattr(embedding, "_read_all", changed)

    async def scene(server: Server) -> None:
        asking = asyncio.create_task(server.ask("/v1/embeddings", {"input": ["abc"] * 20}))
        await server.until(lambda: len(server.engine._requests) == 4)
        server.leave()
        server.backend.gate.set()
        await server.until(asking.done)
        assert server.engine.metrics().counters.requests_finished == 20

    run(monkeypatch, scene, max_num_seqs=2)


def test_items_find_their_query_in_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(server: Server) -> None:
        server.backend.gate.set()
        body = {"query": "a" * 150, "items": ["b", "c", "d"], "label_token_ids": [1, 2]}
        await server.ask("/v1/score", body)
        assert server.status == 200
        assert server.engine.metrics().counters.cached_tokens == 2 * 150

    run(monkeypatch, scene)


def test_the_time_may_be_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(server: Server) -> None:
        asking = asyncio.create_task(server.ask("/v1/score", {"text_1": "a", "text_2": ["b"] * 5}))
        await server.until(asking.done)
        assert server.status == 504
        assert json.loads(server.body)["error"]["code"] == "deadline_exceeded"

    run(monkeypatch, scene, request_timeout=0.05)


def test_one_that_fails_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(server: Server) -> None:
        server.backend.fail_on = 26
        server.backend.gate.set()
        await server.ask("/v1/embeddings", {"input": ["abc", "xyz", "def"] * 5})
        assert server.status == 500
        assert json.loads(server.body)["error"]["code"] == "backend_failed"

    run(monkeypatch, scene)
