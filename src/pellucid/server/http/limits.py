"""How much of the server requests may take before anybody looks into them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pellucid.core.errors import PellucidError, QueueFullError
from pellucid.server.errors import HeaderTooLargeError
from pellucid.server.http.replies import send_error
from pellucid.server.settings import ServerSettings

REQUESTS_PER_SEQUENCE = 2
"""Requests in progress for each sequence that the engine takes: some are being read, and some read their answer."""


class Limits:
    """ASGI middleware: refuses what is too much, before its body is read.

    - 431 where the request's first line and headers are over `max_header_bytes`.
    - 429 for a POST while so many are in progress that the engine has no place for one more.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._max_header_bytes = settings.max_header_bytes
        self._max_requests: int | None = None
        if settings.max_waiting is not None:
            self._max_requests = REQUESTS_PER_SEQUENCE * (settings.max_num_seqs + settings.max_waiting)
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_work = scope["method"] == "POST"
        try:
            self._check_headers(scope)
            if is_work and self._max_requests is not None and self._num_requests >= self._max_requests:
                raise QueueFullError(f"{self._num_requests} requests are in progress, as many as this server takes")
        except PellucidError as error:
            await send_error(error, scope, receive, send)
            return
        self._num_requests += is_work
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_requests -= is_work

    def _check_headers(self, scope: Scope) -> None:
        # The protocol stops reading headers that do not end; those that came in one piece are counted here.
        target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        found = target + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if found > self._max_header_bytes:
            raise HeaderTooLargeError(
                f"the first line and headers have {found:,} bytes; at most {self._max_header_bytes:,} are taken"
            )
