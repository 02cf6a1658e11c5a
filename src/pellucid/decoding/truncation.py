"""The transforms that drop improbable or atypical tokens, in the order they are applied (docs/decoding.md).

Each is a pure function from float32 logits [vocab_size] to float32 logits [vocab_size]; a dropped token becomes -inf,
at least one token stays, and a parameter at its neutral value changes nothing. Ties fall to the lowest token id.
Parameters are float32 values; products with weights are taken in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding import distribution, elementary
from pellucid.decoding.distribution import WEIGHT_ONE, Logits

_SIGMA_LANES = 16


def top_n_sigma(logits: Logits, n: float) -> Logits:
    """Keep tokens within `n` standard deviations of the highest logit; 0 keeps all (Tang et al., 2024).

    The standard deviation is that of the logits that are not -inf, in float64 from sums of (max - logit) and of its
    square. Token t adds to lane t mod 16, in rising order; the lanes are added in order.
    """
    if n <= 0.0:
        return logits
    wide = logits.astype(np.float64)
    highest = float(wide.max())
    alive = logits > -np.inf
    gaps = np.zeros(-(-logits.size // _SIGMA_LANES) * _SIGMA_LANES)
    gaps[: logits.size][alive] = highest - wide[alive]
    count = float(np.count_nonzero(alive))
    mean = _sum_by_lanes(gaps) / count
    variance = _sum_by_lanes(gaps * gaps) / count - mean * mean
    floor = highest - float(np.float32(n)) * math.sqrt(max(variance, 0.0))
    return distribution.keep_only(logits, wide >= floor)


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` highest; 0 keeps all (Fan et al., 2018)."""
    if k == 0 or k >= logits.size:
        return logits
    keep = np.zeros(logits.size, dtype=np.bool_)
    keep[distribution.descending(logits)[:k]] = True
    return distribution.keep_only(logits, keep)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest of the most probable tokens that together reach probability `p`; 1 keeps all (Holtzman et al.,
    2020): a token stays while the weight before it is below ceil(p * total)."""
    if p >= 1.0:
        return logits
    return _keep_first(logits, distribution.descending(logits), p)


def min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least `p` times as probable as the most probable one; 0 keeps all (Nguyen et al., 2024)."""
    if p <= 0.0:
        return logits
    return distribution.keep_only(logits, distribution.weights(logits) >= float(np.float32(p)) * WEIGHT_ONE)


def typical_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest of the most typical tokens that together reach probability `p`; 1 keeps all (Meister et al.,
    2023). The most typical tokens are those whose surprise -ln P(t) is nearest to the entropy, its mean.

    Both are (max - logit) and its mean, each plus the same logarithm, which cancels: the distance is
    |(max - logit) - mean_gap|, in float64.
    """
    if p >= 1.0:
        return logits
    distances = np.abs(distribution.gaps(logits).astype(np.float64) - distribution.mean_gap(logits))
    return _keep_first(logits, np.argsort(distances, kind="stable"), p)


def epsilon_cutoff(logits: Logits, epsilon: float) -> Logits:
    """Keep tokens of probability `epsilon` and above, and the most probable ones; 0 keeps all (Hewitt et al., 2022)."""
    if epsilon <= 0.0:
        return logits
    integers = distribution.weights(logits)
    return _keep_above(logits, integers, float(np.float32(epsilon)) * float(integers.sum()))


def eta_cutoff(logits: Logits, epsilon: float) -> Logits:
    """Keep tokens of probability eta = min(epsilon, sqrt(epsilon) e**-H) and above, H being the entropy, and the most
    probable ones; 0 keeps all (Hewitt et al., 2022). total * e**-H is 2**40 * e**-mean_gap."""
    if epsilon <= 0.0:
        return logits
    integers = distribution.weights(logits)
    wide = float(np.float32(epsilon))
    by_entropy = math.sqrt(wide) * elementary.exp(-distribution.mean_gap(logits)) * WEIGHT_ONE
    return _keep_above(logits, integers, min(wide * float(integers.sum()), by_entropy))


def xtc(logits: Logits, threshold: float) -> Logits:
    """Exclude top choices (p-e-w, 2024): drop every token of probability `threshold` and above but the last of them by
    falling logit. Where anything is dropped, tokens of weight 0 are too."""
    integers = distribution.weights(logits)
    order = distribution.descending(logits)
    keep = integers > 0
    num_top = np.count_nonzero(keep & (integers >= float(np.float32(threshold)) * float(integers.sum())))
    if num_top < 2:
        return logits
    keep[order[: num_top - 1]] = False
    return distribution.keep_only(logits, keep)


def _keep_first(logits: Logits, order: NDArray[np.intp], p: float) -> Logits:
    """Keep, in that order, each token that the weight before it leaves below ceil(p * total), if its own is not 0."""
    ranked = distribution.weights(logits)[order]
    target = math.ceil(float(np.float32(p)) * float(ranked.sum()))
    keep = np.zeros(logits.size, dtype=np.bool_)
    keep[order] = (np.cumsum(ranked) - ranked < target) & (ranked > 0)
    return distribution.keep_only(logits, keep)


def _keep_above(logits: Logits, integers: distribution.Weights, floor: float) -> Logits:
    return distribution.keep_only(logits, integers >= min(floor, float(WEIGHT_ONE)))


def _sum_by_lanes(values: NDArray[np.float64]) -> float:
    lanes = np.cumsum(values.reshape(-1, _SIGMA_LANES), axis=0)[-1]
    return float(np.cumsum(lanes)[-1])
