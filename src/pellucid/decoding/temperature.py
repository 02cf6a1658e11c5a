"""Temperature, fixed and dynamic: pure functions from float32 logits [vocab_size] to float32 logits [vocab_size]."""

from __future__ import annotations

import numpy as np

from pellucid.decoding import elementary
from pellucid.decoding.distribution import Logits, entropy

_FLOAT32 = np.finfo(np.float32)


def temperature(logits: Logits, value: float) -> Logits:
    """Logits relative to their maximum, times 1 / `value` (> 0). The maximum becomes 0, which changes no probability
    and keeps the smallest temperatures from overflowing."""
    with np.errstate(over="ignore", divide="ignore"):
        factor = np.clip(np.float32(1.0) / np.float32(value), _FLOAT32.tiny, _FLOAT32.max)
        scaled = (logits - logits.max()) * factor
    return np.asarray(scaled + np.float32(0.0), dtype=np.float32)  # -0.0 becomes 0.0


def dynamic_temperature(logits: Logits, value: float, spread: float, exponent: float) -> Logits:
    """Temperature within `value` +- `spread` by how uncertain the model is; a spread of 0 is `temperature` (llama.cpp's
    dynatemp, kalomaze, 2023).

    low + (high - low) * (entropy / ln n) ** exponent in float64, rounded to float32, with low = max(0, value - spread),
    high = value + spread, and n tokens that are not -inf; where n is 1 the fraction is 0.
    """
    if spread <= 0.0:
        return temperature(logits, value)
    low = max(0.0, float(np.float32(value)) - float(np.float32(spread)))
    high = float(np.float32(value)) + float(np.float32(spread))
    count = np.count_nonzero(logits > -np.inf)
    uncertainty = entropy(logits) / elementary.log(float(count)) if count > 1 else 0.0
    share = elementary.power(uncertainty, float(np.float32(exponent)))
    return temperature(logits, low + (high - low) * share)
