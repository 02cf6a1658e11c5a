"""The API, described: for programs and for people."""

from __future__ import annotations

from functools import cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from pellucid.server.http.replies import json_bytes
from pellucid.server.openapi.document import document
from pellucid.server.openapi.reference import POLICY, reference
from pellucid.server.serving import serving_of


def described_routes(routes: list[BaseRoute]) -> tuple[tuple[str, str], ...]:
    """Method and path of each route; HEAD is part of GET."""
    return tuple(
        (method.lower(), route.path_format)
        for route in routes
        if isinstance(route, Route) and route.include_in_schema
        for method in sorted((route.methods or set()) - {"HEAD"})
    )


async def openapi(request: Request) -> Response:
    """The document."""
    text = await serving_of(request).run(_bytes, *_arguments(request))
    return Response(text, media_type="application/json")


async def docs(request: Request) -> Response:
    """The same to read."""
    text = await serving_of(request).run(_page, *_arguments(request))
    return Response(text, headers={"Content-Security-Policy": POLICY}, media_type="text/html")


def _arguments(request: Request) -> tuple[tuple[tuple[str, str], ...], bool]:
    return described_routes(request.app.routes), bool(serving_of(request).settings.api_keys)


@cache
def _bytes(routes: tuple[tuple[str, str], ...], needs_key: bool) -> bytes:
    return json_bytes(document(routes, needs_key=needs_key))


@cache
def _page(routes: tuple[tuple[str, str], ...], needs_key: bool) -> bytes:
    return reference(document(routes, needs_key=needs_key)).encode()


ROUTES = [Route("/docs", docs), Route("/openapi.json", openapi)]
