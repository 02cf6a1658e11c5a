"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import Captured
from pellucid.core.errors import PellucidError
from pellucid.core.metrics import RequestMetrics

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a sequence ended: an end-of-sequence token, stop token or stop string ("stop"); `max_tokens` or the context
("length"); the caller ("abort"); or a failure ("error"). One that generates nothing ends with "stop"."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the model's own distribution, before any decoding transform; in the one that it was drawn
    from where the request's `logprobs_mode` is "processed".

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
        index: which of the request's `n` continuations; 0 is the most probable one where there was `best_of`.
        text: what the tokens say, without the stop string; with `echo` after what the prompt says.
        token_ids: every token generated, the one that stopped included; with `echo` after those of the prompt.
        finish_reason: why it ended.
        stop_reason: the stop string or the stop token id that ended it; None for end-of-sequence and all else.
        logprobs: one dictionary for each of `token_ids`, token id -> Logprob, the token itself first; None if not asked
            for. Empty for the first token of a prompt, which nothing comes before.
        cumulative_logprob: natural log of the probability of all tokens generated, as `logprobs_mode` counts it; None
            where neither `logprobs` nor `best_of` asked for it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The one terminal reply to a request.

    Attributes:
        request_id: the request's name within the engine.
        prompt: the prompt's text; None where it was given as token ids or messages.
        prompt_token_ids: what the model read.
        outputs: the continuations, by index.
        metrics: where the time went.
        error: why it failed or was refused, where a `finish_reason` is "error".
        captured: what it asked to see of the model at work; None if it did not ask.
        prompt_logprobs: one dictionary for each token of the prompt, token id -> Logprob, the token itself first; None
            for the first one, which nothing comes before. None if not asked for.
        pooled: of a prompt that was to be pooled and not continued, its embedding, float32 [hidden_size], or the
            log-probabilities of labels, float32 [n]; else None.
        finished: always true; a RequestOutput is made once, at the end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: PellucidError | None = None
    captured: Captured | None = None
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    pooled: NDArray[np.float32] | None = None


@dataclass(slots=True, eq=False)
class EmbeddingOutput:
    """What a prompt that was pooled comes to.

    Attributes:
        embedding: float32 [hidden_size].
        prompt: the prompt's text; None where it was given as token ids or messages.
        prompt_token_ids: what the model read.
        metrics: where the time went.
    """

    embedding: NDArray[np.float32]
    prompt: str | None
    prompt_token_ids: list[int]
    metrics: RequestMetrics


@dataclass(slots=True, eq=False)
class LabelOutput:
    """How probable tokens are to come after a prompt.

    Attributes:
        logprobs: float32 [n], natural logarithms of the probabilities of the label tokens, in their order, in the
            model's own distribution over the whole vocabulary.
        prompt: the prompt's text; None where it was given as token ids or messages.
        prompt_token_ids: what the model read.
        metrics: where the time went.
    """

    logprobs: NDArray[np.float32]
    prompt: str | None
    prompt_token_ids: list[int]
    metrics: RequestMetrics


@dataclass(slots=True)
class TokenOutput:
    """One token of a streamed request. With `echo`, the tokens of the prompt come first, each as if it had been chosen.

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
