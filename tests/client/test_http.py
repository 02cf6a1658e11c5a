from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from pellucid.client import http
from pellucid.client.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    ProtocolError,
    ServerError,
    ServerTimeoutError,
)
from pellucid.client.http import HttpClient, Origin
from pellucid.core.errors import InvalidRequestError
from tests.support.fake_api_server import FakeApiServer, FakeReply, FakeRequest, Script

PATIENCE = 600  # seconds, for a machine that is busy or stands still


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await coroutine

    return asyncio.run(bounded())


def sending(*pieces: bytes, closes: bool = False) -> Script:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.write(*pieces)
        reply.keeps_alive = not closes

    return script


async def get(client: HttpClient, path: str = "/x") -> bytes:
    async with client.request("GET", path) as response:
        return await response.read(1000)


def body_of(*pieces: bytes, closes: bool = False) -> bytes:
    with FakeApiServer(sending(*pieces, closes=closes)) as server:
        return run(get(HttpClient(server.url)))


@pytest.mark.parametrize(
    ("url", "origin", "path", "port"),
    [
        ("http://localhost", "http://localhost", "", 80),
        ("https://api.example.org/v1/", "https://api.example.org", "/v1", 443),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000", "", 8000),
        ("HTTP://[::1]:8080/a/b", "http://[::1]:8080", "/a/b", 8080),
    ],
)
def test_origins(url: str, origin: str, path: str, port: int) -> None:
    parsed = Origin(url)
    assert (str(parsed), parsed.path, parsed.port) == (origin, path, port)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host:x",
        "http://u:p@host",
        "http://h?q",
        "http://h#f",
        "http://h/a b",
        "http://h\r\nX: y",
        "http://ä.org",
        "http://a..b",
        "http://" + "a" * 70,
        "http://[::1",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        HttpClient(url)
    assert caught.value.param == "url"


@pytest.mark.parametrize(
    "header", [("X-Key", "a\r\nX-Evil: 1"), ("a b", "c"), ("X", "\0"), ("X", "日本"), ("Content-Length", "3")]
)
def test_a_header_that_cannot_be_sent_is_refused_and_its_value_not_shown(header: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        HttpClient("http://h", headers=[header])
    assert caught.value.param == "header"
    assert header[1] == "c" or header[1] not in caught.value.message


def test_a_request_has_what_it_was_given() -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.json({}, 201, {"X-Twice": "1", "x-twice": "2"})

    async def post(url: str) -> None:
        client = HttpClient(f"{url}/base", headers=[("X-Mine", "1"), ("User-Agent", "me")])
        async with client.request("POST", "/p", headers=[("X-Also", "2")], body=b"\0body") as response:
            assert response.status == 201
            assert response.headers["x-twice"] == "1, 2"
            assert await response.read(100) == b"{}"
            assert await response.read_some() == b""

    with FakeApiServer(script) as server:
        run(post(server.url))
        request = server.requests[0]
        assert (request.method, request.path, request.data) == ("POST", "/base/p", b"\0body")
        expected = {"host": f"127.0.0.1:{server.port}", "x-mine": "1", "x-also": "2", "user-agent": "me"}
        assert expected.items() <= request.headers.items()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhel\nlo\r\n2;x=y\r\n!!\r\n0\r\nTrailer: 1\r\n\r\n"
REDIRECT = b"HTTP/1.1 307 X\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n"
GZIPPED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"
NOT_HTTP = "does not answer in HTTP/1.1"
WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhel\nlo!!"


@pytest.mark.parametrize("data", [CHUNKED, WITH_LENGTH])
def test_a_body_in_pieces_of_any_size(data: bytes) -> None:
    for size in (1, 2, 3, 7, 1000):
        assert body_of(*(data[i : i + size] for i in range(0, len(data), size))) == b"hel\nlo!!"


def test_a_body_that_ends_with_the_connection() -> None:
    assert body_of(b"HTTP/1.0 200 OK\r\n\r\nall", b" of it", closes=True) == b"all of it"


def test_informational_responses_are_passed_over() -> None:
    assert body_of(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WITH_LENGTH) == b"hel\nlo!!"


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        ([b""], ConnectionLostError, "closed the connection before"),
        ([CHUNKED[:60]], ConnectionLostError, "closed the connection before"),
        ([WITH_LENGTH[:-2]], ConnectionLostError, "closed the connection before"),
        ([b"220 smtp.example.org\r\n\r\n"], ProtocolError, NOT_HTTP),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000], ProtocolError, NOT_HTTP),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], ProtocolError, NOT_HTTP),
        ([REDIRECT], ProtocolError, "redirects to 'http://evil/'"),
        ([GZIPPED], ProtocolError, "content-encoding 'gzip'"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000], ProtocolError, "more than 1000 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_answer(pieces: list[bytes], error: type[ServerError], message: str) -> None:
    with pytest.raises(error, match=message):
        body_of(*pieces, closes=True)


def test_a_reset_is_a_lost_connection() -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.write(WITH_LENGTH[:-2])
        reply.reset()

    with FakeApiServer(script) as server, pytest.raises(ConnectionLostError):
        run(get(HttpClient(server.url)))


def test_silence_is_a_timeout_before_and_within_the_answer() -> None:
    for begun in (b"", CHUNKED[:60]):

        async def script(request: FakeRequest, reply: FakeReply, begun: bytes = begun) -> None:
            await reply.write(begun)
            await reply.until_client_leaves()

        with FakeApiServer(script) as server, pytest.raises(ServerTimeoutError, match=r"nothing for 0.2 seconds"):
            run(get(HttpClient(server.url, read_timeout=0.2)))


def test_only_silence_that_is_waited_for_counts() -> None:
    may_send = threading.Semaphore(0)
    head = len(WITH_LENGTH) - 8

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.write(WITH_LENGTH[:head])
        for i in range(head, len(WITH_LENGTH)):
            await asyncio.to_thread(may_send.acquire)
            await reply.write(WITH_LENGTH[i : i + 1])

    async def read_slowly(url: str) -> bytes:
        loop = asyncio.get_running_loop()
        clock, skew = loop.time, 0.0
        loop.time = lambda: clock() + skew  # type: ignore[method-assign]
        body = b""
        async with HttpClient(url, read_timeout=1000).request("GET", "/x") as response:
            # The server takes longer than the timeout in all, but not for any one byte.
            for _ in range(4):
                skew += 600
                may_send.release()
                body += await response.read_some()
            # The reader takes longer than that, and the timer goes off in the meantime.
            skew += 2000
            await asyncio.sleep(0.01)
            may_send.release(4)
            return body + await response.read(100)

    with FakeApiServer(script) as server:
        assert asyncio.run(read_slowly(server.url)) == b"hel\nlo!!"


def test_connections_are_kept_and_one_is_closed_that_was_not_read_to_its_end() -> None:
    async def requests(server: FakeApiServer) -> None:
        client = HttpClient(server.url)
        for _ in range(3):
            await get(client)
        assert server.connections == 1
        await asyncio.gather(get(client), get(client))
        assert server.connections == 2
        async with client.request("GET", "/x") as response:
            assert response.status == 200
        await client.aclose()
        await get(client)
        assert server.connections == 3

    with FakeApiServer(sending(CHUNKED)) as server:
        run(requests(server))


def test_a_connection_that_the_server_closed_or_that_was_idle_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def two(client: HttpClient, pause: float) -> None:
        await get(client)
        await asyncio.sleep(pause)
        await get(client)

    with FakeApiServer(sending(WITH_LENGTH, closes=True)) as server:
        run(two(HttpClient(server.url), 0.1))
    monkeypatch.setattr(http, "MAX_IDLE_SECONDS", 0.0)
    with FakeApiServer(sending(WITH_LENGTH)) as server:
        run(two(HttpClient(server.url), 0.01))
        assert server.connections == 2


@pytest.mark.parametrize("resets", [False, True])
def test_a_kept_connection_that_turns_out_to_be_closed_is_replaced_once(resets: bool) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        # Each connection serves one request, and ends when it hears of another: as llama.cpp's server does.
        if len(server.requests) % 2:
            await reply.write(WITH_LENGTH)
        elif resets:
            reply.reset()
        else:
            reply.close()

    async def two(client: HttpClient) -> None:
        assert await get(client) == b"hel\nlo!!"
        assert await get(client) == b"hel\nlo!!"
        await client.aclose()

    with FakeApiServer(script) as server:
        run(two(HttpClient(server.url)))
        assert len(server.requests) == 3


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_nothing_else_is_sent_twice(begun: bytes) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        # The first connection fails at once; the second serves once, and fails after it has begun to answer.
        if len(server.requests) == 2:
            await reply.write(WITH_LENGTH)
        else:
            await reply.write(begun)
            reply.close()

    async def three(client: HttpClient) -> None:
        with pytest.raises(ConnectionLostError):
            await get(client)
        await get(client)
        if begun:
            with pytest.raises(ConnectionLostError):
                await get(client)

    with FakeApiServer(script) as server:
        run(three(HttpClient(server.url)))
        assert len(server.requests) == (3 if begun else 2)


def test_leaving_early_disconnects() -> None:
    left: list[bool] = []

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.write(CHUNKED[:60])
        await reply.until_client_leaves()
        left.append(True)

    async def leave(url: str) -> None:
        async with HttpClient(url).request("GET", "/x") as response:
            assert await response.read_some()
        while not left:
            await asyncio.sleep(0.01)

    with FakeApiServer(script) as server:
        run(leave(server.url))


def test_an_answer_that_comes_before_the_request_is_read() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        while await reader.read(2**20):
            pass
        writer.close()

    async def post() -> tuple[int, bytes]:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server, client.request("POST", "/x", body=b"x" * 2**22) as response:
            return response.status, await response.read(100)

    assert run(post()) == (413, b"no")


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(ConnectionFailedError, match=rf"no connection to http://{host}:{port}: nothing listens"):
                run(get(HttpClient(f"http://{host}:{port}")))


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(ConnectionFailedError, match=r"no connection to http://nowhere.invalid: "):
        run(get(HttpClient("http://nowhere.invalid")))


def test_a_client_that_sends_again_what_was_heard_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: a lost connection is replaced whatever had come on it.
    monkeypatch.setattr(http._Connection, "was_closed_unheard", lambda connection: True)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_nothing_else_is_sent_twice(b"HTTP/1.1 200 OK\r\n")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert body_of(WITH_LENGTH) == b"hel\nlo!!"


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes a certificate, is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            openssl,
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WITH_LENGTH)
        await reader.read()
        writer.close()

    async def fetch() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        client = HttpClient(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server:
            try:
                return await get(client)
            finally:
                await client.aclose()

    with pytest.raises(ConnectionFailedError, match=r"no secure connection .* self.signed"):
        run(fetch())
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    assert run(fetch()) == b"hel\nlo!!"


def test_tls_with_a_server_that_has_none() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def fetch() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            await get(HttpClient(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"))

    with pytest.raises(ConnectionFailedError, match="no secure connection"):
        run(fetch())
