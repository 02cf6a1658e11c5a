"""Which hosts and origins are let in."""

from __future__ import annotations

import pytest

from pellucid.server.http.origins import AllowedHosts, AllowedOrigins


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "localhost.:8000",
        "a.b.localhost:1",
        "127.0.0.1",
        "127.0.0.1:8000",
        "192.168.1.7:80",
        "[::1]:8000",
        "[fe80::1]",
        "server.example",
        "Extra.Example:443",
        "extra.example.",
    ],
)
def test_allowed_hosts(host: str) -> None:
    assert AllowedHosts("Server.example", ["extra.example"]).allows(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evillocalhost",
        "evil.extra.example",
        "extra.example@evil.example",
        "extra.example/evil.example",
        "extra.example, evil.example",
        "localhost:80:80",
        "localhost:",
        "127.1",
        "0x7f.0.0.1",
        "[localhost]",
        "[::1",
        "",
        " ",
        "\xe9vil.example",
    ],
)
def test_other_hosts(host: str) -> None:
    assert not AllowedHosts("server.example", ["extra.example"]).allows(host)
    assert AllowedHosts("127.0.0.1", ["*"]).allows("evil.example:8000")


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://LOCALHOST:8000", "localhost:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://a.example", "a.example", True),  # TLS ends before this server
        ("https://a.example", "a.example:443", True),
        ("http://a.example:80", "a.example", True),
        ("http://localhost:3000", "localhost:8000", False),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("http://evil.example", "127.0.0.1:8000", False),
        ("http://127.0.0.1:8000.evil.example", "127.0.0.1:8000", False),
        ("http://127.0.0.1:8000/", "127.0.0.1:8000", False),
        ("file://127.0.0.1:8000", "127.0.0.1:8000", False),
        ("null", "null", False),
        ("", "", False),
        ("http://", "", False),
    ],
)
def test_own_origin(origin: str, host: str, is_own: bool) -> None:
    assert AllowedOrigins.is_own(origin, host) is is_own


def test_named_origins() -> None:
    origins = AllowedOrigins(["https://chat.example"])
    assert origins.names("https://Chat.example")
    for other in ("http://chat.example", "https://chat.example:444", "https://a.chat.example", "null", ""):
        assert not origins.names(other)
        assert AllowedOrigins(["*"]).names(other)
