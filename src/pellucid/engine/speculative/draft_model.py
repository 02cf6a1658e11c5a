"""A smaller model that guesses: the first form of speculative decoding.

Leviathan, Kalman & Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023 (arXiv:2211.17192);
Chen et al., 2023 (arXiv:2302.01318).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pellucid.backends.base import Backend
from pellucid.core.errors import PellucidError
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.speculative.draft_runner import DraftRunner
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.models.kv_groups import kv_windows

MOST_LEFT = 2
"""Tokens that a sequence has got since a guess that was right: the last guess, which was not computed, and what was
chosen after it. So many are computed with the next guess, in one pass."""


@dataclass(slots=True)
class _Shadow:
    """A sequence as the draft model knows it.

    Attributes:
        sequence: its tokens and behind them the last guesses, with blocks of the draft model's own KV cache.
        num_tokens: how many of those tokens are not guesses.
    """

    sequence: Sequence
    num_tokens: int


class DraftModelDrafter:
    """Guesses with another model of the same vocabulary, which has a KV cache of its own. Implements `Drafter`.

    What a sequence has got since the last guess is computed first, within the tokens of one step: of a long text a part
    in each call, and guessing begins at its end. Guesses that were right stay computed. Where blocks run out, the
    sequence that was guessed for least recently gives its own and is computed again if it comes back.

    Args:
        backend: loaded, with `num_blocks` KV blocks allocated; closed with the drafter.
        max_num_seqs, max_num_batched_tokens: most sequences and most tokens in a forward pass.
        max_model_len: most tokens of a sequence; there are no guesses beyond.
    """

    is_cheap = False

    def __init__(
        self,
        backend: Backend,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self._backend = backend
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._cache = CacheManager(
            num_blocks, windows=kv_windows(backend.spec), enable_prefix_caching=enable_prefix_caching
        )
        self._runner = DraftRunner(
            backend,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, MOST_LEFT * max_num_seqs),
            max_model_len=max_model_len,
        )
        self._shadows: dict[Sequence, _Shadow] = {}  # the one used last comes last

    def prepare(self, sequences: list[Sequence]) -> None:
        try:
            self._catch_up(sequences)
        except PellucidError:
            self._abandon(sequences)

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        try:
            return self._guess(sequences, max_tokens)
        except PellucidError:
            self._abandon(sequences)
            return [[] for _ in sequences]

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        """What was chosen is seen before the next guess."""

    def forget(self, sequence: Sequence) -> None:
        if sequence in self._shadows:
            self._cache.free(self._follow(sequence), keep_partial=True)
            del self._shadows[sequence]

    def close(self) -> None:
        self._shadows.clear()
        self._backend.close()

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Compute what `sequences` have got, but for the last tokens, which the first guess computes."""
        guessing, begun = set(sequences), set[SequenceGroup]()
        behind: list[Sequence] = []
        for sequence in sequences:
            if sequence.num_tokens >= self._max_model_len:
                continue
            if sequence not in self._shadows:
                if sequence.group in begun:  # what the first of them computes now, the others find cached
                    continue
                begun.add(sequence.group)
            copy = self._follow(sequence)
            if _num_left(copy) > MOST_LEFT:
                behind.append(copy)
        budget = self._max_num_batched_tokens
        for copy in sorted(behind, key=_num_left):
            num_new = min(budget, _num_left(copy) - MOST_LEFT)
            if num_new and self._allocate(copy, num_new, guessing):
                copy.num_scheduled_tokens = num_new
                budget -= num_new
        scheduled = [copy for copy in behind if copy.num_scheduled_tokens]
        if scheduled:
            self._copy_blocks()
            self._runner.compute(scheduled, [])

    def _guess(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        guessing = set(sequences)
        rows: list[int] = []
        copies: list[Sequence] = []
        limits: list[int] = []
        for row, sequence in enumerate(sequences):
            limit = min(max_tokens[row], self._max_model_len - sequence.num_tokens)
            if limit <= 0 or sequence not in self._shadows:
                continue
            copy = self._shadows[sequence].sequence
            if _num_left(copy) <= MOST_LEFT and self._allocate(copy, _num_left(copy), guessing):
                rows.append(row)
                copies.append(copy)
                limits.append(limit)
        guesses: list[list[int]] = [[] for _ in sequences]
        if copies:
            self._copy_blocks()
            for row, guess in zip(rows, self._runner.extend(copies, limits), strict=True):
                guesses[row] = guess
        return guesses

    def _follow(self, sequence: Sequence) -> Sequence:
        """The draft model's copy of `sequence`, brought to the same tokens, of which the last is yet to be computed."""
        shadow = self._shadows.pop(sequence, None) or self._begin(sequence)
        self._shadows[sequence] = shadow
        tokens, copy = sequence.token_ids, shadow.sequence
        num_same = shadow.num_tokens
        while num_same < min(len(tokens), copy.num_tokens) and copy.token_ids[num_same] == tokens[num_same]:
            num_same += 1
        copy.token_ids[num_same:] = tokens[num_same:]
        copy.num_buffered_tokens = min(copy.num_buffered_tokens, num_same)
        shadow.num_tokens = len(tokens)
        num_computed = min(num_same, len(tokens) - 1)
        if copy.num_computed_tokens > num_computed:
            self._cache.trim(copy, num_computed)
        self._cache.commit(copy)
        return copy

    def _begin(self, sequence: Sequence) -> _Shadow:
        copy = Sequence(sequence.group, sequence.index, sequence.max_length)
        copy.token_ids = list(sequence.token_ids)
        self._cache.adopt(copy, self._cache.match(copy))
        self._cache.adopt_partial(copy)
        return _Shadow(copy, copy.num_tokens)

    def _allocate(self, copy: Sequence, num_new_tokens: int, guessing: set[Sequence]) -> bool:
        """Room for the next tokens of `copy`, at the cost of sequences other than those of this call."""
        while not self._cache.allocate(copy, num_new_tokens):
            unused = next((sequence for sequence in self._shadows if sequence not in guessing), None)
            if unused is None:
                return False
            self.forget(unused)
        return True

    def _copy_blocks(self) -> None:
        copies = self._cache.take_copies()
        if copies:
            self._backend.copy_blocks(np.array(copies, np.int32))

    def _abandon(self, sequences: list[Sequence]) -> None:
        """Something failed while blocks of `sequences` were written: what they hold is not known."""
        for sequence in sequences:
            if (shadow := self._shadows.pop(sequence, None)) is not None:
                self._cache.free(shadow.sequence)


def _num_left(copy: Sequence) -> int:
    """Tokens that are yet to be computed."""
    return copy.num_tokens - copy.num_computed_tokens
