"""Weights and temperature against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import logits_processors as transforms
from pellucid.decoding.logits_processors import Logits
from tests.support.logits import many_logits, random_logits, softmax
from tests.support.mutants import mutant


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    x = np.linspace(-87, 0, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(transforms.exp(x) - exact) <= np.spacing(exact.astype(np.float32)))
    assert transforms.exp(np.float32([0.0]))[0] == 1.0


@pytest.mark.slow
def test_exp_is_monotonic_over_every_float_that_matters() -> None:
    """What lets the native sampler take weights and logits to have the same order."""
    first, last = (int(np.float32(x).view(np.uint32)) for x in (-(2.0**-25), -28.5))
    assert transforms.exp(np.float32([-(2.0**-25)]))[0] == 1.0  # and all that are nearer to 0
    assert np.rint(transforms.exp(np.float32([-28.5]))[0] * transforms.WEIGHT_ONE) == 0.0
    chunk = 1 << 20
    previous = np.float32(1.0)
    for begin in range(first, last + 1, chunk):
        e = transforms.exp(np.arange(begin, min(begin + chunk, last + 1), dtype=np.uint32).view(np.float32))
        assert e[0] <= previous
        assert np.all(e[1:] <= e[:-1])
        previous = e[-1]


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_equal_softmax(seed: int) -> None:
    logits = random_logits(seed, 50_000, spread=(0.1, 1.0, 3.0, 10.0, 50.0)[seed])
    probabilities = transforms.probabilities(logits)
    assert np.max(np.abs(probabilities - softmax(logits))) < 1e-6
    assert abs(probabilities.sum() - 1.0) < 1e-12


def test_weights_fit_the_largest_vocabulary() -> None:
    total = transforms.weights(np.zeros(transforms.MAX_VOCAB_SIZE, dtype=np.float32)).sum()
    assert total == transforms.MAX_VOCAB_SIZE * transforms.WEIGHT_ONE < 2**63


def test_temperature() -> None:
    logits = random_logits(0)
    for value in (0.1, 0.7, 1.0, 1.5):
        scaled = transforms.temperature(logits, value)
        assert np.max(np.abs(softmax(scaled) - softmax((logits / value).astype(np.float32)))) < 1e-6
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_temperatures(value: float) -> None:
    logits = np.array([1.0, 3.0e38, -3.0e38, -np.inf, 2.9e38], dtype=np.float32)
    scaled = transforms.temperature(logits, value)
    assert not np.isnan(scaled).any()
    assert scaled[1] == 0.0
    assert scaled[3] == -np.inf
    if value < 1:
        assert transforms.probabilities(scaled)[1] == 1.0


def naive_entropy(logits: Logits) -> float:
    p = softmax(logits)
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def check_entropy() -> None:
    for logits in many_logits(0, 200):
        assert transforms.entropy(logits) == pytest.approx(naive_entropy(logits), abs=1e-6)


def test_entropy() -> None:
    check_entropy()
    assert transforms.entropy(np.zeros(1024, dtype=np.float32)) == pytest.approx(np.log(1024), abs=1e-15)
    assert transforms.entropy(np.float32([3e38, -3e38, -np.inf])) == 0.0


def test_a_wrong_entropy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that forgets the logarithm of the sum."""
    monkeypatch.setattr(transforms, "entropy", mutant(transforms.entropy, "log_total(logits) + ", ""))
    with pytest.raises(AssertionError):
        check_entropy()


def test_the_sum_of_gaps_fits_the_largest_vocabulary() -> None:
    """A weight times its gap is largest at a gap of 1: 2**40 / e."""
    assert transforms.MAX_VOCAB_SIZE * transforms.WEIGHT_ONE / np.e < 2**61


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_temperature(seed: int) -> None:
    for value, spread, exponent in ((1.0, 0.5, 1.0), (0.7, 0.7, 0.5), (0.3, 2.0, 2.0), (1.5, 0.1, 0.0)):
        for logits in many_logits(seed, 20):
            count = np.count_nonzero(logits > -np.inf)
            share = (naive_entropy(logits) / np.log(count)) ** exponent if count > 1 else 0.0
            low, high = max(0.0, value - spread), value + spread
            scaled = (logits.astype(np.float64) - float(logits.max())) / max(low + (high - low) * share, 1e-30)
            ours = transforms.probabilities(transforms.dynamic_temperature(logits, value, spread, exponent))
            assert np.max(np.abs(ours - softmax(scaled))) < 2e-6


def test_dynamic_temperature_of_certainty_and_of_none() -> None:
    logits = np.float32([5.0, -200.0, -300.0])
    certain = transforms.dynamic_temperature(logits, 1.0, 0.75, 1.0)
    assert np.array_equal(certain, transforms.temperature(logits, 0.25))
    assert transforms.dynamic_temperature(logits, 1.0, 1.0, 1.0).tolist() == pytest.approx([0.0, -np.inf, -np.inf])
    alone = np.float32([-np.inf, 7.0])
    assert transforms.dynamic_temperature(alone, 1.0, 0.5, 1.0).tolist() == [-np.inf, 0.0]
    assert np.array_equal(transforms.dynamic_temperature(logits, 0.7, 0.0, 3.0), transforms.temperature(logits, 0.7))
