"""One request to an ASGI application, without a network."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    headers: by name in lower case.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(app: ASGIApp, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """The answer of `app`; a header `content_type` is sent as Content-Type."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (name.lower().replace("_", "-").encode(), value.encode())
            for name, value in {"host": "localhost:8000", **headers}.items()
        ],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50_000),
        "state": {},
    }
    sent: list[Message] = []
    to_come: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not to_come:
            await asyncio.Event().wait()
        return to_come.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    begin, *pieces = sent
    assert not pieces[-1].get("more_body", False), "the answer has no end"
    return Answer(
        begin["status"],
        {name.decode(): value.decode() for name, value in begin["headers"]},
        b"".join(piece["body"] for piece in pieces),
    )
