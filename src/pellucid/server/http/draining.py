"""Nothing new is begun once the server is about to end."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pellucid.core.errors import EngineClosedError
from pellucid.server.http.replies import send_error
from pellucid.server.serving import Serving


class RefuseWhileDraining:
    """ASGI middleware: while `serving` drains, what would begin work (a POST) is refused, and its connection closed.
    Everything else is answered, so that whoever asks for the state is told."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._serving.state != "draining" or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        error = EngineClosedError("the server is shutting down and takes no more requests")
        await send_error(error, scope, receive, send, close=True)
