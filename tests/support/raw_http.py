"""HTTP byte by byte: an ASGI application behind the server's protocol, and a client that sends what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from pellucid.server.http.protocol import protocol_class
from pellucid.server.settings import ServerSettings

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing is expected to take so long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    status: HTTP status.
    headers: by name in lower case, the last where one comes several times.
    body: as it was sent.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Of a body in OpenAI's form."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        """Send them one after the other; a server that no longer listens is no error."""
        try:
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()
        except ConnectionError:
            pass

    async def answer(self) -> Answer:
        """The next answer; EOFError or ConnectionError where none comes."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([piece async for piece in self.chunks()])
        else:
            async with asyncio.timeout(PATIENCE):
                body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The pieces of a body that is sent in chunks."""
        while True:
            async with asyncio.timeout(PATIENCE):
                size = int(await self.reader.readline(), 16)
                piece = (await self.reader.readexactly(size + 2))[:-2]
            if not piece:
                return
            yield piece

    async def closed(self) -> bytes:
        """What comes until the server closes the connection."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True, slots=True)
class RawServer:
    """Attributes:
    port: where it listens, on 127.0.0.1.
    state: its connections and tasks, as uvicorn counts them.
    """

    port: int
    state: ServerState

    async def connect(self) -> RawClient:
        return RawClient(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(self, *parts: bytes) -> Answer:
        """What answers `parts`, on a connection of its own."""
        client = await self.connect()
        try:
            sending = asyncio.create_task(client.send(*parts))
            answer = await client.answer()
            sending.cancel()
            return answer
        finally:
            client.close()


@asynccontextmanager
async def serving_http(app: ASGIApp, settings: ServerSettings) -> AsyncIterator[RawServer]:
    """`app` behind uvicorn's connection handling, on a port that was free."""
    config = uvicorn.Config(app, http=protocol_class(settings), ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        "127.0.0.1",
        0,
    )
    try:
        yield RawServer(server.sockets[0].getsockname()[1], state)
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)


def request(
    body: bytes = b"",
    *,
    method: str = "POST",
    path: str = "/",
    headers: dict[str, str] | None = None,
    chunk: int = 0,
) -> bytes:
    """A request for 127.0.0.1; in chunks of `chunk` bytes where it is not 0."""
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json"}
    if chunk:
        fields["Transfer-Encoding"] = "chunked"
        pieces = [body[begin : begin + chunk] for begin in range(0, len(body), chunk)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    elif method == "POST":
        fields["Content-Length"] = str(len(body))
    lines = [f"{name}: {value}" for name, value in (fields | (headers or {})).items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body
