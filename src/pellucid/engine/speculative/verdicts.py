"""What spoke for and against each guess, for whoever watches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import SamplingBatch
from pellucid.core.sequence import Sequence
from pellucid.core.trace import SpeculationVerdict
from pellucid.decoding import pipeline, rng
from pellucid.decoding.distribution import Logits, weights
from pellucid.decoding.pipeline import RowSampling


class DraftOdds:
    """How probable each draft token of a step was in the distribution of its place, and the random numbers that chose.

    Computed by the oracle of the sampler, from the same rows. Costs as much as sampling in numpy: only if asked for.

    Args:
        samples: whose each row to be sampled is.
        draft_offsets: how many of its draft tokens go before each.
    """

    def __init__(self, samples: list[Sequence], draft_offsets: list[int]) -> None:
        self._rows = [
            (row, sequence, offset)
            for row, (sequence, offset) in enumerate(zip(samples, draft_offsets, strict=True))
            if sequence.draft_token_ids
        ]
        self._probabilities: dict[Sequence, list[float]] = {}
        self._draws: dict[Sequence, list[float] | None] = {}

    def take(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> None:
        """Look at the rows that are about to be sampled: float32 [num_rows, vocab_size]."""
        for row, sequence, offset in self._rows:
            how = RowSampling.of(sampling, row)
            is_greedy = how["temperature"] == 0
            probabilities = self._probabilities.setdefault(sequence, [])
            draws = self._draws.setdefault(sequence, None if is_greedy else [])
            if draws is not None:
                draws.append(rng.uniform(how.draw_bits()))
            if offset < len(sequence.draft_token_ids):
                allowed = pipeline.constrain(logits[row], how)
                probabilities.append(_probability(allowed, how, sequence.draft_token_ids[offset]))

    def verdict(self, sequence: Sequence, position: int, chosen_token_ids: list[int]) -> SpeculationVerdict:
        """What came of the draft tokens of `sequence`, which took in those accepted behind the token at `position`, for
        which the first of them had been guessed."""
        drafts = sequence.draft_token_ids
        return SpeculationVerdict(
            request_id=sequence.group.request_id,
            index=sequence.index,
            position=position,
            draft_token_ids=drafts,
            draft_probabilities=[1.0] * len(drafts),
            target_probabilities=self._probabilities[sequence],
            draws=self._draws[sequence],
            chosen_token_ids=chosen_token_ids,
            num_accepted=sequence.num_tokens - position - 1,
        )


def _probability(allowed: Logits, how: RowSampling, token_id: int) -> float:
    if allowed.max() == -np.inf:
        return 0.0
    if how["temperature"] == 0:
        return float(np.argmax(allowed) == token_id)
    shares = weights(pipeline.warp(allowed, how))
    return int(shares[token_id]) / int(shares.sum())
