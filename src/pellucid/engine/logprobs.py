"""The log-probabilities of given tokens, and as a request is told of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import SampledTokens, SamplingBatch, sampling_record
from pellucid.core.outputs import Logprob
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.constraints import one_each
from pellucid.tokenizer.tokenizer import Tokenizer

GIVEN = sampling_record(SamplingParams(temperature=0), seed=0, num_prompt_tokens=0)
"""How a token is "chosen" that is given: every other is masked."""


def score_given(
    backend: Backend, logits: NDArray[np.float32], token_ids: NDArray[np.int32], records: NDArray[np.void]
) -> SampledTokens:
    """Log-probabilities in the model's own distribution of given tokens, one a row of `logits`, and of as many
    alternatives as each row's record says.

    Raises:
        BackendError: a row is not finite.
    """
    rows = np.repeat(GIVEN, len(records))
    for name in ("seed", "sequence_index", "position", "num_logprobs"):
        rows[name] = records[name]
    return backend.sample(logits, SamplingBatch(rows, masks=one_each(token_ids, logits.shape[1])))


def token_logprobs(
    tokenizer: Tokenizer, token_id: int, logprob: float, top_ids: NDArray[Any], top_logprobs: NDArray[Any]
) -> dict[int, Logprob]:
    """Token id -> Logprob: `token_id` first, then the alternatives `top_ids`, the most probable first.

    Args:
        top_ids: integers [k], padded with -1.
        top_logprobs: floats [k].
    """
    ids: list[int] = top_ids.tolist()

    def entry(token_id: int, logprob: float, rank: int | None) -> Logprob:
        return Logprob(logprob, rank, tokenizer.decode([token_id], skip_special_tokens=False))

    logprobs = {token_id: entry(token_id, logprob, ids.index(token_id) + 1 if token_id in ids else None)}
    for rank, (top_id, top_logprob) in enumerate(zip(ids, top_logprobs.tolist(), strict=True), 1):
        if top_id >= 0 and top_id != token_id:
            logprobs[top_id] = entry(top_id, top_logprob, rank)
    return logprobs
