"""Where a server listens."""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket

from pellucid.core.errors import InvalidRequestError

BACKLOG = 2048
"""Connections that wait to be accepted."""
OTHER_FILES = 128
"""Files that a process has open beside its connections, at most."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InvalidRequestError: it cannot, with the reason.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1 rather than ::1
        family, *_, address = found[0]
        dual_stack = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=dual_stack)
    except UnicodeError:  # of the codec that checks names
        raise InvalidRequestError(f"host {host!r} is not a name that a machine can have", param="host") from None
    except socket.gaierror as error:
        raise InvalidRequestError(f"host {host!r} is not known: {error.strerror}", param="host") from None
    except OSError as error:
        raise _refusal_to_listen(error, host, port) from None
    # Connections inherit it; asyncio sets it on those of its own sockets only. Without it, an answer of two writes
    # waits 40 ms until the client has acknowledged the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def _refusal_to_listen(error: OSError, host: str, port: int) -> InvalidRequestError:
    if error.errno == errno.EADDRINUSE:
        message = (
            f"port {port} of {host} is in use: stop what listens there, or choose another --port (0: any that is free)"
        )
    elif error.errno in (errno.EACCES, errno.EPERM):
        message = f"port {port} is reserved to the administrator: choose a --port from 1024"
    elif error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequestError(f"host {host} is not an address of this machine", param="host")
    else:
        message = f"cannot listen on port {port} of {host}: {error.strerror}"
    return InvalidRequestError(message, param="port")


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_connections(max_connections: int) -> int:
    """Let this process have so many connections open, and as many again that are turned away, as far as the system
    permits. Systems commonly begin with 1024 open files, and let a process raise that itself.

    Returns:
        How many connections it may have open, all told.
    """
    wanted = 2 * max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _is_below(soft, wanted):
        raised = hard if _is_below(hard, wanted) else wanted
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # macOS permits less than it says
            pass
    return (soft if _is_below(soft, wanted) else wanted) - OTHER_FILES


def _is_below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted
