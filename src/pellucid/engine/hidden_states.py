"""The hidden states after the final norm of the tokens that somebody wants them of."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch
from pellucid.core.capture import SequenceCapture, residual_capture
from pellucid.core.errors import CapacityError
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.models.spec import ModelSpec


class HiddenStateReader(Protocol):
    """Wants the hidden states of every token of a request from some token on.

    Attributes:
        num_known: that token: how many come before it whose hidden states it has, or has no need of.
    """

    num_known: int

    def observe(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """Take in the hidden states, float32 [n, hidden_size], of the next tokens of `sequence` after those known."""
        ...


class HiddenStates:
    """Asks each step for the hidden states that readers lack. False while there are no readers, which is all it costs
    others."""

    def __init__(self, spec: ModelSpec) -> None:
        self._hidden_size = spec.hidden_size
        self._points = np.array([2 * len(spec.layers) + 1], np.int32)
        self._readers: dict[SequenceGroup, HiddenStateReader] = {}
        self._pending: list[tuple[Sequence, SequenceCapture]] = []

    def __bool__(self) -> bool:
        return bool(self._readers)

    def open(self, group: SequenceGroup, reader: HiddenStateReader) -> None:
        """Show `reader` the hidden states of `group` until `close`. Those that it lacks must be computed, even where
        the prefix cache has their tokens."""
        self._readers[group] = reader
        group.max_cached_tokens = reader.num_known

    def close(self, group: SequenceGroup) -> None:
        """No effect on a group that was not opened."""
        self._readers.pop(group, None)

    def attach(self, batch: ForwardBatch, sequences: list[Sequence]) -> ForwardBatch:
        """`batch`, which computes the scheduled tokens of `sequences`, with what the readers want of it.

        Raises:
            CapacityError: there is no memory for it.
        """
        self._pending = []
        try:
            for row, sequence in enumerate(sequences):
                reader = self._readers.get(sequence.group)
                if reader is not None:
                    self._want(row, sequence, reader.num_known, int(batch.cu_seqlens[row]))
        except MemoryError:
            raise CapacityError("no memory is left for the hidden states that a request is to be shown") from None
        if not self._pending:
            return batch
        return batch.with_captures(wish for _, wish in self._pending)

    def commit(self) -> None:
        """Show what the step of the batch that `attach` gave has written."""
        for sequence, wish in self._pending:
            reader = self._readers[sequence.group]
            reader.observe(sequence, wish.residual[0])
            sequence.group.max_cached_tokens = reader.num_known

    def _want(self, row: int, sequence: Sequence, num_known: int, first_token: int) -> None:
        begin = sequence.num_computed_tokens
        first, end = max(begin, num_known), begin + sequence.num_scheduled_tokens
        if first >= end:
            return
        tokens = np.arange(first_token + first - begin, first_token + end - begin, dtype=np.int32)
        self._pending.append((sequence, residual_capture(row, tokens, self._points, self._hidden_size)))
