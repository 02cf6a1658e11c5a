"""Error bodies of the Anthropic API. (https://docs.anthropic.com/en/api/errors)"""

from __future__ import annotations

from typing import Any

from pellucid.core.errors import InvalidRequestError, PellucidError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ThreadsNotSupportedError(InvalidRequestError):
    """Conversations are not kept. Anthropic's client goes on without when it is told so."""

    code = "thread_unsupported_request"


def error_body(error: PellucidError) -> dict[str, Any]:
    """The body that tells of `error`. It has no field for the parameter: the message names it."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if isinstance(error, ThreadsNotSupportedError):
        told["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": told}
