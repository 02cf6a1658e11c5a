"""Typed errors. Each carries what a command line (exit code) and a server (status, code, param) need.

A message says what was found and what would work; it is shown to users as it is.
"""

from __future__ import annotations

MAX_PARAM_CHARACTERS = 128
"""Callers may make up parameters of any length."""


class PellucidError(Exception):
    """Base of every error that Pellucid raises on purpose.

    Attributes:
        status: HTTP status a server answers with.
        code: stable machine-readable identifier.
        param: the request parameter or file field at fault, if one is; no more than its first 128 characters.
        message: what was found and what would work.
    """

    status: int = 500
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = None if param is None else param[:MAX_PARAM_CHARACTERS]


class InvalidRequestError(PellucidError, ValueError):
    """A request parameter is out of range, of the wrong type, or not supported."""

    status = 400
    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit in the context."""

    code = "context_length_exceeded"


class QueueFullError(PellucidError):
    """The waiting queue is at its limit, or a request waited longer than it may."""

    status = 429
    code = "queue_full"


class ModelNotFoundError(PellucidError):
    """No model of this name, path or reference."""

    status = 404
    code = "model_not_found"


class ModelFileError(PellucidError):
    """A model file is malformed. `param` names the field."""

    status = 422
    code = "model_file_invalid"


class UnsupportedModelError(PellucidError):
    """The file is sound, but its architecture, tensor type or feature is not supported."""

    status = 422
    code = "model_unsupported"


class DownloadError(PellucidError):
    """A model could not be fetched: offline, refused, or cut off."""

    status = 502
    code = "download_failed"


class IntegrityError(DownloadError):
    """What was fetched is not what the catalog promises (size or SHA-256)."""

    code = "integrity_mismatch"


class StorageError(PellucidError):
    """The disk is full, or a file or the cache folder cannot be written."""

    status = 507
    code = "storage_failed"


class PrefixFileError(PellucidError):
    """A saved prefix is malformed, or does not fit the model that is loaded. `param` names the field."""

    status = 422
    code = "prefix_file_invalid"


class BackendError(PellucidError):
    """A backend is not available on this machine, or failed in a step."""

    code = "backend_failed"


class EngineError(PellucidError):
    """The engine itself failed in a step; the requests it had are lost, and it goes on with new ones."""

    code = "engine_failed"


class EngineClosedError(PellucidError):
    """The engine takes no more requests: it is draining, or was shut down."""

    status = 503
    code = "engine_closed"


class CapacityError(PellucidError):
    """Not enough memory for what was asked (KV blocks, weights)."""

    status = 507
    code = "capacity_exceeded"
