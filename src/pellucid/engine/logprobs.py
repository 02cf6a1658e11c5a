"""The log-probabilities of a token, as a request is told of them."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from pellucid.core.outputs import Logprob
from pellucid.tokenizer.tokenizer import Tokenizer


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
