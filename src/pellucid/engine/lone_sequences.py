"""Sequences that are in no queue: computed between two steps, for themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch
from pellucid.core.config import SchedulerConfig
from pellucid.core.errors import CapacityError, ContextLengthError, InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.request_intake import checked_token_ids
from pellucid.engine.scheduler import Scheduler

LOGITS_CHUNK = 128
"""Most tokens that are computed at once where all their logits are wanted."""


class LoneSequences:
    """Computes sequences that `scheduler` knows nothing of, in its KV cache."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        config: SchedulerConfig,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._config = config
        self._max_model_len = max_model_len
        self._clock = clock

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """What the model expects after each token: float32 [len(token_ids), vocab_size].

        Computed in chunks, without the prefix cache; running sequences give way where their blocks are needed.

        Raises:
            InvalidRequestError: no token, or a token id out of the vocabulary.
            ContextLengthError: more tokens than the context holds.
            CapacityError: the result does not fit in memory.
            BackendError: the backend failed, or gave logits that are not finite.
        """
        token_ids = checked_token_ids(token_ids, self._backend.spec.vocab_size)
        num_tokens = len(token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("token_ids is empty: give at least one", param="token_ids")
        if num_tokens > self._max_model_len:
            raise ContextLengthError(
                f"there are {num_tokens} tokens, but the context holds {self._max_model_len} (max_model_len)",
                param="token_ids",
            )
        shape = (num_tokens, self._backend.spec.vocab_size)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            raise CapacityError(
                f"logits {shape} in float32 take {4 * shape[0] * shape[1]:,} bytes, more than there are"
            ) from None
        sequence = self.sequence(token_ids)
        try:
            for piece in self.compute(sequence, num_tokens, with_logits=True):
                end = sequence.num_computed_tokens
                logits[end - len(piece) : end] = piece
        finally:
            self._scheduler.cache.free(sequence)
        return logits

    def sequence(self, token_ids: list[int], *, cache_salt: bytes = b"") -> Sequence:
        """A sequence that is in no queue, for `compute`. The caller frees its blocks before the next step."""
        group = SequenceGroup(
            "alone",
            token_ids,
            SamplingParams(),
            max_model_len=self._max_model_len,
            seed=0,
            arrival_number=0,
            arrival_time=self._clock(),
            cache_salt=cache_salt,
        )
        return group.sequences[0]

    def compute(self, sequence: Sequence, end: int, *, with_logits: bool = False) -> Iterator[NDArray[np.float32]]:
        """Compute a sequence that is in no queue up to its first `end` tokens, between two steps, piece by piece;
        running sequences give way where their blocks are needed.

        Yields:
            Logits of each piece's tokens, float32 [n, vocab_size], valid until the next; n is 0 unless `with_logits`.

        Raises:
            CapacityError: there are not enough KV blocks.
            BackendError: the backend failed, or gave logits that are not finite.
        """
        longest = self._config.max_num_batched_tokens
        if with_logits:
            longest = min(longest, LOGITS_CHUNK)
        while (begin := sequence.num_computed_tokens) < end:
            piece_end = min(end, begin + longest)
            while not self._scheduler.cache.allocate(sequence, piece_end - begin):
                if self._scheduler.preempt_last() is None:
                    raise CapacityError(f"no KV blocks for {end} tokens", param="token_ids")
            batch = _piece(sequence, begin, piece_end, with_logits)
            logits = self._backend.forward(batch).logits
            sequence.num_computed_tokens = piece_end
            yield logits


def _piece(sequence: Sequence, begin: int, end: int, with_logits: bool) -> ForwardBatch:
    return ForwardBatch(
        input_ids=np.array(sequence.token_ids[begin:end], np.int32),
        positions=np.arange(begin, end, dtype=np.int32),
        cu_seqlens=np.array([0, end - begin], np.int32),
        kv_lens=np.array([end], np.int32),
        block_tables=np.array(sequence.block_tables, np.int32)[:, None],
        logits_rows=np.arange(end - begin if with_logits else 0, dtype=np.int32),
    )
