"""The built-in transforms of a row of logits, in the order they are applied: temperature, top-k, top-p, min-p.

Each is a pure function from float32 logits [vocab_size] to float32 logits [vocab_size]; a removed token becomes -inf.
Logits are finite or -inf, and at least one is finite. Ties fall to the lowest token id. docs/decoding.md has formulas
and papers.

Probabilities are held as integer weights in units of 2**-40 of the largest (`weights`). Integer sums do not depend on
their order, so the native sampler gets the same masks and the same token on any instruction set and thread count.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Weights = NDArray[np.int64]

WEIGHT_BITS = 40
WEIGHT_ONE = 1 << WEIGHT_BITS
"""Weight of the most probable token."""

MAX_VOCAB_SIZE = 1 << 22
"""Largest vocabulary whose weights surely sum to less than 2**63."""

_FLOAT32 = np.finfo(np.float32)
_SMALLEST_EXPONENT = np.float32(-87.0)  # exp stays a normal number; its weight is long since 0
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)  # 9 bits, so its product with an exponent is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


def exp(x: Logits) -> Logits:
    """e**x for -inf <= x <= 0, within 2 units in the last place where x >= -87; smaller x count as -87.

    Range reduction and polynomial of Cephes' expf (Moshier, 1989), float32 throughout, every product and sum rounded
    alone (no fused multiply-add), so that native code gives the same bits.
    """
    x = np.maximum(x, _SMALLEST_EXPONENT)
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.full_like(r, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    mantissa = (p * r) * r + r + np.float32(1.0)
    return np.asarray(np.ldexp(mantissa, n.astype(np.int32)), dtype=np.float32)


def weights(logits: Logits) -> Weights:
    """Unnormalized softmax as integers: rint(2**40 * exp(logits - max)); the largest is 2**40, the sum exact."""
    with np.errstate(over="ignore"):
        scaled = exp(logits - logits.max()).astype(np.float64) * WEIGHT_ONE
    return np.rint(scaled).astype(np.int64)


def probabilities(logits: Logits) -> NDArray[np.float64]:
    """Softmax of `logits` [vocab_size]: what the draw is made from. Sums to 1 within float64 rounding."""
    integers = weights(logits)
    return integers / np.float64(integers.sum())


def temperature(logits: Logits, value: float) -> Logits:
    """Logits relative to their maximum, times 1 / `value` (> 0). The maximum becomes 0, which changes no probability
    and keeps the smallest temperatures from overflowing."""
    with np.errstate(over="ignore"):
        factor = np.clip(np.float32(1.0) / np.float32(value), _FLOAT32.tiny, _FLOAT32.max)
        scaled = (logits - logits.max()) * factor
    return np.asarray(scaled + np.float32(0.0), dtype=np.float32)  # -0.0 becomes 0.0


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` highest; 0 keeps all (Fan et al., 2018)."""
    if k == 0 or k >= logits.size:
        return logits
    keep = np.zeros(logits.size, dtype=np.bool_)
    keep[descending(logits)[:k]] = True
    return _mask(logits, keep)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest of the most probable tokens that together reach probability `p`; 1 keeps all (Holtzman et al.,
    2020): a token stays while the weight before it is below ceil(p * total), the product in float64."""
    if p >= 1.0:
        return logits
    order = descending(logits)
    ranked = weights(logits)[order]
    target = math.ceil(float(np.float32(p)) * float(ranked.sum()))
    keep = np.zeros(logits.size, dtype=np.bool_)
    keep[order] = np.cumsum(ranked) - ranked < target
    return _mask(logits, keep)


def min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least `p` times as probable as the most probable one; 0 keeps all (Nguyen et al., 2024)."""
    if p <= 0.0:
        return logits
    return _mask(logits, weights(logits) >= float(np.float32(p)) * WEIGHT_ONE)


def descending(logits: Logits) -> NDArray[np.intp]:
    """Token ids by falling logit, the lower id first on a tie."""
    return np.argsort(-logits, kind="stable")


def _mask(logits: Logits, keep: NDArray[np.bool_]) -> Logits:
    return np.where(keep, logits, np.float32(-np.inf))
