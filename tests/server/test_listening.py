from __future__ import annotations

import errno
import resource
import socket
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.listening import OTHER_FILES, allow_connections, bind, is_loopback, url_of

HAS_IPV6 = socket.has_ipv6 and socket.has_dualstack_ipv6()


@pytest.mark.parametrize(
    ("host", "url", "loopback"),
    [
        ("127.0.0.1", "http://127.0.0.1:", True),
        ("localhost", "http://127.0.0.1:", True),
        ("0.0.0.0", "http://0.0.0.0:", False),
        pytest.param("::1", "http://[::1]:", True, marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")),
        pytest.param("::", "http://[::]:", False, marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")),
    ],
)
def test_it_listens_at_once(host: str, url: str, loopback: bool) -> None:
    with bind(host, 0) as listener:
        assert url_of(listener).startswith(url)
        assert is_loopback(listener) == loopback
        target = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, listener.getsockname()[0])
        socket.create_connection((target, listener.getsockname()[1]), timeout=10).close()


def test_connections_do_not_hold_small_answers_back() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=10):
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("number", "param", "message"),
    [
        (errno.EADDRINUSE, "port", "port 80 of 127.0.0.1 is in use: "),
        (errno.EACCES, "port", "port 80 is reserved"),
        (errno.EADDRNOTAVAIL, "host", "host 127.0.0.1 is not an address of this machine"),
        (errno.EMFILE, "port", "cannot listen on port 80 of 127.0.0.1: Too many open files"),
    ],
)
def test_why_it_cannot(monkeypatch: pytest.MonkeyPatch, number: int, param: str, message: str) -> None:
    def create_server(*_: Any, **__: Any) -> socket.socket:
        raise OSError(number, "Too many open files")

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(InvalidRequestError) as caught:
        bind("127.0.0.1", 80)
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


def test_a_host_that_is_not_known() -> None:
    with pytest.raises(InvalidRequestError, match=r"host 'host.invalid' is not known"):
        bind("host.invalid", 0)


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "."])
def test_what_is_no_name_of_a_machine(host: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"host .* is not") as caught:
        bind(host, 0)
    assert caught.value.param == "host"


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised"),
    [
        (1024, 4096, 2000, 2000 + OTHER_FILES),
        (1024, 1500, 1500 - OTHER_FILES, 1500),
        (1024, resource.RLIM_INFINITY, 2000, 2000 + OTHER_FILES),
        (5000, 5000, 2000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, None),
    ],
)
def test_open_files_are_permitted_for_as_many_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, connections: int, raised: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert allow_connections(1000) == connections
    assert asked == ([] if raised is None else [(raised, hard)])


def test_a_system_that_permits_no_more_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert allow_connections(1000) == 256 - OTHER_FILES
