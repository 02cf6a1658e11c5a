"""Errors that only a server has."""

from __future__ import annotations

import logging
from secrets import token_hex
from traceback import format_tb

from pellucid.core.errors import PellucidError

logger = logging.getLogger(__name__)


class NotReadyError(PellucidError):
    """The model is still loading, or could not be loaded."""

    status = 503
    code = "model_not_ready"


class AuthenticationError(PellucidError):
    """The request carries no key, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(PellucidError):
    """The request comes from where none may come from: its Host or Origin is not on the list."""

    status = 403
    code = "forbidden"


class NotFoundError(PellucidError):
    """No such route, or no such object."""

    status = 404
    code = "not_found"


class MethodNotAllowedError(PellucidError):
    """The route does not take this method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(PellucidError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class RequestTooLargeError(PellucidError):
    """The body is larger than the server takes."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(PellucidError):
    """The body is not JSON by its own account."""

    status = 415
    code = "unsupported_media_type"


class HeaderTooLargeError(PellucidError):
    """The request line and headers are larger than the server takes."""

    status = 431
    code = "header_too_large"


class OverloadedError(PellucidError):
    """More connections or requests than the server takes at once."""

    status = 503
    code = "overloaded"


class DeadlineError(PellucidError):
    """The answer was not complete when its time was up."""

    status = 504
    code = "deadline_exceeded"


def internal_error(defect: Exception) -> PellucidError:
    """What a client is told of a defect: a number, under which the log has it. The log has where it happened, and not
    the message, which may quote a prompt."""
    return PellucidError(f"internal error {_logged(defect)}: this is a bug in Pellucid; {_IN_LOG}")


def told(error: PellucidError) -> PellucidError:
    """`error` as a client is told of it. What the server itself failed at (500) goes into the log, under a number that
    the client gets too. Where a defect is behind it, its message, which may quote the prompt of another, stays here."""
    if error.status != PellucidError.status or type(error) is PellucidError:
        return error
    if isinstance(error.__cause__, Exception):
        return type(error)(internal_error(error.__cause__).message)
    return type(error)(f"{error.message} (error {_logged(error)}: {_IN_LOG})", param=error.param)


_IN_LOG = "the server's log has it by this number"


def _logged(defect: Exception) -> str:
    number = token_hex(8)
    where = "".join(format_tb(defect.__traceback__))
    logger.error("internal error %s: %s\n%s", number, type(defect).__name__, where.rstrip())
    return number
