"""Prompt lookup, held against a search through the whole text."""

from __future__ import annotations

import gc
import random

import pytest

from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.speculative.ngram import NgramDrafter, _Followers
from tests.support.counting import count_steps
from tests.support.mutants import mutant
from tests.support.sequences import make_group, make_sequence


def searched(tokens: list[int], most: int, shortest: int, longest: int) -> list[int]:
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tokens[-length:]:
                guess = []
                text = list(tokens)
                for place in range(begin + length, begin + length + most):
                    guess.append(text[place])
                    text.append(text[place])
                return guess
    return []


def guess(drafter: NgramDrafter, sequence: Sequence, most: int) -> list[int]:
    return drafter.propose([sequence], [most])[0]


def check(seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    longest = rng.randint(shortest, 5)
    drafter = NgramDrafter(shortest, longest)
    vocabulary = rng.choice([2, 4, 20])
    sequence = make_sequence([rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))])
    for _ in range(40):
        most = rng.randint(1, 8)
        assert guess(drafter, sequence, most) == searched(sequence.token_ids, most, shortest, longest)
        sequence.token_ids += [rng.randrange(vocabulary) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_a_search_finds(seed: int) -> None:
    check(seed)


def test_what_repeats_goes_on_repeating() -> None:
    drafter = NgramDrafter(2, 4)
    assert guess(drafter, make_sequence([9, 1, 2, 3, 1, 2, 3, 1, 2]), 7) == [3, 1, 2, 3, 1, 2, 3]
    assert guess(drafter, make_sequence([4, 4, 4]), 3) == [4, 4, 4]


def test_nothing_is_guessed_of_what_was_never_there() -> None:
    assert guess(NgramDrafter(2, 4), make_sequence([1, 2, 3, 4]), 5) == []
    assert guess(NgramDrafter(2, 4), make_sequence([1]), 5) == []
    assert guess(NgramDrafter(3, 4), make_sequence([1, 2, 5, 1, 2]), 5) == []


def test_continuations_share_the_prompt_and_nothing_else() -> None:
    drafter = NgramDrafter(2, 3)
    group = make_group([1, 2, 3, 4, 5], SamplingParams(n=2))
    first, second = group.sequences
    first.token_ids += [7, 8, 9, 7, 8]
    second.token_ids += [1, 2]
    assert drafter.propose([first, second], [1, 2]) == [[9], [3, 4]]
    assert len(drafter._prompts) == 1
    second.token_ids += [7, 8]
    assert guess(drafter, second, 1) == []
    drafter.forget(first)
    assert guess(drafter, second, 1) == []
    drafter.forget(second)
    gc.collect()
    assert not drafter._prompts
    assert not drafter._indexes
    drafter.forget(second)


def cost_of_a_token(num_tokens: int) -> int:
    drafter = NgramDrafter(2, 4)
    sequence = make_sequence([(7 * index * index) % 61 for index in range(num_tokens)])
    guess(drafter, sequence, 4)
    sequence.token_ids.append(3)
    return count_steps(lambda: guess(drafter, sequence, 4))


def test_a_token_costs_the_same_in_any_text() -> None:
    assert cost_of_a_token(5000) <= cost_of_a_token(50) + 5


def test_mutant_index_that_finds_the_first_occurrence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    first = mutant(
        _Followers.add,
        "positions[tuple(tokens[position - length : position])] = position",
        "positions.setdefault(tuple(tokens[position - length : position]), position)",
    )
    monkeypatch.setattr(_Followers, "add", first)
    with pytest.raises(AssertionError):
        check(0)
