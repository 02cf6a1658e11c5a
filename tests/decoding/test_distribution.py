"""Weights, probabilities and entropy against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import distribution
from tests.support.logits import many_logits, naive_entropy, random_logits, softmax
from tests.support.mutants import mutant


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    x = np.linspace(-87, 0, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(distribution.exp(x) - exact) <= np.spacing(exact.astype(np.float32)))
    assert distribution.exp(np.float32([0.0]))[0] == 1.0


@pytest.mark.slow
def test_exp_is_monotonic_over_every_float_that_matters() -> None:
    """What lets the native sampler take weights and logits to have the same order."""
    first, last = (int(np.float32(x).view(np.uint32)) for x in (-(2.0**-25), -28.5))
    assert distribution.exp(np.float32([-(2.0**-25)]))[0] == 1.0  # and all that are nearer to 0
    assert np.rint(distribution.exp(np.float32([-28.5]))[0] * distribution.WEIGHT_ONE) == 0.0
    chunk = 1 << 20
    previous = np.float32(1.0)
    for begin in range(first, last + 1, chunk):
        e = distribution.exp(np.arange(begin, min(begin + chunk, last + 1), dtype=np.uint32).view(np.float32))
        assert e[0] <= previous
        assert np.all(e[1:] <= e[:-1])
        previous = e[-1]


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_equal_softmax(seed: int) -> None:
    logits = random_logits(seed, 50_000, spread=(0.1, 1.0, 3.0, 10.0, 50.0)[seed])
    probabilities = distribution.probabilities(logits)
    assert np.max(np.abs(probabilities - softmax(logits))) < 1e-6
    assert abs(probabilities.sum() - 1.0) < 1e-12


def test_weights_fit_the_largest_vocabulary() -> None:
    total = distribution.weights(np.zeros(distribution.MAX_VOCAB_SIZE, dtype=np.float32)).sum()
    assert total == distribution.MAX_VOCAB_SIZE * distribution.WEIGHT_ONE < 2**63


def check_entropy() -> None:
    for logits in many_logits(0, 200):
        assert distribution.entropy(logits) == pytest.approx(naive_entropy(logits), abs=1e-6)


def test_entropy() -> None:
    check_entropy()
    assert distribution.entropy(np.zeros(1024, dtype=np.float32)) == pytest.approx(np.log(1024), abs=1e-15)
    assert distribution.entropy(np.float32([3e38, -3e38, -np.inf])) == 0.0


def test_a_wrong_entropy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that forgets the logarithm of the sum."""
    monkeypatch.setattr(distribution, "entropy", mutant(distribution.entropy, "log_total(logits) + ", ""))
    with pytest.raises(AssertionError):
        check_entropy()


def test_the_sum_of_gaps_fits_the_largest_vocabulary() -> None:
    """A weight times its gap is largest at a gap of 1: 2**40 / e."""
    assert distribution.MAX_VOCAB_SIZE * distribution.WEIGHT_ONE / np.e < 2**61
