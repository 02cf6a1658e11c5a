from __future__ import annotations

import random
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.decoding import beam as beam_module
from pellucid.decoding.beam import Beam, BeamSearch, Choices, Ending
from tests.support.mutants import mutant

VOCAB_SIZE = 23


def logprobs(tokens: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """What a made-up model expects after `tokens`: float64 [VOCAB_SIZE], some -inf."""
    rng = np.random.RandomState(crc32(repr((seed, *tokens)).encode()))
    logits = rng.normal(0, 2, VOCAB_SIZE)
    logits[rng.random(VOCAB_SIZE) < 0.1] = -np.inf
    result: NDArray[np.float64] = (logits - np.log(np.exp(logits).sum())).astype(np.float32).astype(np.float64)
    return result


def naive_search(
    seed: int,
    endings: set[int],
    num_beams: int,
    max_length: int,
    length_penalty: float,
    early_stopping: Any,
    num_groups: int,
    diversity_penalty: float,
) -> list[tuple[tuple[int, ...], float]]:
    """Every answer with its score, the best first: each step sorts all continuations of all beams over the whole
    vocabulary."""
    size = num_beams // num_groups
    groups: list[list[tuple[tuple[int, ...], float]]] = [[((), 0.0)] for _ in range(num_groups)]
    finished: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(num_groups)]
    for length in range(1, max_length + 1):
        counts = np.zeros(VOCAB_SIZE)
        for group in range(num_groups):
            candidates = []
            for tokens, score in groups[group]:
                scores = score + logprobs(tokens, seed) - diversity_penalty * counts
                candidates += [((*tokens, token), scores[token]) for token in range(VOCAB_SIZE)]
            candidates = [candidate for candidate in candidates if candidate[1] > -np.inf]
            candidates.sort(key=lambda candidate: -candidate[1])
            ended = [tokens[-1] in endings or length == max_length for tokens, _ in candidates]
            finished[group] += [
                (tokens, score / length**length_penalty)
                for (tokens, score), has_ended in list(zip(candidates, ended, strict=True))[:size]
                if has_ended
            ]
            finished[group] = sorted(finished[group], key=lambda answer: -answer[1])[:size]
            groups[group] = [c for c, has_ended in zip(candidates, ended, strict=True) if not has_ended][:size]
            if len(finished[group]) == size and groups[group]:
                hypothetical = max_length if early_stopping == "never" and length_penalty > 0 else length
                best_possible = groups[group][0][1] / hypothetical**length_penalty
                if early_stopping is True or best_possible <= finished[group][-1][1]:
                    groups[group] = []
            for tokens, _ in groups[group]:
                counts[tokens[-1]] += 1
    return sorted((answer for group in finished for answer in group), key=lambda answer: -answer[1])


def search(seed: int, endings: set[int], num_beams: int, max_length: int, **options: Any) -> BeamSearch:
    def ends(beam: Beam) -> Ending | None:
        return ("stop", beam.token_id) if beam.token_id in endings else None

    made = BeamSearch(num_beams, max_length=max_length, ends=ends, num_ending_tokens=len(endings), **options)
    while made.live:
        rows = []
        for beam in made.live:
            row = logprobs(tokens_of(beam), seed)
            top = np.argsort(-row, kind="stable")[: made.num_choices]
            rows.append(Choices(top.astype(np.int32), row[top].astype(np.float32)))
        live = list(made.live)
        for beam in made.advance(rows):
            assert beam.parent in live
        assert [beam.row for beam in made.live] == list(range(len(made.live)))
        assert len(made.live) <= num_beams
    return made


def tokens_of(beam: Beam) -> tuple[int, ...]:
    return tuple(step.token_id for step in beam.path)


def check_against_naive(seeds: range) -> dict[str, int]:
    counts = {"stop": 0, "length": 0, "early": 0}
    for seed in seeds:
        rng = random.Random(seed)
        num_groups = rng.choice([1, 1, 2, 3])
        num_beams = num_groups * rng.choice([1, 2, 3, 4])
        max_length = rng.choice([1, 2, 5, 12])
        endings = set(rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 3, 6])))
        length_penalty = rng.choice([1.0, 0.0, 2.0, -0.5])
        early_stopping = rng.choice([True, False, "never"])
        penalty = rng.choice([0.5, 3.0]) if num_groups > 1 else 0.0
        expected = naive_search(
            seed, endings, num_beams, max_length, length_penalty, early_stopping, num_groups, penalty
        )
        made = search(
            seed,
            endings,
            num_beams,
            max_length,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_beam_groups=num_groups,
            diversity_penalty=penalty,
        )
        found = made.best(num_beams)
        assert [tokens_of(beam) for beam in found] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], rtol=1e-9)
        for beam in found:
            assert beam.ending is not None
            counts[beam.ending[0]] += 1
            own = [logprobs(tokens_of(beam)[:index], seed)[step.token_id] for index, step in enumerate(beam.path)]
            assert beam.cumulative_logprob == pytest.approx(sum(own), rel=1e-6)
        counts["early"] += max((beam.length for beam in found), default=0) < max_length
    return counts


def test_it_finds_what_a_naive_search_finds() -> None:
    counts = check_against_naive(range(200))
    assert min(counts.values()) > 20, counts


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        (beam_module._Group, "advance", "elif rank < self._size:", "else:"),
        (beam_module._Group, "advance", "/ length**self._length_penalty", "/ length"),
        (beam_module._Group, "advance", "-beam.score)[: self._size]", "-beam.score)"),
        (beam_module._Group, "_is_over", "return True", "pass"),
        (beam_module._Group, "_is_over", "length = self._max_length", "pass"),
        (beam_module._Group, "_is_over", "<= self.ended", "> self.ended"),
        (beam_module._Group, "_continuations", "- diversity_penalty", "+ 0"),
        (BeamSearch, "advance", "chosen.update(beam.token_id for beam in group.live)", "pass"),
    ],
)
def test_mutants_are_caught(owner: Any, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name), old, new))
    with pytest.raises(AssertionError):
        check_against_naive(range(200))


def test_ties_fall_to_the_better_beam_and_the_lower_token() -> None:
    made = BeamSearch(2, max_length=5, ends=lambda beam: None, num_ending_tokens=0)
    even = Choices(np.array([4, 2, 9], np.int32), np.full(3, -1.0, np.float32))
    assert [(beam.row, beam.token_id) for beam in made.advance([even])] == [(0, 2), (1, 4)]
    assert [tokens_of(beam) for beam in made.advance([even, even])] == [(2, 2), (2, 4)]


def test_a_search_that_runs_out_of_continuations_gives_what_it_has() -> None:
    """A grammar may leave fewer texts than there are beams."""
    made = BeamSearch(
        3, max_length=9, ends=lambda beam: ("stop", None) if beam.token_id == 1 else None, num_ending_tokens=1
    )
    only = Choices(np.array([7, 1], np.int32), np.array([-0.5, -np.inf], np.float32))
    end = Choices(np.array([1, 7], np.int32), np.array([-0.1, -np.inf], np.float32))
    assert len(made.advance([only])) == 1
    assert made.advance([end]) == []
    assert [tokens_of(beam) for beam in made.best(3)] == [(7, 1)]


def test_before_the_end_the_best_are_those_that_ended_and_then_those_that_live() -> None:
    made = BeamSearch(
        2, max_length=9, ends=lambda beam: ("stop", None) if beam.token_id == 1 else None, num_ending_tokens=1
    )
    assert [tokens_of(beam) for beam in made.best(2)] == [()]
    made.advance([Choices(np.array([5, 1, 6], np.int32), np.array([-0.5, -1.0, -2.0], np.float32))])
    assert [tokens_of(beam) for beam in made.best(3)] == [(1,), (5,), (6,)]
    assert [beam.ending for beam in made.best(3)] == [("stop", None), None, None]
