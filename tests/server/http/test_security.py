"""Who gets in, and what is on every answer."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any

import pytest
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pellucid.server.app import create_app, routes
from pellucid.server.http import security
from pellucid.server.http.security import OPEN_PATHS, Security
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from tests.support.raw_http import Answer

KEYS = ("first-key", "second-key")


def ask(app: ASGIApp, method: str = "GET", path: str = "/v1/models", *headers: tuple[str, str]) -> Answer:
    """What answers a request; a Host is added where there is none."""
    fields = list(headers)
    if not any(name == "host" for name, _ in fields):
        fields.append(("host", "127.0.0.1:8000"))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields if name],
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    found: dict[str, str] = {}
    for name, value in sent[0]["headers"]:
        key = name.decode().lower()
        found[key] = f"{found[key]} | {value.decode()}" if key in found else value.decode()
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


def guarded(inner: ASGIApp | None = None, **settings: Any) -> ASGIApp:
    return Security(inner or PlainTextResponse("inside"), ServerSettings(model="m", **settings))


def basic(user_and_key: str) -> tuple[str, str]:
    return "authorization", "Basic " + base64.b64encode(user_and_key.encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        ("authorization", "Bearer first-key"),
        ("authorization", "bearer   second-key "),
        ("x-api-key", "second-key"),
        basic("anybody:first-key"),
        basic(":second-key"),
    ],
)
def test_a_key_lets_in(header: tuple[str, str]) -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["api_key"])
        await Response()(scope, receive, send)

    assert ask(guarded(inner, api_keys=KEYS), "POST", "/v1/completions", header).status == 200
    assert len(seen[0]) == 64


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer")],
        [("authorization", "first-key")],
        [("authorization", "Digest first-key")],
        [("x-api-key", "")],
        [("x-api-key", "first-key, second-key")],
        [("x-api-key", "first-ke")],
        [basic("first-key")],
        [basic("first-key:")],
        [("authorization", "Basic !!!")],
        [("authorization", "Basic Zmlyc3Q")],
        [("x-api-key", "\xe9")],
        [("cookie", "api_key=first-key")],
        [("x-api-key", f"wrong-{number}") for number in range(security.MAX_CREDENTIALS)] + [("x-api-key", KEYS[0])],
    ],
)
def test_without_a_key_nobody_gets_in(headers: list[tuple[str, str]]) -> None:
    for method, path in (("GET", "/"), ("POST", "/v1/completions"), ("GET", "/health/"), ("OPTIONS", "/no/such/path")):
        answer = ask(guarded(api_keys=KEYS), method, path, *headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == (
            'Bearer realm="pellucid" | Basic realm="pellucid", charset="UTF-8"'
        )
        assert "first" not in answer.body.decode()


def test_one_of_several_keys_is_enough() -> None:
    headers = [("authorization", "Bearer wrong"), ("x-api-key", KEYS[1])]
    assert ask(guarded(api_keys=KEYS), "GET", "/", *headers).status == 200


def test_without_keys_everybody_gets_in() -> None:
    assert ask(guarded()).status == 200
    assert ask(guarded(), "GET", "/", ("authorization", "Bearer whatever")).status == 200


def open_routes(app: ASGIApp, paths: list[tuple[str, str]]) -> set[str]:
    """The paths that answer something else than 401 without a key."""
    return {path for method, path in paths if ask(app, method, path).status != 401}


def test_every_route_but_health_wants_a_key() -> None:
    app = create_app(Serving(ServerSettings(model="m", api_keys=KEYS)))
    paths = [(method, re.sub(r"[{}]", "", route.path)) for route in routes() for method in route.methods or ()]
    paths += [(method, "/no/such/route") for method in ("GET", "POST", "DELETE", "OPTIONS")]
    assert len(paths) > len(routes()) > 0
    assert open_routes(app, paths) <= OPEN_PATHS == {"/health"}


def test_that_check_catches_a_server_that_lists_what_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant which asks for keys below /v1 only leaves a new route open."""
    authenticate = Security._authenticate

    def lenient(self: Security, path: str, headers: Any) -> str:
        return authenticate(self, path, headers) if path.startswith("/v1/") else ""

    app = guarded(api_keys=KEYS)
    paths = [("GET", "/v1/models"), ("GET", "/new-route")]
    assert open_routes(app, paths) == set()
    monkeypatch.setattr(Security, "_authenticate", lenient)
    assert open_routes(app, paths) == {"/new-route"}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", ""])
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/v1/completions"), ("OPTIONS", "/")])
def test_other_hosts_are_refused(host: str, method: str, path: str) -> None:
    answer = ask(guarded(), method, path, ("host", host))
    assert (answer.status, answer.error["param"]) == (403, "Host")
    assert ask(guarded(allowed_hosts=["*"]), method, path, ("host", host)).status == 200


def test_a_host_is_not_needed() -> None:
    assert ask(guarded(), "GET", "/", ("", ""), ("host", "localhost")).status == 200
    app = guarded()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    asyncio.run(app(scope, lambda: asyncio.sleep(0), send))  # type: ignore[arg-type, return-value]
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9000", "https://chat.example.evil.example"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_pages_of_other_origins_are_refused(origin: str, method: str) -> None:
    app = guarded(cors_origins=["https://chat.example"], api_keys=KEYS)
    preflight = ("access-control-request-method", "POST")
    key = ("x-api-key", KEYS[0])
    answer = ask(app, method, "/health", ("origin", origin), preflight, key)
    assert (answer.status, answer.error["param"]) == (403, "Origin")
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_may_call() -> None:
    answer = ask(guarded(), "POST", "/", ("origin", "http://127.0.0.1:8000"))
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("named", ["https://chat.example", "*"])
def test_a_named_origin_may_call(named: str) -> None:
    app = guarded(cors_origins=[named], api_keys=KEYS)
    origin = ("origin", "https://chat.example")
    preflight = ask(
        app,
        "OPTIONS",
        "/v1/chat/completions",
        origin,
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization, content-type"),
        ("access-control-request-private-network", "true"),
    )
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    assert preflight.headers["access-control-allow-methods"] == "GET, POST"
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    assert preflight.headers["access-control-allow-private-network"] == "true"
    closed = ask(app, "POST", "/v1/chat/completions", origin)
    assert closed.status == 401
    answer = ask(app, "POST", "/v1/chat/completions", origin, ("x-api-key", KEYS[0]))
    assert answer.status == 200
    for found in (preflight, closed, answer):  # a page must be able to read errors, too
        assert found.headers["access-control-allow-origin"] == "https://chat.example"
        assert found.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in found.headers


def test_an_options_request_that_is_no_preflight_needs_a_key() -> None:
    app = guarded(cors_origins=["*"], api_keys=KEYS)
    assert ask(app, "OPTIONS", "/", ("access-control-request-method", "POST")).status == 401
    assert ask(app, "OPTIONS", "/", ("origin", "https://chat.example")).status == 401


def test_headers_on_every_answer() -> None:
    answers = [
        ask(guarded()),
        ask(guarded(api_keys=KEYS)),
        ask(guarded(), "GET", "/", ("host", "evil.example")),
        ask(guarded(HTMLResponse("<p>page"))),
    ]
    assert [answer.status for answer in answers] == [200, 401, 403, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "unsafe" not in answer.headers["content-security-policy"]
    assert "script-src 'self'" in answers[3].headers["content-security-policy"]
    assert "script-src" not in answers[0].headers["content-security-policy"]


def test_an_answer_keeps_headers_of_its_own() -> None:
    own = {"Cache-Control": "max-age=60", "Content-Security-Policy": "default-src 'self'"}
    answer = ask(guarded(Response(headers=own)))
    assert answer.headers["cache-control"] == "max-age=60"
    assert answer.headers["content-security-policy"] == "default-src 'self'"


def test_web_sockets_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": []}
    asyncio.run(guarded()(scope, lambda: asyncio.sleep(0), send))  # type: ignore[arg-type, return-value]
    assert [message["type"] for message in sent] == ["websocket.close"]
