"""The sampling oracle: greedy, draws, log-probabilities, extremes, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import SamplingBatch
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.decoding import logits_processors, rng, sampler
from tests.support.sampling import chi_squared_bound, make_batch


def test_greedy_takes_the_highest_and_the_lowest_id_on_a_tie() -> None:
    logits = np.array([[0, 5, 5, 1], [7, 5, 5, 7], [-np.inf, -np.inf, -3, -np.inf]], dtype=np.float32)
    assert sampler.sample(logits, make_batch(3, temperature=0)).token_ids.tolist() == [1, 0, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_the_smallest_temperatures_choose_as_greedy_does(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    tokens = sampler.sample(logits, make_batch(5, temperature=temperature)).token_ids
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


def test_huge_logits_and_a_single_possible_token() -> None:
    logits = np.full((2, 9), -np.inf, dtype=np.float32)
    logits[0, 4] = -3.4e38
    logits[1] = [3.4e38, -3.4e38, 3.4e38, 0, 1, 2, 3, 4, 5]
    tokens = sampler.sample(logits, make_batch(2, temperature=1.0)).token_ids
    assert tokens[0] == 4
    assert tokens[1] in (0, 2)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "token 3 has NaN"), (np.inf, r"token 3 has \+inf"), (-np.inf, "every token")]
)
def test_logits_that_cannot_be_sampled(value: float, message: str) -> None:
    logits = np.zeros((2, 8), dtype=np.float32)
    logits[1, 3:] = value
    if value == -np.inf:
        logits[1] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(BackendError, match=f"row 1 cannot be sampled: {message}"):
            sampler.sample(logits, make_batch(2, temperature=temperature))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", np.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("num_logprobs", -2),
    ],
)
def test_parameters_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} of row 0 is .*; it must be") as error:
        sampler.sample(np.zeros((1, 4), dtype=np.float32), make_batch(1, **{name: value}))
    assert error.value.param == name


def test_mismatched_lengths() -> None:
    with pytest.raises(BackendError, match=r"shape \(3, 4\), but there are 2 rows"):
        sampler.sample(np.zeros((3, 4), dtype=np.float32), make_batch(2))


def test_logprobs_are_those_of_the_raw_softmax() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (3, 1000)).astype(np.float32)
    batch = make_batch(3, temperature=0.5, top_k=3, num_logprobs=[-1, 0, 5])
    out = sampler.sample(logits, batch)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert np.isnan(out.logprobs[0])
    for row in (1, 2):
        assert abs(out.logprobs[row] - exact[row, out.token_ids[row]]) < 1e-6
    assert out.top_ids.shape == out.top_logprobs.shape == (3, 5)
    assert (out.top_ids[:2] == -1).all()
    assert np.isnan(out.top_logprobs[:2]).all()
    assert out.top_ids[2].tolist() == np.argsort(-logits[2], kind="stable")[:5].tolist()
    assert np.max(np.abs(out.top_logprobs[2] - exact[2, out.top_ids[2]])) < 1e-6


def test_more_logprobs_than_tokens() -> None:
    out = sampler.sample(np.zeros((1, 3), dtype=np.float32), make_batch(1, num_logprobs=100))
    assert out.top_ids.tolist() == [[0, 1, 2]]


def test_replaying_the_draw_gives_the_token_and_it_survived() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (50, 400)).astype(np.float32)
    batch = make_batch(50, temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=99)
    tokens = sampler.sample(logits, batch).token_ids
    for row, token in enumerate(tokens):
        final = sampler.process(logits[row], temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)
        assert final[token] > -np.inf
        assert sampler.draw(final, rng.draw_bits(99, 0, row)) == token


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 2, (20, 200)).astype(np.float32)
    batch = make_batch(20, temperature=1.0, top_p=0.9, seed=np.arange(20) % 3)
    tokens = sampler.sample(logits, batch).token_ids
    order = generator.permutation(20)
    shuffled = SamplingBatch(batch.rows[order])
    assert sampler.sample(logits[order], shuffled).token_ids.tolist() == tokens[order].tolist()


def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(4).normal(0, 1, 20).astype(np.float32)
    draws = [sampler.draw(logits, rng.draw_bits(5, 0, position)) for position in range(5000)]
    expected = logits_processors.probabilities(logits) * len(draws)
    statistic = np.sum((np.bincount(draws, minlength=20) - expected) ** 2 / expected)
    assert statistic < chi_squared_bound(19)


def test_the_boundaries_of_a_draw() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32)
    assert sampler.draw(logits, 0) == 1
    assert sampler.draw(logits, 2**63 - 1) == 1
    assert sampler.draw(logits, 2**63) == 3
    assert sampler.draw(logits, 2**64 - 1) == 3


def test_the_boundaries_catch_a_draw_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    search = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda a, v, side: search(a, v, side="left"))
    with pytest.raises(AssertionError):
        test_the_boundaries_of_a_draw()
