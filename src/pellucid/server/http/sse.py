"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pellucid.core.errors import PellucidError
from pellucid.server.errors import internal_error, told
from pellucid.server.http.chunks import ChunkWriter, chunk_writer
from pellucid.server.http.disconnect import disconnected
from pellucid.server.http.replies import send_error

HEARTBEAT = b": keep-alive\n\n"
"""A comment: clients skip it, and whatever lies between sees that the connection lives."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # else nginx holds events back
]


def event(data: bytes, name: str | None = None) -> bytes:
    """One event. `data` is a single line, as JSON is."""
    head = b"" if name is None else b"event: %s\n" % name.encode()
    return b"%sdata: %s\n\n" % (head, data)


class EventStream(Response):
    """Sends what `events` yields, whole events, the terminal one last.

    What fails before the first event is an answer of its own, with its status. What fails later is told by the last
    event. While nothing comes, comments are sent. When the client is gone, `events` is closed; ClientDisconnect is
    raised where nothing was sent yet.

    Args:
        tell: the last events of a stream that failed, from its error.
        heartbeat_seconds: how long nothing may be sent.
        on_open: called with the body once it is open, for events that it can be given while `events` waits for what
            comes next.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        tell: Callable[[PellucidError], bytes],
        *,
        heartbeat_seconds: float,
        on_open: Callable[[EventBody], None] = lambda body: None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(HEADERS)
        self._events = events
        self._tell = tell
        self._heartbeat_seconds = heartbeat_seconds
        self._on_open = on_open
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(scope, receive, send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif not self._has_begun:
                raise ClientDisconnect
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)  # who left is told of no failure
            await self._events.aclose()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(anext(self._events, b""))
        try:
            done, _ = await asyncio.wait((first,), timeout=self._heartbeat_seconds)
            if done:
                try:
                    first.result()
                except PellucidError as error:
                    await send_error(told(error), scope, receive, send)
                    return
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            body = EventBody(send, chunk_writer(scope), self._heartbeat_seconds)
            try:
                self._on_open(body)
                await self._send_events(first, body, scope)
            finally:
                await body.close()
        finally:
            if not first.done():
                first.cancel()
                await asyncio.wait((first,))

    async def _send_events(self, first: asyncio.Future[bytes], body: EventBody, scope: Scope) -> None:
        try:
            await body.send(await first)
            async for events in self._events:
                await body.send(events)
        except Exception as failure:
            error = told(failure) if isinstance(failure, PellucidError) else internal_error(failure)
            scope.setdefault("state", {})["error"] = error  # for the log
            await body.send(self._tell(error))
        await body.end()


class EventBody:
    """A body in which something is sent at least every `seconds`."""

    def __init__(self, send: Send, writer: ChunkWriter | None, seconds: float) -> None:
        self._send = send
        self._writer = writer
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._num_sending = 0
        self._beat: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(seconds, self._check)

    async def send(self, data: bytes) -> None:
        """Send `data`; waits where the client is slow to read."""
        if self.is_free:
            self.send_now(data)
            return
        self._num_sending += 1
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._num_sending -= 1
        self._last = self._loop.time()

    @property
    def is_free(self) -> bool:
        """Whether something may be sent without waiting."""
        return self._writer is not None and not self._num_sending and self._writer.is_free

    def send_now(self, data: bytes) -> None:
        """Send `data`; the body must be free."""
        assert self._writer is not None
        self._writer.write(data)
        self._last = self._loop.time()

    async def end(self) -> None:
        """Nothing follows."""
        await self.close()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def close(self) -> None:
        """No more heartbeats."""
        self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()
            await asyncio.wait((self._beat,))

    def _check(self) -> None:
        silent = self._loop.time() - self._last
        if silent >= self._seconds and not self._num_sending:
            self._beat = self._loop.create_task(self.send(HEARTBEAT))
        self._timer = self._loop.call_later(max(self._seconds - silent, self._seconds / 2), self._check)
