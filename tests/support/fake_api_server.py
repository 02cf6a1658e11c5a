"""An HTTP server that does with each request what a script says: pieces cut anywhere, errors, resets, silence."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeRequest:
    method: str
    path: str
    headers: dict[str, str]
    data: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.data)


@dataclass
class FakeReply:
    """The connection of a request, to answer on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keeps_alive: bool = True

    async def write(self, *pieces: bytes) -> None:
        """Each piece in a packet of its own, as far as a loop's turn between them makes it one."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        await self.head(
            status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        )
        await self.write(data)

    async def head(self, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in (headers or {}).items()), "", ""]
        await self.write("\r\n".join(lines).encode())

    async def begin_events(self) -> None:
        await self.head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: Any) -> None:
        await self.chunk(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

    async def end_events(self) -> None:
        await self.event("[DONE]")
        await self.chunk(b"")

    async def until_client_leaves(self) -> None:
        await self.reader.read(1)
        self.keeps_alive = False

    def reset(self) -> None:
        self.keeps_alive = False
        self.writer.transport.abort()

    def close(self) -> None:
        self.keeps_alive = False


Script = Callable[[FakeRequest, FakeReply], Awaitable[None]]


@dataclass
class FakeApiServer:
    """Runs in a thread of its own while it is entered. `script` answers whatever is not GET /v1/models."""

    script: Script
    models: Sequence[str] = ("fake",)
    requests: list[FakeRequest] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most_under_way: int = 0

    def __enter__(self) -> FakeApiServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                request = await self._read_request(reader)
                reply = FakeReply(reader, writer)
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    if request.path == "/v1/models":
                        await reply.json({"object": "list", "data": [{"id": name} for name in self.models]})
                    else:
                        await self.script(request, reply)
                finally:
                    self.under_way -= 1
                if not reply.keeps_alive:
                    break
        writer.close()

    async def _read_request(self, reader: asyncio.StreamReader) -> FakeRequest:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        request = FakeRequest(method, path, headers, data)
        self.requests.append(request)
        return request


def text_chunk(request: FakeRequest, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """An event's data, in the form of the endpoint that was asked."""
    if request.path.endswith("/chat/completions"):
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage_chunk(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


def telling(*pieces: str, finish_reason: str = "stop", tokens_per_event: int = 1) -> Script:
    """A script that streams `pieces`, and the usage where it is asked for."""

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        for piece in pieces:
            await reply.event(text_chunk(request, piece))
        await reply.event(text_chunk(request, "", finish_reason))
        if request.body.get("stream_options", {}).get("include_usage"):
            await reply.event(usage_chunk(7, len(pieces) * tokens_per_event))
        await reply.end_events()

    return script
