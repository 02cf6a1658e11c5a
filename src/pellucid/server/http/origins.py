"""Where a request may come from, by its Host and Origin headers: what keeps the pages of others from a local server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from pellucid.server.settings import ANY

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class AllowedHosts:
    """By which names browsers may reach the server.

    A page of an attacker whose name is made to resolve to this machine (DNS rebinding) sends its own name as Host. So
    allowed are localhost, addresses, the name that the server listens on, and those that were named.
    """

    def __init__(self, host: str, allowed_hosts: Iterable[str]) -> None:
        self._names = {host.lower(), "localhost", *allowed_hosts}

    def allows(self, host: str) -> bool:
        """Whether a Host header of `host` is one of them, whatever its port."""
        if ANY in self._names:
            return True
        parts = _AUTHORITY.fullmatch(host.lower())
        if parts is None:
            return False
        name = parts[1].strip("[]").removesuffix(".")
        return name in self._names or name.endswith(".localhost") or _is_address(name)


class AllowedOrigins:
    """Of which origins pages may call the server: its own, and those that were named."""

    def __init__(self, cors_origins: Iterable[str]) -> None:
        self._origins = frozenset(cors_origins)

    def names(self, origin: str) -> bool:
        """Whether pages of `origin` may read answers though it is not the server's own."""
        return ANY in self._origins or origin.lower() in self._origins

    @staticmethod
    def is_own(origin: str, host: str) -> bool:
        """Whether a page of `origin` came from the server that it calls as `host`."""
        scheme, _, authority = origin.lower().partition("://")
        return scheme in _DEFAULT_PORTS and _split(authority, scheme) == _split(host.lower(), scheme) is not None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _split(authority: str, scheme: str) -> tuple[str, str] | None:
    parts = _AUTHORITY.fullmatch(authority)
    return parts and (parts[1], parts[2] or _DEFAULT_PORTS[scheme])
