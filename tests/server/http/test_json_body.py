"""The JSON body of a request: what is read of it, and what is not."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from pellucid.core.errors import PellucidError
from pellucid.server.http import json_body
from pellucid.server.http.json_body import MAX_BYTES_INLINE, read_json
from pellucid.server.http.replies import error_response, json_response
from pellucid.server.settings import ServerSettings
from tests.support.raw_http import request, serving_http

MAX_BYTES = 100_000


class Received:
    """The messages of a request, which counts how many were asked for."""

    def __init__(self, *parts: bytes, is_cut: bool = False) -> None:
        self.num_read = 0
        self._parts = parts
        self._is_cut = is_cut

    async def __call__(self) -> Message:
        self.num_read += 1
        if self.num_read > len(self._parts):
            return {"type": "http.disconnect"}
        more = self._is_cut or self.num_read < len(self._parts)
        return {"type": "http.request", "body": self._parts[self.num_read - 1], "more_body": more}


class Threads:
    """Stands for Serving, and counts what it was asked to run."""

    settings = ServerSettings(model="m", max_body_bytes=MAX_BYTES)

    def __init__(self) -> None:
        self.num_run = 0

    async def run(self, function: Any, *args: Any) -> Any:
        self.num_run += 1
        return await asyncio.to_thread(function, *args)


def read(received: Received, threads: Threads | None = None, **headers: str) -> dict[str, Any]:
    fields = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    app = SimpleNamespace(state=SimpleNamespace(serving=threads or Threads()))
    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(name.encode(), value.encode()) for name, value in fields.items() if value],
        "app": app,
    }
    return asyncio.run(read_json(Request(scope, received)))


def refused(received: Received, **headers: str) -> PellucidError:
    with pytest.raises(PellucidError) as caught:
        read(received, **headers)
    return caught.value


def body_of(size: int) -> bytes:
    return b'{"a":"' + b"x" * (size - 8) + b'"}'


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"', "application/x+json"],
)
def test_content_types_of_json(content_type: str) -> None:
    assert read(Received(b'{"a": ', b"1}"), content_type=content_type) == {"a": 1}


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"content_type": ""}, "Content-Type"),
        ({"content_type": "text/plain"}, "Content-Type"),
        ({"content_type": "application/x-www-form-urlencoded"}, "Content-Type"),
        ({"content_type": "text/application/json"}, "Content-Type"),
        ({"content_type": "application/json; charset=latin1"}, "Content-Type"),
        ({"content_encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_other_content_types(headers: dict[str, str], param: str) -> None:
    received = Received(b"{}")
    error = refused(received, **headers)
    assert (error.status, error.param, received.num_read) == (415, param, 0)


def test_a_body_at_the_limit_is_read_and_a_byte_more_is_not() -> None:
    data = body_of(MAX_BYTES)
    assert read(Received(data))["a"]
    assert read(Received(data[:7], data[7:]), content_length=str(MAX_BYTES))["a"]
    error = refused(Received(data[:7], data[7:] + b" "))
    assert (error.status, error.param) == (413, "body")
    assert "100,001 or more bytes; at most 100,000 are taken" in error.message


def test_nothing_is_read_of_a_body_that_says_it_is_too_large() -> None:
    for length in ("100001", "9" * 5000):
        received = Received(b"{}")
        error = refused(received, content_length=length)
        assert (error.status, received.num_read) == (413, 0)
    assert "has 100,001 bytes; at most 100,000" in refused(Received(), content_length="100001").message


def test_no_more_is_read_once_a_body_is_too_large() -> None:
    received = Received(*[b" " * 60_000] * 100)
    assert refused(received).status == 413
    assert received.num_read == 2


def test_a_client_that_leaves() -> None:
    for received in (Received(), Received(b'{"a": 1}', is_cut=True)):
        with pytest.raises(ClientDisconnect):
            read(received)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body is empty: a JSON object is expected"),
        (b"[1]", "the body must be a JSON object, not [1]"),
        (b"null", "the body must be a JSON object, not None"),
        (b" ", "the body is not valid JSON: Expecting value at line 1"),
        (b"{" * 90_000, "the body nests too deeply"),
    ],
)
def test_what_is_no_object(data: bytes, message: str) -> None:
    error = refused(Received(data))
    assert (error.status, error.param) == (400, "body")
    assert message in error.message


def test_large_bodies_are_decoded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding: list[bool] = []
    decode = json_body.decode_json

    def noting(data: bytes, name: str) -> Any:
        decoding.append(threading.current_thread() is threading.main_thread())
        return decode(data, name)

    monkeypatch.setattr(json_body, "decode_json", noting)
    threads = Threads()
    assert read(Received(body_of(MAX_BYTES_INLINE)), threads)["a"]
    assert (threads.num_run, decoding) == (0, [True])
    assert read(Received(body_of(MAX_BYTES_INLINE + 1)), threads)["a"]
    assert (threads.num_run, decoding) == (1, [True, False])


async def echo(request: Request) -> Response:
    try:
        return json_response({"found": len(json.dumps(await read_json(request)))})
    except PellucidError as error:
        return error_response(error, request.url.path)


def test_over_a_connection() -> None:
    async def run() -> None:
        app = Starlette(routes=[Route("/", echo, methods=["POST"])])
        app.state.serving = Threads()
        async with serving_http(app, ServerSettings(model="m")) as server:
            client = await server.connect()
            for chunk in (0, 1000):
                await client.send(request(body_of(MAX_BYTES), chunk=chunk))
                assert (await client.answer()).status == 200
                await client.send(request(body_of(MAX_BYTES + 1), chunk=chunk))
                assert (await client.answer()).status == 413
                await client.send(request(b"{}"))  # what was left of the body did not become a request
                assert (await client.answer()).status == 200
            await client.send(request(b'{"a":', chunk=3)[:-5])
            client.close()
            assert (await server.ask(request(b"{}"))).status == 200

    asyncio.run(run())
