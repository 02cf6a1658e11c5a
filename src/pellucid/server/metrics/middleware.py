"""Counts HTTP requests, whatever answers them, and what was generated for them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.server.http.disconnect import CLIENT_CLOSED_REQUEST
from pellucid.server.metrics.server_metrics import ServerMetrics

UNKNOWN_ROUTE = "unknown"
"""Every path that leads nowhere: clients choose paths, and may not choose how many labels there are."""


class MetricsMiddleware:
    """Counts the requests of an application; to be its outermost layer, so that what others refuse is counted too."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics, begun = self._metrics, time.monotonic()
        metrics.http_in_progress += 1
        try:
            await self._app(scope, receive, send_noting_status)
        except Exception:
            status = 500 if status == CLIENT_CLOSED_REQUEST else status
            raise
        finally:
            route = self._route(scope)
            metrics.http_in_progress -= 1
            metrics.http_requests[route, status] += 1
            metrics.http_seconds[route].observe(time.monotonic() - begun)
            if (generation := scope.get("state", {}).get("generation")) is not None:
                for output in generation.outputs:
                    metrics.observe(output)

    def _route(self, scope: Scope) -> str:
        """The path of the route as it was declared, with the names of its parameters."""
        route = scope.get("route")
        if route is None:  # refused before it came to the router
            route = next((each for each in self._routes if each.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path_format", UNKNOWN_ROUTE)
