"""JSON answers, errors among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pellucid.core.errors import PellucidError
from pellucid.server.anthropic.errors import error_body as anthropic_error_body
from pellucid.server.openai.responses import error_body as openai_error_body

MESSAGES_PATH = "/v1/messages"
"""Here and below it, errors have Anthropic's form."""
RETRY_AFTER_SECONDS = 1
"""What clients are told that may try again."""
_VALUES_AT_ONCE = 10_000
_CHARACTERS_AT_ONCE = 1 << 16
_LEVELS_IN_PARTS = 5
"""Of an answer's JSON: so far down are the lists that are as long as what was generated."""


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """`value` as compact JSON in UTF-8. Half a character (a lone surrogate), which UTF-8 cannot hold, is escaped.

    Raises:
        ValueError: it has a number that JSON does not have.
    """
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return _encode_ascii(value).encode()


def join_list(items: Iterable[bytes]) -> bytes:
    """The JSON list of `items`, which are JSON. A long answer is put together from parts: encoding one holds up every
    thread until it is done."""
    return b"[" + b",".join(items) + b"]"


def join_object(values: Mapping[str, bytes]) -> bytes:
    """The JSON object of `values`, which are JSON."""
    return b"{" + b",".join(json_bytes(name) + b":" + value for name, value in values.items()) + b"}"


def long_list(values: Sequence[int | str]) -> bytes:
    """A JSON list of however many numbers or strings."""
    parts = (values[begin : begin + _VALUES_AT_ONCE] for begin in range(0, len(values), _VALUES_AT_ONCE))
    return join_list(json_bytes(part)[1:-1] for part in parts)


def long_string(text: str) -> bytes:
    """A JSON string of however many characters."""
    parts = (text[begin : begin + _CHARACTERS_AT_ONCE] for begin in range(0, len(text), _CHARACTERS_AT_ONCE))
    return b'"' + b"".join(json_bytes(part)[1:-1] for part in parts) + b'"'


def long_json_bytes(value: Any, levels: int = _LEVELS_IN_PARTS) -> bytes:
    """As `json_bytes`, for an answer that may be long: in parts, of which none holds up other threads for long. Its
    objects have strings for names.

    Args:
        levels: how far down objects, and lists of objects and lists, are taken apart.
    """
    if levels and isinstance(value, dict):
        return join_object({name: long_json_bytes(item, levels - 1) for name, item in value.items()})
    if levels and isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return join_list(long_json_bytes(item, levels - 1) for item in value)
    return long_list(value) if isinstance(value, list) and len(value) > _VALUES_AT_ONCE else json_bytes(value)


def bytes_response(data: bytes) -> Response:
    """An answer whose JSON is there already."""
    return Response(data, media_type="application/json")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that is `value`."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def is_messages_path(path: str) -> bool:
    """Whether `path` speaks Anthropic's API."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def error_response(error: PellucidError, path: str) -> Response:
    """What answers a request to `path` that failed with `error`, in the form of its API."""
    body = anthropic_error_body(error) if is_messages_path(path) else openai_error_body(error)
    response = json_response(body, error.status)
    if error.status in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if error.status == 401:
        # A line for each, since some browsers read only the first of a line; they ask for a password by the second.
        response.headers.append("WWW-Authenticate", 'Bearer realm="pellucid"')
        response.headers.append("WWW-Authenticate", 'Basic realm="pellucid", charset="UTF-8"')
    return response


async def send_error(error: PellucidError, scope: Scope, receive: Receive, send: Send, *, close: bool = False) -> None:
    """Answer a request with `error`, on behalf of an ASGI middleware; the log has it from the request's state.

    Args:
        close: the connection, too.
    """
    scope.setdefault("state", {})["error"] = error
    response = error_response(error, scope["path"])
    if close:
        response.headers["Connection"] = "close"
    await response(scope, receive, send)
