"""A line in the log for each request: what it cost and how it ended, and nothing of what it said."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.server.http.disconnect import CLIENT_CLOSED_REQUEST
from pellucid.server.logs import fields, logger

if TYPE_CHECKING:
    from pellucid.core.outputs import EmbeddingOutput, LabelOutput, RequestOutput

REQUEST_ID_HEADER = b"x-request-id"
QUIET_PATHS = frozenset(("/health", "/ready", "/metrics"))
"""Asked for every few seconds: an answer to a GET is logged at debug level only."""
MAX_PATH_CHARACTERS = 128
MAX_METHOD_CHARACTERS = 16
"""Clients may send any word as their method."""

_REQUEST_ID = re.compile(rb"[0-9A-Za-z._-]{1,128}")


class RequestLog:
    """ASGI middleware: names each request, and logs it when it has ended.

    The name is that of the request's `X-Request-Id` if it is one (up to 128 letters, digits, dots, dashes and
    underscores), else a new one; it is in `scope["state"]["request_id"]` and in the answer's `X-Request-Id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        begin = time.perf_counter()
        status: int | None = None
        is_complete = is_client_gone = False

        async def send_noting(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id.encode())]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                is_complete = True
            await send(message)

        async def receive_noting() -> Message:
            nonlocal is_client_gone
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                is_client_gone = True
            return message

        try:
            await self._app(scope, receive_noting, send_noting)
        finally:
            if status is None or (is_client_gone and status == CLIENT_CLOSED_REQUEST):
                status = CLIENT_CLOSED_REQUEST if is_client_gone else 500
            level = _level(scope, status)
            if logger.isEnabledFor(level):
                seconds = time.perf_counter() - begin
                values = {
                    "id": request_id,
                    "method": scope["method"][:MAX_METHOD_CHARACTERS],
                    "path": scope["path"][:MAX_PATH_CHARACTERS],
                    "status": status,
                    "seconds": round(seconds, 6),
                    **_work(state),
                }
                if is_client_gone:
                    values["client_gone"] = True
                logger.log(level, "request", extra=fields(**values))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER and _REQUEST_ID.fullmatch(value):
            return bytes(value).decode()
    return f"req_{token_hex(12)}"


def _level(scope: Scope, status: int) -> int:
    if status >= 500 and status != 503:
        return logging.ERROR
    if scope["path"] in QUIET_PATHS and scope["method"] in ("GET", "HEAD"):
        return logging.DEBUG
    return logging.INFO


def _work(state: dict[str, Any]) -> dict[str, object]:
    """What the engine did for a request, if it came that far."""
    values: dict[str, object] = {}
    if "error" in state:
        values["error"] = state["error"].code
    generation = state.get("generation")
    outputs: Sequence[RequestOutput] = [] if generation is None else generation.outputs
    pooled: Sequence[EmbeddingOutput | LabelOutput] = state.get("pooled", ())
    metrics = [*(output.metrics for output in outputs), *(output.metrics for output in pooled)]
    for name in ("prompt_tokens", "cached_tokens", "output_tokens") if metrics else ():
        values[name] = sum(getattr(each, name) for each in metrics)
    if outputs:
        values["ttft"] = round(min(each.ttft for each in metrics), 6)
        reasons = (completion.finish_reason for output in outputs for completion in output.outputs)
        values["finish"] = ",".join(dict.fromkeys(reasons))
    return values
