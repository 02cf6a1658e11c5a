from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.server.metrics.middleware import MetricsMiddleware
from pellucid.server.metrics.server_metrics import ServerMetrics

HALVES = RequestMetrics(queue=0.5, ttft=1.0, decode=1.5, prompt_tokens=7, output_tokens=3, token_times=[[1, 1.5, 2.5]])


async def answer(request: Request) -> Response:
    return PlainTextResponse(request.path_params["name"])


async def fail(request: Request) -> Response:
    raise RuntimeError("a defect")


async def generate(request: Request) -> Response:
    completions = [CompletionOutput(0, "abc", [1, 2, 3], "stop")]
    request.state.generation = SimpleNamespace(outputs=[RequestOutput("r", None, [], completions, HALVES)])
    return PlainTextResponse("abc")


async def leave(request: Request) -> Response:
    raise ClientDisconnect


class RefuseSecrets:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("secret"):
            await Response(status_code=401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


ROUTES = [
    Route("/things/{name}", answer, methods=["GET"]),
    Route("/fail", fail, methods=["GET"]),
    Route("/generate", generate, methods=["POST"]),
    Route("/leave", leave, methods=["GET"]),
]


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics()


@pytest.fixture
def app(metrics: ServerMetrics) -> Starlette:
    layers = [Middleware(MetricsMiddleware, metrics=metrics, routes=ROUTES), Middleware(RefuseSecrets)]
    return Starlette(routes=ROUTES, middleware=layers)


def call(app: ASGIApp, path: str, method: str = "GET") -> list[Message]:
    """What the application sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    scope |= {"scheme": "http", "server": ("test", 80), "root_path": "", "http_version": "1.1", "state": {}}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def test_paths_have_the_label_of_their_route(app: Starlette, metrics: ServerMetrics) -> None:
    for number in range(100):
        call(app, f"/things/{number}")
        call(app, f"/nowhere/{number}")
    call(app, "/generate", "GET")
    call(app, "/things/secret")
    call(app, "/nowhere/secret")
    assert metrics.http_requests == {
        ("/things/{name}", 200): 100,
        ("unknown", 404): 100,
        ("/generate", 405): 1,
        ("/things/{name}", 401): 1,
        ("unknown", 401): 1,
    }
    assert {route: int(histogram.counts.sum()) for route, histogram in metrics.http_seconds.items()} == {
        "/things/{name}": 101,
        "unknown": 101,
        "/generate": 1,
    }
    assert metrics.http_in_progress == 0


def test_a_defect_is_a_500(app: Starlette, metrics: ServerMetrics) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        call(app, "/fail")
    assert metrics.http_requests == {("/fail", 500): 1}
    assert metrics.http_in_progress == 0


def test_what_was_generated_is_counted(app: Starlette, metrics: ServerMetrics) -> None:
    call(app, "/generate", "POST")
    assert metrics.finish_reasons["stop"] == 1
    assert (metrics.queue_seconds.sum, metrics.ttft_seconds.sum, metrics.request_seconds.sum) == (0.5, 1.0, 2.5)
    assert (metrics.prompt_tokens.sum, metrics.output_tokens.sum, metrics.token_seconds.sum) == (7, 3, 1.5)
    assert metrics.token_seconds.counts.sum() == 2


def test_a_request_is_in_progress_until_its_answer_has_ended(metrics: ServerMetrics) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(metrics.http_in_progress)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append(metrics.http_in_progress)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    seen: list[int] = []
    call(MetricsMiddleware(slow, metrics, []), "/slow")
    assert seen == [1, 1]
    assert metrics.http_in_progress == 0


def test_a_client_that_left_has_a_status_of_its_own(metrics: ServerMetrics) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    call(MetricsMiddleware(silent, metrics, []), "/")
    assert metrics.http_requests == {("unknown", 499): 1}
