"""Classifier-free guidance: the logits of a request that is guided, from those of its two sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import SampledTokens
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.contrast import guide


class Guidance:
    """Which groups are guided. False while there are none, which is all it costs others."""

    def __init__(self) -> None:
        self._groups: dict[SequenceGroup, None] = {}
        self._pairs: list[tuple[int, int, float]] = []
        self._chosen: list[int] = []
        self._row_of_sample: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    def open(self, group: SequenceGroup) -> None:
        """From now on guide `group`, whose live sequences are the prompt's and the negative prompt's, until `close`."""
        self._groups[group] = None

    def close(self, group: SequenceGroup) -> None:
        """No effect on a group that was not opened."""
        self._groups.pop(group, None)

    def attach(self, samples: list[Sequence], draft_offsets: list[int]) -> tuple[list[Sequence], list[int]]:
        """Whose tokens are to be chosen: `samples`, whose each row of logits is, without the unconditional sequences;
        and how many draft tokens go before each, where there are any."""
        rows_of: dict[Sequence, int] = {}
        self._pairs, self._chosen, self._row_of_sample = [], [], []
        for row, sequence in enumerate(samples):
            rows_of[sequence] = row
            if sequence.group not in self._groups or sequence is sequence.group.live[0]:
                self._chosen.append(row)
        for group in self._groups:
            conditional, unconditional = group.live
            if conditional in rows_of:
                self._pairs.append((rows_of[conditional], rows_of[unconditional], group.sampling_params.guidance_scale))
        answer_of = {unconditional: conditional for conditional, unconditional, _ in self._pairs}
        place_of = {row: place for place, row in enumerate(self._chosen)}
        self._row_of_sample = [place_of[answer_of.get(row, row)] for row in range(len(samples))]
        chosen = [samples[row] for row in self._chosen]
        return chosen, [draft_offsets[row] for row in self._chosen] if draft_offsets else []

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows of `logits`, float32 [num_samples, vocab_size], that tokens are chosen from; those of guided groups
        made of both of theirs."""
        chosen = logits[self._chosen]
        for conditional, unconditional, scale in self._pairs:
            chosen[self._row_of_sample[conditional]] = guide(logits[conditional], logits[unconditional], scale)
        return chosen

    def expand(self, sampled: SampledTokens) -> SampledTokens:
        """What was chosen, a row for each of the samples again; an unconditional sequence has its answer's."""
        return sampled.of_rows(self._row_of_sample)
