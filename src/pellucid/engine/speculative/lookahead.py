"""Lookahead decoding: the model guesses for itself, from what it has chosen in passing.

Fu, Bailis, Stoica & Zhang, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding", ICML 2024
(arXiv:2402.02057); the window alone is Jacobi decoding (Santilli et al., 2023, arXiv:2305.10427). How this one differs
from the paper's is in docs/speculation.md.
"""

from __future__ import annotations

from pellucid.core.sequence import Sequence
from pellucid.engine.speculative.speculation import num_accepted

MAX_POOL_ENTRIES = 1 << 14
"""Of one sequence; what was entered longest ago goes first."""


class LookaheadDrafter:
    """Guesses a candidate from a pool of n-grams, and behind it a window of single guesses. Implements `Drafter`.

    Every row of a step chooses a token, those behind a wrong guess too. What a row chose is the next guess at its place
    (a Jacobi iteration), and with the tokens before it an n-gram that the model has come to. The text itself is entered
    in the pool as well, as the authors' implementation can.

    Args:
        ngram_size: tokens of an n-gram: up to `ngram_size` - 1 of them in a row say which comes next.
        window: most guesses behind the candidate. It has half of the guesses at most, unless the candidate is short.
    """

    is_cheap = True

    def __init__(self, ngram_size: int, window: int) -> None:
        self._ngram_size = ngram_size
        self._window = window
        self._states: dict[Sequence, _State] = {}

    def prepare(self, sequences: list[Sequence]) -> None:
        """Guessing takes nothing else."""

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        return [self._guess(sequence, most) for sequence, most in zip(sequences, max_tokens, strict=True)]

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        state = self._states.get(sequence)
        if state is None:
            return
        pool, begin = state.pool, state.num_tokens
        context = [*sequence.token_ids[max(0, begin - self._ngram_size) : begin], *draft_token_ids]
        first_row = len(context) - len(draft_token_ids)
        for row, token_id in enumerate(chosen_token_ids):
            pool.add(context[: first_row + row], token_id)
        first_wrong = num_accepted(draft_token_ids, chosen_token_ids)
        state.guesses = chosen_token_ids[first_wrong + 1 :]
        state.first_guess = begin + first_wrong + 1

    def forget(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)

    def close(self) -> None:
        self._states.clear()

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = _State(self._ngram_size)
        state.enter(sequence.token_ids)
        pool, begin = state.pool, state.num_tokens
        text = sequence.token_ids[-self._ngram_size :]
        first = len(text)
        longest = max(most - self._window, (most + 1) // 2)
        while len(text) - first < longest and (token_id := pool.find(text)) is not None:
            text.append(token_id)
        candidate_end = begin + len(text) - first
        for position in range(candidate_end, min(candidate_end + self._window, begin + most)):
            index = position - state.first_guess
            if 0 <= index < len(state.guesses):
                text.append(state.guesses[index])
            else:  # nothing was ever chosen there: any token will do to begin with
                token_id = pool.find(text)
                text.append(sequence.token_ids[position % begin] if token_id is None else token_id)
        return text[first:]


class _State:
    """What is known of one sequence.

    Attributes:
        pool: its n-grams.
        num_tokens: how many of its tokens are entered in the pool: all, as of the last guess.
        guesses: what the rows behind the first wrong guess chose, by position.
        first_guess: position of the first of them.
    """

    __slots__ = ("first_guess", "guesses", "num_tokens", "pool")

    def __init__(self, ngram_size: int) -> None:
        self.pool = NgramPool(ngram_size)
        self.num_tokens = 0
        self.guesses: list[int] = []
        self.first_guess = 0

    def enter(self, token_ids: list[int]) -> None:
        """Enter the tokens that have come since; of a long prompt, as many as the pool holds."""
        size = self.pool.ngram_size
        oldest = max(1, self.num_tokens, len(token_ids) - MAX_POOL_ENTRIES // (size - 1))
        for position in range(oldest, len(token_ids)):
            self.pool.add(token_ids[max(0, position - size) : position], token_ids[position])
        self.num_tokens = len(token_ids)


class NgramPool:
    """Which token came last after each run of up to `ngram_size` - 1 tokens."""

    __slots__ = ("_next", "ngram_size")

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = ngram_size
        self._next: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._next)

    def add(self, context: list[int], token_id: int) -> None:
        """Enter that `token_id` came after `context`."""
        entries = self._next
        for length in range(1, min(self.ngram_size, len(context) + 1)):
            key = tuple(context[-length:])
            entries.pop(key, None)
            entries[key] = token_id
        while len(entries) > MAX_POOL_ENTRIES:
            del entries[next(iter(entries))]

    def find(self, context: list[int]) -> int | None:
        """What came last after the longest end of `context` that anything came after; None if nothing ever did."""
        for length in range(min(self.ngram_size - 1, len(context)), 0, -1):
            if (token_id := self._next.get(tuple(context[-length:]))) is not None:
                return token_id
        return None
