"""The distribution that a row of logits is: softmax as integer weights, which the transforms and the draw stand on.

Logits are float32 [vocab_size], finite or -inf, and at least one is finite. docs/decoding.md has the formulas.

Weights are in units of 2**-40 of the largest. Integer sums do not depend on their order, so the native sampler gets the
same masks and the same token on any instruction set and thread count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding import elementary

Logits = NDArray[np.float32]
Weights = NDArray[np.int64]

WEIGHT_BITS = 40
WEIGHT_ONE = 1 << WEIGHT_BITS
"""Weight of the most probable token."""

MAX_VOCAB_SIZE = 1 << 22
"""Largest vocabulary whose weights surely sum to less than 2**63."""

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


def gaps(logits: Logits) -> Logits:
    """max - logit of each token, in float32: how far below the most probable one it is, in natural logarithms."""
    with np.errstate(over="ignore"):
        return np.asarray(logits.max() - logits, dtype=np.float32)


def mean_gap(logits: Logits) -> float:
    """The mean of `gaps` under softmax: the sum of rint(weight * gap), products in float64, over the sum of weights.

    The sum is one of integers below 2**61. A token of weight 0 adds nothing.
    """
    integers = weights(logits)
    alive = integers > 0
    terms = np.rint(integers[alive].astype(np.float64) * gaps(logits)[alive].astype(np.float64))
    return float(terms.astype(np.int64).sum()) / float(integers.sum())


def log_total(logits: Logits) -> float:
    """ln of the sum of e**(logit - max): -ln P(t) of the most probable token t, 0 or above."""
    return elementary.log(float(weights(logits).sum()) / WEIGHT_ONE)


def entropy(logits: Logits) -> float:
    """Shannon entropy of softmax in natural logarithms: log_total + mean_gap."""
    return log_total(logits) + mean_gap(logits)


def descending(logits: Logits) -> NDArray[np.intp]:
    """Token ids by falling logit, the lower id first on a tie."""
    return np.argsort(-logits, kind="stable")


def keep_only(logits: Logits, keep: NDArray[np.bool_]) -> Logits:
    """Every other token's logit becomes -inf."""
    return np.where(keep, logits, np.float32(-np.inf))
