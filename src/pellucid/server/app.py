"""The server as an ASGI application: its routes, and what stands before them."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.core.errors import PellucidError
from pellucid.core.validation import shown
from pellucid.server.errors import MethodNotAllowedError, NotFoundError, internal_error, told
from pellucid.server.http.disconnect import CLIENT_CLOSED_REQUEST
from pellucid.server.http.draining import RefuseWhileDraining
from pellucid.server.http.limits import Limits
from pellucid.server.http.replies import error_response, send_error
from pellucid.server.http.security import Security
from pellucid.server.metrics.middleware import MetricsMiddleware
from pellucid.server.request_log import RequestLog
from pellucid.server.serving import Serving

ROUTE_MODULES = ("completions", "docs", "embeddings", "messages", "metrics", "operations", "responses", "tokenize")
"""The modules of `routes/`, each with its ROUTES."""


def routes() -> list[Route]:
    """All there are."""
    modules = (importlib.import_module(f"pellucid.server.routes.{name}") for name in ROUTE_MODULES)
    return [route for module in modules for route in module.ROUTES]


def create_app(serving: Serving) -> Starlette:
    """The application that serves `serving`, which a runner starts and ends."""
    all_routes = routes()
    app = Starlette(
        routes=all_routes,
        exception_handlers={
            PellucidError: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _say_nothing,
        },
        middleware=[
            Middleware(MetricsMiddleware, metrics=serving.metrics, routes=all_routes),
            Middleware(RequestLog),
            Middleware(Security, serving.settings),
            Middleware(Limits, serving.settings),
            Middleware(RefuseWhileDraining, serving),
            Middleware(ContainDefects),
        ],
    )
    app.state.serving = serving
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, PellucidError)
    request.state.error = error
    return error_response(told(error), request.url.path)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code != 405:
        return await _refuse(request, NotFoundError(f"there is nothing at {shown(path)}: {_way_on(request, path)}"))
    allowed = ", ".join(sorted([*(error.headers or {}).get("Allow", "").split(", "), "OPTIONS"]))
    if method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": allowed})
    response = await _refuse(request, MethodNotAllowedError(f"{shown(path)} takes {allowed}, not {shown(method)}"))
    response.headers["Allow"] = allowed
    return response


def _way_on(request: Request, path: str) -> str:
    """What whoever asked for `path` may have wanted."""
    paths = [route.path for route in request.app.routes]
    close = [known for known in paths if known.endswith(path)] or get_close_matches(path[:200], paths, n=1)
    return f"did you mean {close[0]}?" if close and path != "/" else "/ lists what there is"


async def _say_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


class ContainDefects:
    """Answers a request that ran into a defect of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as defect:
            error = internal_error(defect)
            if has_begun or scope["type"] != "http":
                raise
            await send_error(error, scope, receive, send)
