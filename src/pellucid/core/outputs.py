"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pellucid.core.errors import PellucidError

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a sequence ended: an end-of-sequence token, stop token or stop string ("stop"); `max_tokens` or the context
("length"); the caller ("abort"); or a failure ("error")."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the model's own distribution (before any decoding transform).

    Attributes:
        logprob: natural log of its probability.
        rank: 1 for the most probable token; None where it is beyond the alternatives asked for.
        decoded_token: the token's text, with U+FFFD for bytes that are no text on their own.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One continuation.

    Attributes:
        index: which of the request's `n` continuations.
        text: what the tokens say, without the stop string.
        token_ids: every token generated, the one that stopped included.
        finish_reason: why it ended.
        stop_reason: the stop string or the stop token id that ended it; None for end-of-sequence and all else.
        logprobs: one dictionary a token, token id -> Logprob, the chosen token first; None if not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Where a request's time went. Times in seconds.

    Attributes:
        queue: from arrival until first scheduled.
        ttft: from arrival to the first token (time to first token); 0 if there was none.
        prefill: from first scheduled to the first token.
        decode: from the first token to the last.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were found in the prefix cache.
        output_tokens: tokens generated, over all continuations.
        decode_tokens: those of them that were not the first of a continuation.
        preemptions: how often a sequence was put back to make room for others.
    """

    queue: float = 0.0
    ttft: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not cached) a second; 0 if nothing was computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill if self.prefill > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first of each continuation; 0 if there were none."""
        return self.decode_tokens / self.decode if self.decode > 0 else 0.0


@dataclass(slots=True)
class RequestOutput:
    """The one terminal reply to a request.

    Attributes:
        request_id: the request's name within the engine.
        prompt: the prompt's text; None where it was given as token ids or messages.
        prompt_token_ids: what the model read.
        outputs: the continuations, by index.
        metrics: where the time went.
        error: what made it fail, where a `finish_reason` is "error".
        finished: always true; a RequestOutput is made once, at the end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: PellucidError | None = None
    finished: bool = True


@dataclass(slots=True)
class TokenOutput:
    """One step of a streamed request.

    Attributes:
        request_id: the request's name within the engine.
        index: which of the request's continuations.
        token_id: the token chosen; None in a last output that no token came with.
        text: text released by this token; empty while it may still be part of a character or a stop string. All of a
            continuation's `text` joined is its `CompletionOutput.text`.
        logprobs: token id -> Logprob, the chosen token first; None if not asked for.
        finish_reason: set on the continuation's last output.
        stop_reason: as in CompletionOutput.
        request_output: set on the request's last output: the whole answer, with its metrics.
    """

    request_id: str
    index: int
    token_id: int | None
    text: str
    logprobs: dict[int, Logprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    request_output: RequestOutput | None = None
