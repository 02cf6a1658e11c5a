"""Classifier-free guidance as a search: the answer, and beside it what would follow the negative prompt."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.search.base import Continuation, SampledRow, TokenSearch


class GuidedSearch(TokenSearch):
    """Two live sequences, the prompt's and the negative prompt's, which both go on with the token that is chosen for
    the first from the logits of both (pellucid.engine.guidance)."""

    def __init__(self, params: SamplingParams) -> None:
        self.num_sequences = 2
        self.processed_logprobs = params.logprobs_mode == "processed"
        self.num_logprobs = -1 if params.logprobs is None else params.logprobs

    def advance(self, rows: ListLike[SampledRow]) -> list[Continuation]:
        self.settled = rows[0]
        return [Continuation(index, rows[0].token_id) for index in range(2)]
