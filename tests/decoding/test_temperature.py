"""Temperature, fixed and dynamic, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import distribution, temperature
from tests.support.logits import many_logits, naive_entropy, random_logits, softmax


def test_temperature() -> None:
    logits = random_logits(0)
    for value in (0.1, 0.7, 1.0, 1.5):
        scaled = temperature.temperature(logits, value)
        assert np.max(np.abs(softmax(scaled) - softmax((logits / value).astype(np.float32)))) < 1e-6
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_temperatures(value: float) -> None:
    logits = np.array([1.0, 3.0e38, -3.0e38, -np.inf, 2.9e38], dtype=np.float32)
    scaled = temperature.temperature(logits, value)
    assert not np.isnan(scaled).any()
    assert scaled[1] == 0.0
    assert scaled[3] == -np.inf
    if value < 1:
        assert distribution.probabilities(scaled)[1] == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_temperature(seed: int) -> None:
    for value, spread, exponent in ((1.0, 0.5, 1.0), (0.7, 0.7, 0.5), (0.3, 2.0, 2.0), (1.5, 0.1, 0.0)):
        for logits in many_logits(seed, 20):
            count = np.count_nonzero(logits > -np.inf)
            share = (naive_entropy(logits) / np.log(count)) ** exponent if count > 1 else 0.0
            low, high = max(0.0, value - spread), value + spread
            scaled = (logits.astype(np.float64) - float(logits.max())) / max(low + (high - low) * share, 1e-30)
            ours = distribution.probabilities(temperature.dynamic_temperature(logits, value, spread, exponent))
            assert np.max(np.abs(ours - softmax(scaled))) < 2e-6


def test_dynamic_temperature_of_certainty_and_of_none() -> None:
    logits = np.float32([5.0, -200.0, -300.0])
    certain = temperature.dynamic_temperature(logits, 1.0, 0.75, 1.0)
    assert np.array_equal(certain, temperature.temperature(logits, 0.25))
    assert temperature.dynamic_temperature(logits, 1.0, 1.0, 1.0).tolist() == pytest.approx([0.0, -np.inf, -np.inf])
    alone = np.float32([-np.inf, 7.0])
    assert temperature.dynamic_temperature(alone, 1.0, 0.5, 1.0).tolist() == [-np.inf, 0.0]
    assert np.array_equal(temperature.dynamic_temperature(logits, 0.7, 0.0, 3.0), temperature.temperature(logits, 0.7))
