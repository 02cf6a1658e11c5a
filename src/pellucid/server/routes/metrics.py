"""What Prometheus reads."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.metrics.exposition import expose
from pellucid.server.serving import serving_of


async def metrics(request: Request) -> Response:
    """What the server and its engine have counted."""
    text, media_type = expose(serving_of(request), request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": media_type})


ROUTES = [Route("/metrics", metrics, methods=["GET"])]
