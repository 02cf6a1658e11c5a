from __future__ import annotations

import asyncio
import io
import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.core.errors import InvalidRequestError
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.server.logs import logging_to
from pellucid.server.request_log import RequestLog
from pellucid.server.settings import LogLevel


def record_of(
    app: ASGIApp,
    *,
    method: str = "POST",
    path: str = "/v1/completions",
    headers: list[tuple[bytes, bytes]] | None = None,
    level: LogLevel = "info",
) -> tuple[list[dict[str, Any]], list[Message]]:
    """What is logged of a request, and what is sent."""
    stream = io.StringIO()
    sent: list[Message] = []
    scope: Scope = {"type": "http", "method": method, "path": path, "query_string": b"key=q", "headers": headers or []}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def main() -> None:
        with suppress(RuntimeError):
            await RequestLog(app)(scope, receive, send)

    with logging_to(stream, level, "json"):
        asyncio.run(main())
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [record for record in records if record["message"] == "request"], sent


def answering(status: int, *, state: dict[str, Any] | None = None, whole: bool = True, leave: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] |= state or {}
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        if leave:
            await receive()
        if whole:
            await send({"type": "http.response.body", "body": b"secret answer"})
            await receive()

    return app


def test_what_it_cost_and_how_it_ended() -> None:
    outputs = [
        RequestOutput(
            "r",
            "secret prompt",
            [1],
            [CompletionOutput(0, "secret", [2], "stop"), CompletionOutput(1, "secret", [2], reason)],  # type: ignore[arg-type]
            RequestMetrics(ttft=ttft, prompt_tokens=3, cached_tokens=1, output_tokens=4),
        )
        for reason, ttft in (("stop", 0.5), ("length", 0.25))
    ]
    app = answering(200, state={"generation": SimpleNamespace(outputs=outputs)})
    (record,), sent = record_of(app)
    assert record.pop("time")
    assert record.pop("seconds") >= 0
    request_id = record.pop("id")
    assert dict(sent[0]["headers"])[b"x-request-id"] == request_id.encode()
    assert record == {
        "level": "info",
        "message": "request",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "prompt_tokens": 6,
        "cached_tokens": 2,
        "output_tokens": 8,
        "ttft": 0.25,
        "finish": "stop,length",
    }


def test_a_request_keeps_the_name_that_it_has() -> None:
    (record,), sent = record_of(answering(200), headers=[(b"x-request-id", b"trace-1.2_3")])
    assert record["id"] == "trace-1.2_3"
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"trace-1.2_3"


@pytest.mark.parametrize("name", [b"", b"a b", b"a\x1b", b"\xff", b"a" * 129, b'"'])
def test_a_name_that_is_none_is_replaced(name: bytes) -> None:
    (record,), _ = record_of(answering(200), headers=[(b"x-request-id", name)])
    assert record["id"].startswith("req_")


def test_every_request_has_a_name_of_its_own() -> None:
    names = {record_of(answering(200))[0][0]["id"] for _ in range(10)}
    assert len(names) == 10


def test_an_error_has_its_code_and_not_its_message() -> None:
    error = InvalidRequestError("temperature must be a number, not 'secret'", param="temperature")
    (record,), _ = record_of(answering(400, state={"error": error}))
    assert (record["status"], record["error"]) == (400, "invalid_request")
    assert "secret" not in str(record)


def test_a_client_that_leaves_is_told_from_one_that_stays() -> None:
    (stayed,), _ = record_of(answering(200))
    assert "client_gone" not in stayed
    (left,), _ = record_of(answering(200, whole=False, leave=True))
    assert (left["status"], left["client_gone"]) == (200, True)

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    (early,), _ = record_of(nothing)
    assert (early["status"], early["client_gone"], early["level"]) == (499, True, "info")


def test_a_defect_is_an_error() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    (record,), _ = record_of(broken)
    assert (record["status"], record["level"]) == (500, "error")
    assert "secret" not in str(record)


def test_no_query_and_no_endless_path() -> None:
    (record,), _ = record_of(answering(404), path="/" + "x" * 10_000)
    assert len(record["path"]) == 128
    assert "key=q" not in str(record)


def test_probes_are_logged_at_debug_level_only() -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert record_of(answering(503), method="GET", path=path)[0] == []
        (record,), _ = record_of(answering(503), method="GET", path=path, level="debug")
        assert record["level"] == "debug"
        assert len(record_of(answering(405), method="POST", path=path)[0]) == 1
        assert len(record_of(answering(500), method="GET", path=path)[0]) == 1


def test_what_is_not_http_passes() -> None:
    passed: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["type"])

    asyncio.run(RequestLog(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert passed == ["lifespan"]


def test_a_method_is_any_word_and_is_cut() -> None:
    [record], _ = record_of(answering(405), method="A" * 60_000)
    assert record["method"] == "A" * 16
