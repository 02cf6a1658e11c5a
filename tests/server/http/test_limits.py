"""What is too much before anybody has looked into it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pellucid.server.http.limits import Limits
from pellucid.server.settings import ServerSettings


class Asked:
    """Requests to an application, each with its status."""

    def __init__(self, app: Limits) -> None:
        self._app = app
        self.bodies: list[bytes] = []

    async def __call__(self, method: str = "POST", path: str = "/", headers: int = 0) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            else:
                self.bodies.append(message["body"])

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"a", b"x" * (headers - 5 - len(path)))] if headers else [],
        }
        await self._app(scope, lambda: asyncio.sleep(0), send)  # type: ignore[arg-type, return-value]
        return statuses[0]


def test_headers_up_to_the_limit() -> None:
    asked = Asked(Limits(Response(), ServerSettings(model="m", max_header_bytes=2000)))
    assert asyncio.run(asked(headers=2000)) == 200
    assert asyncio.run(asked(headers=2001)) == 431
    assert json.loads(asked.bodies[-1])["error"]["message"] == (
        "the first line and headers have 2,001 bytes; at most 2,000 are taken"
    )
    assert asyncio.run(asked(path="/" + "a" * 1999)) == 200
    assert asyncio.run(asked(path="/" + "a" * 2000)) == 431


def test_requests_in_progress() -> None:
    async def run() -> None:
        released = asyncio.Event()

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/fails":
                raise ValueError
            if scope["path"] == "/waits":
                await released.wait()
            await Response()(scope, receive, send)

        asked = Asked(Limits(inner, ServerSettings(model="m", max_num_seqs=1, max_waiting=1)))
        waiting = [asyncio.create_task(asked(path="/waits")) for _ in range(4)]
        gone = waiting.pop()
        await asyncio.sleep(0)
        assert await asked() == 429
        error = json.loads(asked.bodies[-1])["error"]
        assert (error["code"], error["message"]) == (
            "queue_full",
            "4 requests are in progress, as many as this server takes",
        )
        assert await asked("GET") == 200
        gone.cancel()
        await asyncio.wait((gone,))
        assert await asked() == 200
        for _ in range(5):
            try:
                await asked(path="/fails")
            except ValueError:
                continue
        assert await asked() == 200
        released.set()
        assert await asyncio.gather(*waiting) == [200] * 3

    asyncio.run(run())


def test_without_a_limit_of_waiting_requests() -> None:
    async def run() -> None:
        released = asyncio.Event()

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            await released.wait()
            await Response()(scope, receive, send)

        asked = Asked(Limits(inner, ServerSettings(model="m", max_num_seqs=1, max_waiting=None)))
        tasks = [asyncio.create_task(asked()) for _ in range(100)]
        await asyncio.sleep(0)
        released.set()
        assert await asyncio.gather(*tasks) == [200] * 100

    asyncio.run(run())
