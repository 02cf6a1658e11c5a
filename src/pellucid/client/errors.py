"""What can go wrong with a server at the other end. Every message names the server."""

from __future__ import annotations

from pellucid.core.errors import PellucidError


class ServerError(PellucidError):
    """Base of what a server did, or failed to do."""

    status = 502
    code = "server_failed"


class ConnectionFailedError(ServerError):
    """No connection could be made: nothing listens, the name is not known, TLS failed."""

    code = "connection_failed"


class ConnectionLostError(ServerError):
    """The connection ended before the answer was whole."""

    code = "connection_lost"


class ServerTimeoutError(ServerError):
    """The server sent nothing for longer than it may."""

    status = 504
    code = "server_timeout"


class ProtocolError(ServerError):
    """What came is not HTTP, not the stream that was asked for, or larger than it may be."""

    code = "protocol_error"


class ApiError(ServerError):
    """The server answered with an error.

    Attributes:
        http_status: of the answer; 200 where the error came in a stream that had begun.
        error_code, error_type: as the server gave them, where it did.
        retry_after: seconds that the server asks to wait, where it does.
    """

    code = "api_error"

    def __init__(
        self,
        message: str,
        *,
        http_status: int,
        param: str | None = None,
        error_code: str | None = None,
        error_type: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.http_status = http_status
        self.error_code = error_code
        self.error_type = error_type
        self.retry_after = retry_after
