from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.listening import bind, is_loopback, url_of

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
