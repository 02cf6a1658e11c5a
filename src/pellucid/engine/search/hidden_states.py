"""What contrastive searches see: the hidden states of the tokens that are new to them."""

from __future__ import annotations

import numpy as np

from pellucid.core.batch import ForwardBatch
from pellucid.core.capture import SequenceCapture, residual_capture
from pellucid.core.errors import CapacityError
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.search.contrastive import ContrastiveSearch
from pellucid.models.spec import ModelSpec


class HiddenStates:
    """Asks each step for the hidden states after the final norm that contrastive searches lack. False while there are
    no such searches, which is all it costs others."""

    def __init__(self, spec: ModelSpec) -> None:
        self._hidden_size = spec.hidden_size
        self._points = np.array([2 * len(spec.layers) + 1], np.int32)
        self._searches: dict[SequenceGroup, ContrastiveSearch] = {}
        self._pending: list[tuple[Sequence, SequenceCapture]] = []

    def __bool__(self) -> bool:
        return bool(self._searches)

    def open(self, group: SequenceGroup, search: ContrastiveSearch) -> None:
        """Show `search` the hidden states of `group` until `close`. What it does not know of must be computed, even
        where the prefix cache has it."""
        self._searches[group] = search
        group.max_cached_tokens = 0

    def close(self, group: SequenceGroup) -> None:
        """No effect on a group that was not opened."""
        self._searches.pop(group, None)

    def attach(self, batch: ForwardBatch, sequences: list[Sequence]) -> ForwardBatch:
        """`batch`, which computes the scheduled tokens of `sequences`, with what the searches want of it.

        Raises:
            CapacityError: there is no memory for it.
        """
        self._pending = []
        try:
            for row, sequence in enumerate(sequences):
                search = self._searches.get(sequence.group)
                if search is not None:
                    self._want(row, sequence, search.num_known, int(batch.cu_seqlens[row]))
        except MemoryError:
            raise CapacityError("no memory is left for the hidden states of a search", param="penalty_alpha") from None
        if not self._pending:
            return batch
        return batch.with_captures(wish for _, wish in self._pending)

    def commit(self) -> None:
        """Show what the step of the batch that `attach` gave has written."""
        for sequence, wish in self._pending:
            search = self._searches[sequence.group]
            search.observe(sequence, wish.residual[0])
            sequence.group.max_cached_tokens = search.num_known

    def _want(self, row: int, sequence: Sequence, num_known: int, first_token: int) -> None:
        begin = sequence.num_computed_tokens
        first, end = max(begin, num_known), begin + sequence.num_scheduled_tokens
        if first >= end:
            return
        tokens = np.arange(first_token + first - begin, first_token + end - begin, dtype=np.int32)
        self._pending.append((sequence, residual_capture(row, tokens, self._points, self._hidden_size)))
