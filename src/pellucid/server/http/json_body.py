"""The JSON body of a request."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from pellucid.core.errors import InvalidRequestError
from pellucid.server.errors import RequestTooLargeError


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The object that the body of `request` is.

    Raises:
        InvalidRequestError: it is none.
        RequestTooLargeError: it has more than `max_bytes` bytes.
        ClientDisconnect: the client left before it was there.
    """
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise RequestTooLargeError(f"the body has more than the {max_bytes:,} bytes that a request may have")
        pieces.append(piece)
    try:
        body = json.loads(b"".join(pieces))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return body
