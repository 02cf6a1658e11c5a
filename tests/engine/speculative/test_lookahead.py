"""Lookahead decoding over functions that stand for a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from zlib import crc32

import pytest

from pellucid.core.sequence import Sequence
from pellucid.engine.speculative import lookahead
from pellucid.engine.speculative.lookahead import LookaheadDrafter, NgramPool
from tests.support.mutants import mutant
from tests.support.sequences import make_sequence

Model = Callable[[list[int]], int]


def cycle(tokens: list[int]) -> int:
    """The next token is a function of the last one, and all 40 come before one comes again."""
    return 7 * (tokens[-1] + 3) % 41


def hashed(tokens: list[int]) -> int:
    return crc32(bytes(tokens[-2:])) % 41


def decode(
    drafter: LookaheadDrafter, sequence: Sequence, model: Model, num_tokens: int, *, most: int, computed: int = 100
) -> int:
    """Let `sequence` grow by what `model` chooses, of each guess the first `computed` tokens at most; the number of
    steps."""
    num_steps, end = 0, len(sequence.token_ids) + num_tokens
    while len(sequence.token_ids) < end:
        limit = min(most, end - len(sequence.token_ids) - 1)
        guess = drafter.propose([sequence], [limit])[0] if limit else []
        assert len(guess) <= limit
        drafts = guess[:computed]
        text = sequence.token_ids + drafts
        chosen = [model(text[: len(text) - len(drafts) + row]) for row in range(1 + len(drafts))]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == chosen[accepted]:
            accepted += 1
        sequence.token_ids += chosen[: accepted + 1]
        if drafts:
            drafter.observe(sequence, drafts, chosen)
        num_steps += 1
    return num_steps


def alone(tokens: list[int], model: Model, num_tokens: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(num_tokens):
        tokens.append(model(tokens))
    return tokens


@pytest.mark.parametrize("model", [cycle, hashed])
@pytest.mark.parametrize(("ngram_size", "window", "most"), [(2, 1, 1), (4, 8, 16), (3, 5, 7), (4, 8, 3), (5, 16, 16)])
def test_whatever_it_guesses_the_model_decides(model: Model, ngram_size: int, window: int, most: int) -> None:
    sequence = make_sequence([5, 9, 1])
    wanted = alone([5, 9, 1], model, 60)
    num_steps = decode(LookaheadDrafter(ngram_size, window), sequence, model, 60, most=most)
    assert sequence.token_ids == wanted
    assert num_steps <= 60


PROMPT = [5, 20, 33, 14, 27, 9, 1]


def steps_of_a_cycle(drafter: LookaheadDrafter, computed: int = 100) -> int:
    return decode(drafter, make_sequence(PROMPT), cycle, 30, most=16, computed=computed)


def test_rows_behind_wrong_guesses_save_steps() -> None:
    """No token of the output comes twice, so that only what the window has chosen in passing can be guessed."""
    assert len(set(alone([1], cycle, 30))) == 31
    assert steps_of_a_cycle(LookaheadDrafter(4, 8)) <= 15
    assert steps_of_a_cycle(LookaheadDrafter(4, 8), computed=1) == 30


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("observe", "pool.add(context[: first_row + row], token_id)", "pass"),
        ("observe", "first_row + row]", "first_row]"),
        ("_guess", "text.append(state.guesses[index])", "text.append(0)"),
    ],
)
def test_the_count_notices_a_window_that_teaches_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, old: str, new: str
) -> None:
    monkeypatch.setattr(LookaheadDrafter, method, mutant(getattr(LookaheadDrafter, method), old, new))
    assert steps_of_a_cycle(LookaheadDrafter(4, 8)) > 15


def observed(drafter: LookaheadDrafter) -> list[int]:
    """The guess after the first 2 of 5 draft tokens were accepted."""
    sequence = make_sequence([1, 2, 3])
    drafts = drafter.propose([sequence], [5])[0]
    assert len(drafts) == 5
    chosen = [*drafts[:2], 30, 31, 32, 33]
    assert drafts[2] != 30
    sequence.token_ids += chosen[:3]
    drafter.observe(sequence, drafts, chosen)
    return drafter.propose([sequence], [3])[0]


def test_the_window_is_what_was_chosen_at_its_places() -> None:
    assert observed(LookaheadDrafter(2, 5)) == [31, 32, 33]


def test_the_window_test_notices_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(LookaheadDrafter.observe, "[first_wrong + 1 :]", "[first_wrong:]")
    monkeypatch.setattr(LookaheadDrafter, "observe", changed)
    assert observed(LookaheadDrafter(2, 5)) != [31, 32, 33]


def test_a_candidate_comes_before_the_window() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2]
    guess = LookaheadDrafter(3, 4).propose([make_sequence(text)], [8])[0]
    assert guess[:4] == [3, 4, 5, 6]
    assert len(guess) == 8
    assert LookaheadDrafter(3, 4).propose([make_sequence(text)], [3])[0][:2] == [3, 4]


def test_a_pool_prefers_what_came_after_more_of_the_text_and_what_came_last() -> None:
    pool = NgramPool(3)
    assert pool.find([1, 2]) is None
    pool.add([1, 2], 3)
    pool.add([9, 2], 4)
    assert pool.find([1, 2]) == 3
    assert pool.find([9, 2]) == 4
    assert pool.find([8, 2]) == 4
    pool.add([0, 1, 2], 5)
    assert pool.find([7, 1, 2]) == 5
    assert pool.find([]) is None


def test_a_pool_forgets_what_was_entered_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "MAX_POOL_ENTRIES", 3)
    pool = NgramPool(2)
    for token in (1, 2, 3, 1, 4):
        pool.add([token], token + 10)
    assert len(pool) == 3
    assert [pool.find([token]) for token in (1, 2, 3, 4)] == [11, None, 13, 14]


def test_a_long_prompt_enters_no_more_than_the_pool_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "MAX_POOL_ENTRIES", 30)
    added: list[int] = []
    add = NgramPool.add

    def counted(self: NgramPool, context: list[int], token_id: int) -> None:
        added.append(token_id)
        add(self, context, token_id)

    monkeypatch.setattr(NgramPool, "add", counted)
    rng = random.Random(0)
    text = [rng.randrange(40) for _ in range(1000)]
    LookaheadDrafter(4, 4).propose([make_sequence(text)], [4])
    assert added == text[-10:]


def test_nothing_is_kept_of_a_sequence_that_was_forgotten() -> None:
    drafter = LookaheadDrafter(4, 4)
    sequence, stranger = make_sequence([1, 2, 3]), make_sequence([1, 2, 3])
    first = drafter.propose([sequence], [4])
    drafter.observe(sequence, first[0], [40, 40, 40, 40, 40])
    assert drafter.propose([sequence], [4]) != first
    drafter.forget(sequence)
    drafter.forget(stranger)
    drafter.observe(stranger, [1], [2, 3])
    assert drafter.propose([sequence], [4]) == first
    drafter.close()
    assert not drafter._states
