"""Who gets in, and what browsers are told about the answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from itertools import islice

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pellucid.core.errors import PellucidError
from pellucid.core.validation import shown
from pellucid.server.errors import AuthenticationError, ForbiddenError
from pellucid.server.http.origins import AllowedHosts, AllowedOrigins
from pellucid.server.http.replies import send_error
from pellucid.server.settings import ServerSettings

OPEN_PATHS = frozenset(("/health",))
"""What needs no API key. Everything else does, whether there is such a route or not."""
MAX_CREDENTIALS = 4
"""Of one request: to check one takes as long as there are keys."""

_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PREFLIGHT_SECONDS = 600


class Security:
    """ASGI middleware: API keys, Host, Origin, CORS, and headers on every answer that does not have its own.

    - Where there are API keys, a request must carry one as `Authorization: Bearer`, as `x-api-key`, or as the password
      of Basic authentication, with which a browser can open the page. OPEN_PATHS are the only exception.
    - A Host that is not allowed (AllowedHosts), or an Origin that is neither the server's own nor named, is refused:
      403, whatever the method and the path. Programs other than browsers send no Origin.
    - Origins that are named get the CORS headers, and their preflight requests are answered here, without a key.
      Credentials that a browser would add by itself are never asked for, so "*" is safe as long as there are keys.

    The state of a request gets `api_key`: the SHA-256 of its key in hexadecimal, or "" where none is asked for.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._api_keys = settings.api_keys
        self._hosts = AllowedHosts(settings.host, settings.allowed_hosts)
        self._origins = AllowedOrigins(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), origin)
            await send(message)

        app = self._app
        try:
            self._check_source(headers, origin)
            if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                app = self._preflight(headers)
            else:
                scope.setdefault("state", {})["api_key"] = self._authenticate(scope["path"], headers)
        except PellucidError as error:
            await send_error(error, scope, receive, send_guarded)
            return
        await app(scope, receive, send_guarded)

    def _check_source(self, headers: Headers, origin: str | None) -> None:
        host = headers.get("host")  # HTTP/1.0 knows none, and browsers do not speak it
        if host is not None and not self._hosts.allows(host):
            raise ForbiddenError(
                f"the Host {shown(host)} is not one that this server goes by: start it with --allowed-host NAME "
                "if it should be",
                param="Host",
            )
        if origin is None or self._origins.names(origin) or self._origins.is_own(origin, host or ""):
            return
        raise ForbiddenError(
            f"pages of the Origin {shown(origin)} may not call this server: start it with --cors-origin ORIGIN "
            "if they should",
            param="Origin",
        )

    def _authenticate(self, path: str, headers: Headers) -> str:
        if not self._api_keys or path in OPEN_PATHS:
            return ""
        credentials = list(islice(_credentials(headers), MAX_CREDENTIALS))
        for key in credentials:
            if (found := self._api_keys.identify(key)) is not None:
                return found
        raise AuthenticationError(
            "the API key is not known here"
            if credentials
            else "this server wants an API key: send it as Authorization: Bearer KEY, or as x-api-key",
            param="Authorization",
        )

    def _preflight(self, headers: Headers) -> ASGIApp:
        answer = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
        }
        if wanted := headers.get("access-control-request-headers"):
            answer["Access-Control-Allow-Headers"] = wanted
        if headers.get("access-control-request-private-network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"
        return Response(None, 204, answer)

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        is_page = headers.get("content-type", "").startswith("text/html")
        headers.setdefault("Content-Security-Policy", _PAGE_POLICY if is_page else _DATA_POLICY)
        if origin is not None and self._origins.names(origin):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after"
            headers.add_vary_header("Origin")


def _credentials(headers: Headers) -> Iterator[bytes]:
    """The keys that a request carries, right or wrong."""
    for name, value in headers.raw:
        if name == b"x-api-key":
            yield value
        elif name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield credentials.strip()
            elif scheme.lower() == b"basic":
                try:
                    yield base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
                except binascii.Error:
                    yield b""
