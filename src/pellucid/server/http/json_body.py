"""The JSON body of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import shown
from pellucid.server.errors import RequestTooLargeError, UnsupportedMediaTypeError
from pellucid.server.served_model import ServedModel
from pellucid.server.serving import serving_of
from pellucid.server.strict_json import BODY, decode_json

T = TypeVar("T")

MAX_BYTES_INLINE = 64 * 1024
"""Larger bodies are decoded in a thread. Of this size they take 3 ms at worst."""


async def parse_body(request: Request, parse: Callable[[Mapping[str, Any], ServedModel], T]) -> T:
    """What `parse` makes of the body, in a thread.

    Raises:
        NotReadyError: the model is not loaded.
        As `read_json` and `parse`.
    """
    body, serving = await read_json(request), serving_of(request)
    return await serving.run(parse, body, serving.model)


async def read_json(request: Request) -> dict[str, Any]:
    """The object that the body is.

    Raises:
        UnsupportedMediaTypeError: its Content-Type is not JSON in UTF-8, or it is compressed.
        RequestTooLargeError: it has more bytes than the server takes; the rest of it is not read.
        InvalidRequestError: it is not an object, or not JSON as `decode_json` takes it.
        starlette.requests.ClientDisconnect: the client is gone.
    """
    _check_media_type(request)
    serving = serving_of(request)
    data = await _read(request, serving.settings.max_body_bytes)
    if not data:
        raise InvalidRequestError("the body is empty: a JSON object is expected", param=BODY)
    if len(data) > MAX_BYTES_INLINE:
        return await serving.run(_decode_object, data)
    return _decode_object(data)


def _check_media_type(request: Request) -> None:
    # No form of a web page can send JSON: that a request says so is a defence against pages of other origins, too.
    given = request.headers.get("content-type", "")
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"not {shown(given)}" if given else "and there is none"
        raise UnsupportedMediaTypeError(f"Content-Type must be application/json, {found}", param="Content-Type")
    for parameter in parameters:
        if parameter.startswith("charset=") and parameter[8:].strip('"') not in ("utf-8", "utf8"):
            raise UnsupportedMediaTypeError(f"the body must be in UTF-8, not {shown(given)}", param="Content-Type")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"the body must come as it is, without Content-Encoding {shown(coding)}", param="Content-Encoding"
        )


async def _read(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(f"{int(length[:20]):,}", max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(f"{num_bytes:,} or more", max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(found: str, max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body has {found} bytes; at most {max_bytes:,} are taken", param=BODY)


def _decode_object(data: bytes) -> dict[str, Any]:
    document = decode_json(data, "the body")
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {shown(document)}", param=BODY)
    return document
