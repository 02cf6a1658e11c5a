"""What was seen of one request. Times in seconds of `time.perf_counter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from pellucid.client.errors import ApiError, ServerError
from pellucid.client.openai import Usage

COMPLETED = "completed"
ABORTED = "aborted"


@dataclass(slots=True)
class RequestRecord:
    """A request as the client saw it.

    Attributes:
        started: when it was sent; a connection is made first where none was left over.
        ended: when the last of the answer had come.
        event_times: when each event came that had output in it.
        outcome: COMPLETED; ABORTED, by the client on purpose; or the kind of error: a status such as "429", or the code
            of a ServerError.
        finish_reason: as the server gave it.
        usage: as the server counted it.
        error: in words.
        has_retry_after: whether a refusal said when to come again.
    """

    started: float
    ended: float = 0.0
    event_times: list[float] = field(default_factory=list)
    outcome: str = COMPLETED
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str = ""
    has_retry_after: bool = False

    def fail(self, error: ServerError) -> None:
        """Note what went wrong."""
        self.outcome = error.code
        self.error = error.message
        if isinstance(error, ApiError):
            self.outcome = "error_event" if error.http_status == 200 else str(error.http_status)
            self.has_retry_after = error.retry_after is not None

    @property
    def output_tokens(self) -> int:
        """As the server counted them; else one an event."""
        return len(self.event_times) if self.usage is None else self.usage.completion_tokens

    @property
    def ttft(self) -> float | None:
        """From sending to the first output; None without any."""
        return self.event_times[0] - self.started if self.event_times else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """Between each event with output and the one before it."""
        return [later - earlier for earlier, later in pairwise(self.event_times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is but one, or all came in one event."""
        if self.output_tokens < 2 or len(self.event_times) < 2:
            return None
        return (self.event_times[-1] - self.event_times[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.started
