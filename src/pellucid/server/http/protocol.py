"""HTTP/1.1 on one connection: uvicorn's h11 protocol, with limits of time and size and with errors in JSON.

It leans on these of `uvicorn.protocols.http.h11_impl.H11Protocol`: the attributes `app`, `conn`, `connections`, `cycle`
(with `disconnected`, `flow`, `message_event`, `response_complete`, `scope` and `transport`), `flow`, `logger`, `loop`,
`timeout_keep_alive` and `timeout_keep_alive_task`; and that malformed input calls `send_400_response` while h11's error
is being handled.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar, Literal

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pellucid.core.errors import InvalidRequestError, PellucidError
from pellucid.server.errors import HeaderTooLargeError, OverloadedError, RequestTimeoutError
from pellucid.server.http.chunks import offer_chunks
from pellucid.server.http.replies import error_response, send_error
from pellucid.server.logs import fields, logger
from pellucid.server.settings import ServerSettings

LINGER_SECONDS = 5.0
"""How long what a client still sends is thrown away once it has its answer. A connection that is closed with something
unread takes the answer with it."""
SEND_SECONDS = 60.0
"""How long a client may leave its answer unread when no more of it can be buffered."""
MAX_MESSAGE = 200

# Of what it warns of, malformed requests are told of here, and those for WebSockets are answered as if they were none.
_uvicorn_logger = logging.getLogger("uvicorn.protocol")
_uvicorn_logger.setLevel(logging.ERROR)

Awaited = Literal["head", "body", "rest"]
"""What a client is about to send: the first line and headers of a request; its body; what is left of the body of a
request that was answered without it."""


def protocol_class(settings: ServerSettings) -> type[H11Protocol]:
    """The protocol under these limits, for `http=` of `uvicorn.Config`: `max_connections`, `header_timeout`,
    `body_timeout`, `keep_alive_timeout`, `max_header_bytes`.

    A connection beyond `max_connections` is answered with 503 whatever it asks for, and one beyond twice as many is
    dropped. A request that is not there in time is answered with 408, one with too long headers with 431, one that is
    not HTTP with 400.
    """
    return type("LimitedProtocol", (_LimitedProtocol,), {"settings": settings})


class _LimitedProtocol(H11Protocol):
    settings: ClassVar[ServerSettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = partial(_with_one_length, self.app)
        self.logger = _uvicorn_logger
        self.conn = h11.Connection(h11.SERVER, self.settings.max_header_bytes)
        self.timeout_keep_alive = self.settings.keep_alive_timeout  # type: ignore[assignment]
        self._awaited: Awaited | None = None
        self._is_finished = False
        self._reading = _Alarm(self.loop)
        self._writing = _Alarm(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self.settings.max_connections
        if len(self.connections) > 2 * limit:
            transport.abort()
        elif len(self.connections) > limit:
            self.app = _turn_away
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._is_finished = True
        self._reading.cancel()
        self._writing.cancel()

    def data_received(self, data: bytes) -> None:
        if self._is_finished:
            return
        super().data_received(data)
        self._go_on()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._go_on()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.set(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.cancel()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        is_head = self.conn.our_state is h11.IDLE
        if is_head and isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            limit = self.settings.max_header_bytes
            self._finish(HeaderTooLargeError(f"the first line and headers have over {limit:,} bytes"))
        else:
            self._finish(InvalidRequestError(f"this is not HTTP/1.1: {error or msg}"[:MAX_MESSAGE]))

    def _go_on(self) -> None:
        if self.cycle is not None:
            offer_chunks(self.cycle)
        self._watch()

    def _watch(self) -> None:
        """Limit the time that the client takes for what it is to send next."""
        awaited = self._expected()
        if awaited == self._awaited or self._is_finished:
            return
        self._awaited = awaited
        if awaited is None:
            self._reading.cancel()
            return
        settings = self.settings
        seconds = {"head": settings.header_timeout, "body": settings.body_timeout, "rest": LINGER_SECONDS}[awaited]
        self._reading.set(seconds, self._time_out)

    def _expected(self) -> Awaited | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "rest" if self.conn.our_state in (h11.DONE, h11.MUST_CLOSE) else "body"
        is_idle = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        return "head" if is_idle else None

    def _time_out(self) -> None:
        if self._awaited == "body":
            seconds, what = self.settings.body_timeout, "body of the request is"
        elif self._awaited == "head" and self.conn.trailing_data[0]:
            seconds, what = self.settings.header_timeout, "headers of the request are"
        else:
            self._close()
            return
        self._finish(RequestTimeoutError(f"the {what} not complete after {seconds:g} s"))

    def _finish(self, error: PellucidError) -> None:
        """Answer with `error`, if no answer was begun, and be done with this connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._close()
            return
        self._is_finished = True
        logger.info("no whole request", extra=fields(status=error.status, error=error.code))
        answer = error_response(error, "")
        has_body = self.conn.our_state is h11.IDLE or self.cycle.scope["method"] != "HEAD"
        head = h11.Response(
            status_code=error.status,
            headers=[*answer.raw_headers, (b"connection", b"close")],
            reason=HTTPStatus(error.status).phrase.encode(),
        )
        for event in (head, h11.Data(data=bytes(answer.body) if has_body else b""), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._reading.set(LINGER_SECONDS, self._close)

    def _close(self) -> None:
        self._is_finished = True
        self.transport.close()


class _Alarm:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float, action: Callable[[], None]) -> None:
        """`action` in `seconds`, and nothing that was to happen before."""
        self.cancel()
        self._handle = self._loop.call_later(seconds, action)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


async def _with_one_length(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Calls `app` unless a proxy could see the request end elsewhere (RFC 9112, 6.1)."""
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
        error = InvalidRequestError("Transfer-Encoding comes with Content-Length or HTTP/1.0: where does the body end?")
        await send_error(error, scope, receive, send, close=True)
    else:
        await app(scope, receive, send)


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    message: Message = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
    error = OverloadedError("too many connections are open: try again in a moment")
    await send_error(error, scope, receive, send, close=True)
