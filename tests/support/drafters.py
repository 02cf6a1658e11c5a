"""Whoever guesses ahead: at random, or the truth, or some of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as ListLike

from pellucid.core.sequence import Sequence


class ScriptedDrafter:
    """Guesses what is chosen in the end, as far as it knows, with a wrong token here and there. Implements `Drafter`.

    Args:
        truth: the whole output of each sequence, by (seed, index); nothing is known of others.
        wrong: the share of guesses that are any token at all.
        shorten: the share of guesses that are shorter than they may be.

    Attributes:
        observed: drafts and what was chosen, of every step.
        forgotten: sequences that have ended.
    """

    is_cheap = True

    def __init__(
        self,
        vocab_size: int,
        truth: Mapping[tuple[int, int], ListLike[int]] | None = None,
        wrong: float = 0.0,
        shorten: float = 0.3,
    ) -> None:
        self._vocab_size = vocab_size
        self._truth = truth or {}
        self._wrong = wrong
        self._shorten = shorten
        self._rng = random.Random(5)
        self.observed: list[tuple[Sequence, list[int], list[int]]] = []
        self.forgotten: list[Sequence] = []
        self.num_asked = 0

    def prepare(self, sequences: list[Sequence]) -> None:
        """It knows already."""

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        self.num_asked += 1
        return [self._guess(sequence, most) for sequence, most in zip(sequences, max_tokens, strict=True)]

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        assert len(chosen_token_ids) == 1 + len(draft_token_ids)
        self.observed.append((sequence, draft_token_ids, chosen_token_ids))

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)

    def close(self) -> None:
        """Nothing to free."""

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        truth = self._truth.get((sequence.group.seed, sequence.index), ())
        coming = list(truth[sequence.num_output_tokens :][:most])
        guess = coming + [self._rng.randrange(self._vocab_size) for _ in range(most - len(coming))]
        length = self._rng.randint(0, most) if self._rng.random() < self._shorten else most
        return [
            self._rng.randrange(self._vocab_size) if self._rng.random() < self._wrong else token
            for token in guess[:length]
        ]
