"""Contrastive search over the sequences of a lockstep group (pellucid.decoding.contrastive)."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.decoding.contrastive import choose, normalized
from pellucid.engine.search.base import Continuation, SampledRow, TokenSearch


class ContrastiveSearch(TokenSearch):
    """Each candidate for the next token is a live sequence; one step computes what each would mean and what would come
    after it.

    The hidden states of the answer so far are kept here, so that they need not be computed again after a preemption.
    """

    num_ahead = 1
    processed_logprobs = True

    def __init__(self, params: SamplingParams, hidden_size: int) -> None:
        self.num_sequences = params.top_k
        self.num_logprobs = max(params.top_k, params.logprobs or 0)
        self._alpha = params.penalty_alpha
        self._context = np.empty((256, hidden_size), np.float32)
        self._candidates: list[SampledRow] = []
        self._hidden: dict[Sequence, NDArray[np.float32]] = {}
        self.num_known = 0
        """Tokens of the prompt and the answer whose hidden states are known."""

    def observe(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """Take in the hidden states, float32 [n, hidden_size], of the next tokens of `sequence` after those known: more
        of the prompt, or a candidate."""
        if self._candidates:
            self._hidden[sequence] = normalized(hidden)[0]
        else:
            self._know(normalized(hidden))

    def advance(self, rows: ListLike[SampledRow]) -> list[Continuation]:
        chosen, self.settled = 0, None
        if self._candidates:
            probability = np.exp([candidate.logprob for candidate in self._candidates])
            hidden = np.stack([self._hidden[row.sequence] for row in rows])
            chosen = choose(probability, hidden, self._context[: self.num_known], self._alpha)
            self.settled = self._candidates[chosen]
            self._know(hidden[chosen : chosen + 1])
            self._hidden.clear()
        row = rows[chosen]
        alternatives = zip(row.top_ids.tolist(), row.top_logprobs.tolist(), strict=True)
        possible = [(token_id, logprob) for token_id, logprob in alternatives if logprob > -np.inf]
        self._candidates = [
            replace(row, token_id=token_id, logprob=logprob) for token_id, logprob in possible[: self.num_sequences]
        ]
        return [Continuation(chosen, candidate.token_id) for candidate in self._candidates]

    def _know(self, hidden: NDArray[np.float32]) -> None:
        end = self.num_known + len(hidden)
        if end > len(self._context):
            grown = np.empty((max(end, 2 * len(self._context)), self._context.shape[1]), np.float32)
            grown[: self.num_known] = self._context[: self.num_known]
            self._context = grown
        self._context[self.num_known : end] = hidden
        self.num_known = end
