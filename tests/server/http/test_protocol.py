"""One connection: its limits of time and size, and errors in JSON whatever comes."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http import h11_impl

from pellucid.server.http import protocol
from pellucid.server.http.protocol import protocol_class
from pellucid.server.settings import ServerSettings
from tests.support.raw_http import PATIENCE, RawServer, request, serving_http

MEGABYTE = 1 << 20


async def echo(request: Request) -> Response:
    return Response(str(len(await request.body())))


async def ignore(request: Request) -> Response:
    return Response("ignored")


APP = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/ignore", ignore, methods=["POST"])])


def with_server(
    test: Callable[[RawServer], Awaitable[None]], app: Any = APP, *, max_connections: int = 100, **settings: Any
) -> None:
    async def run() -> None:
        async with serving_http(app, ServerSettings(model="m", max_connections=max_connections, **settings)) as server:
            await test(server)
            assert (await server.ask(request(b"123"))).body == b"3"  # healthy afterwards

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "status", "code", "message"),
    [
        ((b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"x" * MEGABYTE,), 431, "header_too_large", "over 65,536 bytes"),
        ((b"GET /" + b"x" * MEGABYTE + b" HTTP/1.1\r\n\r\n",), 431, "header_too_large", "over 65,536 bytes"),
        ((b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 200_000, b"\r\n"), 431, "header_too_large", "over 65,536 bytes"),
        ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",), 400, "invalid_request", "this is not HTTP/1.1: "),
        ((b"hello\r\n\r\n",), 400, "invalid_request", "this is not HTTP/1.1: "),
        ((b"GET / HTTP/1.1\r\n\r\n",), 400, "invalid_request", "Missing mandatory Host: header"),
        ((b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",), 400, "invalid_request", "Host"),
        ((b"GET / HTTP/1.1\r\nHost: a\r\n \xff: \x00b\r\n\r\n",), 400, "invalid_request", "this is not HTTP/1.1: "),
        ((b"GET / HTTP/1.1\r\nHost: a\r\nA\0: b\r\n\r\n",), 400, "invalid_request", "this is not HTTP/1.1: "),
        ((b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",), 400, "invalid_request", "Content-Length"),
        (
            (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",),
            400,
            "invalid_request",
            "",
        ),
        ((b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",), 400, "invalid_request", "chunked"),
        (
            (request(b"1", chunk=1, headers={"Content-Length": "9"}),),
            400,
            "invalid_request",
            "where does the body end",
        ),
        ((request(b"1", chunk=1).replace(b"/1.1", b"/1.0"),), 400, "invalid_request", "where does the body end"),
        ((request(b"1", chunk=1)[:-8] + b"zz\r\n",), 400, "invalid_request", "this is not HTTP/1.1: "),
        ((request(b"1", chunk=1)[:-8] + b"f" * 100_000,), 400, "invalid_request", "this is not HTTP/1.1: "),
    ],
)
def test_what_is_not_http(sent: tuple[bytes, ...], status: int, code: str, message: str) -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        sending = asyncio.create_task(client.send(*sent))
        answer = await client.answer()
        await sending
        assert (answer.status, answer.error["code"]) == (status, code)
        assert message in answer.error["message"]
        assert len(answer.error["message"]) <= 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        assert await client.closed() == b""
        client.close()

    with_server(test)


def test_a_body_that_breaks_after_a_head_without_an_answer_in_it() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        status, headers = await client.head()
        assert status == 400
        assert int(headers["content-length"]) > 0
        assert await client.closed() == b""
        client.close()

    with_server(test)


def test_what_does_not_become_a_request_is_logged_once_without_what_it_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def test(server: RawServer) -> None:
        assert (await server.ask(b"secret\r\n\r\n")).status == 400
        assert (await server.ask(request(b"secret")[:-1])).status == 408

    with_server(test, body_timeout=0.5)
    told = [record for record in caplog.records if record.name == "pellucid.server" or record.levelname == "WARNING"]
    assert [record.getMessage() for record in told] == ["no whole request"] * 2
    assert [vars(record)["fields"]["status"] for record in told] == [400, 408]
    assert "secret" not in caplog.text


def test_who_asks_for_another_protocol_is_answered_in_this_one(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: RawServer) -> None:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert (await server.ask(request(b"12", headers=upgrade))).body == b"2"
        assert not caplog.records

    with_server(test)


def test_an_application_whose_body_breaks_is_told_that_the_client_left() -> None:
    left: list[type[BaseException]] = []

    async def read(request: Request) -> Response:
        try:
            return Response(str(len(await request.body())))
        except ClientDisconnect as error:
            left.append(type(error))
            raise

    app = Starlette(
        routes=[Route("/", read, methods=["POST"])],
        exception_handlers={ClientDisconnect: lambda *_: Response(status_code=499)},
    )

    async def test(server: RawServer) -> None:
        answer = await server.ask(request(b"1", chunk=1)[:-8] + b"zz\r\n")
        assert answer.status == 400
        assert left == [ClientDisconnect]

    with_server(test, app)


def test_headers_that_trickle_in_have_a_time_limit() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n")

        async def trickle() -> None:
            while True:
                await client.send(b"A: b\r\n")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        answer = await client.answer()
        trickling.cancel()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert answer.error["message"] == "the headers of the request are not complete after 0.5 s"
        client.close()

    with_server(test, header_timeout=0.5)


def test_a_connection_on_which_nothing_comes_is_closed() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        assert await client.closed() == b""
        client.close()

    with_server(test, header_timeout=0.5)


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_body_has_a_time_limit(chunk: int) -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request(b"12345", chunk=chunk)[:-2])
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert answer.error["message"] == "the body of the request is not complete after 0.5 s"
        client.close()

    with_server(test, body_timeout=0.5, header_timeout=60)


def test_a_connection_is_kept_and_closed_when_idle() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        for body in (b"", b"12", b"123"):
            await client.send(request(body))
            assert (await client.answer()).body == str(len(body)).encode()
        assert await client.closed() == b""
        client.close()

    with_server(test, keep_alive_timeout=0.5)


def test_the_time_limit_of_headers_is_not_that_of_answers() -> None:
    async def slow(request: Request) -> Response:
        async def pieces() -> Any:
            for _ in range(8):
                yield b"."
                await asyncio.sleep(0.1)

        return Response(str(len(await request.body()))) if await request.body() else StreamingResponse(pieces())

    async def test(server: RawServer) -> None:
        assert (await server.ask(request(method="GET"))).body == b"........"

    with_server(
        test, Starlette(routes=[Route("/", slow, methods=["GET", "POST"])]), header_timeout=0.5, body_timeout=0.5
    )


def test_requests_sent_at_once_are_answered_in_turn() -> None:
    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request(b"1") + request(b"12", chunk=1) + request(method="GET") + request(b"1234"))
        assert [(await client.answer()).body for _ in range(4)] == [b"1", b"2", b"0", b"4"]
        client.close()

    with_server(test)


def test_a_body_that_nobody_reads_does_not_cost_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", PATIENCE)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        for body in (b"x" * 5 * MEGABYTE, b"1"):
            await client.send(request(body, path="/ignore"))
            assert (await client.answer()).body == b"ignored"
        client.close()

    with_server(test)


def test_a_body_that_nobody_reads_is_not_taken_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request(b"", path="/ignore", headers={"Content-Length": str(10**15)}))

        async def flood() -> None:
            while not client.writer.is_closing():
                await client.send(b"x" * 10_000)
                await asyncio.sleep(0.001)

        flooding = asyncio.create_task(flood())
        assert (await client.answer()).body == b"ignored"
        assert await client.closed() == b""
        flooding.cancel()
        client.close()

    with_server(test)


def test_a_client_that_asks_before_it_sends_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)

    async def refuse(request: Request) -> Response:
        return Response(status_code=413) if request.headers["content-length"] != "3" else await echo(request)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request(headers={"Content-Length": "1000000", "Expect": "100-continue"}))
        assert (await client.answer()).status == 413
        assert await client.closed() == b""
        client.close()

    with_server(test, Starlette(routes=[Route("/", refuse, methods=["POST"])]))


def test_an_answer_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.3)
    ended = asyncio.Event()

    async def endless(request: Request) -> Response:
        if body := await request.body():
            return Response(str(len(body)))

        async def pieces() -> Any:
            try:
                while not await request.is_disconnected():
                    yield b"x" * 100_000
            finally:
                ended.set()

        return StreamingResponse(pieces())

    async def test(server: RawServer) -> None:
        client = await server.connect()
        await client.send(request(method="GET"))
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
        client.close()

    with_server(test, Starlette(routes=[Route("/", endless, methods=["GET", "POST"])]))


def test_connections_beyond_the_limit() -> None:
    async def test(server: RawServer) -> None:
        kept = [await server.connect() for _ in range(2)]
        for client in kept:
            await client.send(request(b"1"))
            assert (await client.answer()).status == 200
        refused = await server.connect()
        await refused.send(request(b"x" * MEGABYTE))
        answer = await refused.answer()
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert await refused.closed() == b""
        silent = [await server.connect() for _ in range(2)]
        await silent[1].send(request(b"1"))
        assert (await silent[1].answer()).status == 503
        dropped = await server.connect()
        others = [await server.connect() for _ in range(2)]
        await dropped.send(request(b"1"))
        assert await others[1].closed() == b""
        await kept[0].send(request(b"12"))
        assert (await kept[0].answer()).body == b"2"
        for client in [*kept, *silent, *others, refused, dropped]:
            client.close()
        async with asyncio.timeout(PATIENCE):
            while server.state.connections:
                await asyncio.sleep(0.01)

    with_server(test, max_connections=2)


def test_nothing_is_left_behind() -> None:
    async def test(server: RawServer) -> None:
        for sent in (b"", b"GET", request(b"12345")[:-2], request(b"1"), b"\0\r\n\r\n"):
            for _ in range(5):
                client = await server.connect()
                await client.send(sent)
                client.close()
        async with asyncio.timeout(PATIENCE):
            while server.state.connections or server.state.tasks:
                await asyncio.sleep(0.01)

    with_server(test)


def test_under_the_server_of_uvicorn() -> None:
    """Which ends though one client is in the middle of its headers, and another is being thrown out."""

    async def run() -> None:
        settings = ServerSettings(model="m", header_timeout=0.5)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(APP, http=protocol_class(settings), ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve([listener]))
        raw = RawServer(listener.getsockname()[1], server.server_state)
        assert (await raw.ask(request(b"1"))).body == b"1"
        assert (await raw.ask(b"hello\r\n\r\n")).status == 400
        halfway, broken = await raw.connect(), await raw.connect()
        await halfway.send(b"GET / HT")
        await broken.send(b"hello\r\n\r\n")
        assert (await broken.answer()).status == 400
        server.should_exit = True
        async with asyncio.timeout(PATIENCE):
            await serving
        halfway.close()
        broken.close()

    asyncio.run(run())


def test_what_the_protocol_leans_on() -> None:
    """Whoever updates uvicorn or h11 learns here what must be looked at again."""
    settings = ServerSettings(model="m")
    config = uvicorn.Config(APP, http=protocol_class(settings), log_config=None)
    config.load()

    async def run() -> None:
        state = uvicorn.Server(config).server_state
        made = config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]
        for name in ("app", "conn", "connections", "cycle", "flow", "logger", "loop"):
            assert hasattr(made, name)
        for name in ("timeout_keep_alive", "timeout_keep_alive_task"):
            assert hasattr(made, name)
        assert made.conn._max_incomplete_event_size == settings.max_header_bytes  # type: ignore[attr-defined]

    asyncio.run(run())
    cycle = set(inspect.getsource(h11_impl.RequestResponseCycle.__init__).split())
    names = ("disconnected", "flow", "message_event", "response_complete", "scope", "transport")
    assert {f"self.{name}" for name in names} <= cycle
    for name in (
        "connection_made",
        "connection_lost",
        "data_received",
        "on_response_complete",
        "pause_writing",
        "resume_writing",
        "send_400_response",
    ):
        assert name in vars(h11_impl.H11Protocol)
        assert name in vars(protocol._LimitedProtocol)
    assert "self.send_400_response(" in inspect.getsource(h11_impl.H11Protocol.handle_events)
    assert h11.RemoteProtocolError("").error_status_hint == 400


def test_a_mutant_without_time_limits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol._LimitedProtocol, "_watch", lambda self: None)

    async def test(server: RawServer) -> None:
        client = await server.connect()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.answer()
        client.close()

    with_server(test, header_timeout=0.1)


def test_errors_before_a_request_are_in_the_form_of_openai() -> None:
    async def test(server: RawServer) -> None:
        answer = await server.ask(b"hello\r\n\r\n")
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}

    with_server(test)
