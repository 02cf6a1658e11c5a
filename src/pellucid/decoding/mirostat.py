"""Mirostat: truncation that holds the surprise of the text near a target (Basu et al., 2021, arXiv:2007.14966).

A bound mu on the surprise, in bits, goes from token to token: it is given to the truncation, and the surprise of the
token chosen changes it (`next_mu`). Nothing else is remembered. Both versions measure surprise as llama.cpp does: under
the distribution that the token was drawn from.
"""

from __future__ import annotations

import math

import numpy as np

from pellucid.decoding import distribution, elementary, truncation
from pellucid.decoding.distribution import WEIGHT_ONE, Logits

NUM_ESTIMATED = 100
"""Tokens that version 1 estimates the exponent of Zipf's law from: the paper's m."""


def mirostat_v1(logits: Logits, mu: float) -> Logits:
    """Top-k with the k that has an expected surprise of `mu` bits where probabilities follow Zipf's law.

    Over the first m = min(100, tokens of weight > 0) tokens by falling logit z, i = 1 to m - 1, the exponent is
    s = sum t_i b_i / sum t_i**2 with t_i = ln((i + 1) / i) and b_i = z_i - z_(i+1), in float64, from i = 1 on.
    With a = s - 1 and N tokens in the vocabulary, k = floor((a 2**mu / (1 - N**-a)) ** (1 / s)), at least 1; for a = 0
    the fraction is its limit 2**mu / ln N. Where m < 2 or s = 0, nothing is dropped.
    """
    order = distribution.descending(logits)
    num_weighted = int(np.count_nonzero(distribution.weights(logits)))
    top = [float(logit) for logit in logits[order[: min(NUM_ESTIMATED, num_weighted)]]]
    sum_tb = sum_tt = 0.0
    for i in range(1, len(top)):
        t = elementary.log((i + 1) / i)
        sum_tb += t * (top[i - 1] - top[i])
        sum_tt += t * t
    if sum_tb == 0.0:
        return logits
    s = sum_tb / sum_tt
    a = s - 1.0
    log_size = elementary.log(float(logits.size))
    denominator = 1.0 - elementary.exp(-a * log_size)
    fraction = a / denominator if denominator != 0.0 else 1.0 / log_size
    k = elementary.exp((elementary.log(fraction) + mu * elementary.LN2) / s)
    return logits if k >= logits.size else truncation.top_k(logits, max(1, math.floor(k)))


def mirostat_v2(logits: Logits, mu: float) -> Logits:
    """Drop tokens whose surprise -log2 P(t) is above `mu` bits; the most probable ones stay: keep each weight of at
    least min(total * 2**-mu, 2**40), in float64."""
    integers = distribution.weights(logits)
    floor = float(integers.sum()) * elementary.exp(-mu * elementary.LN2)
    return distribution.keep_only(logits, integers >= min(floor, float(WEIGHT_ONE)))


def surprise(logits: Logits, token: int) -> float:
    """-log2 of the probability of `token`, whose weight is not 0, under softmax: bits."""
    integers = distribution.weights(logits)
    return elementary.log(float(integers.sum()) / float(integers[token])) / elementary.LN2


def next_mu(mu: float, observed: float, tau: float, eta: float) -> float:
    """`mu` after a token of `observed` bits of surprise, with target `tau` and learning rate `eta`, as float32."""
    return float(np.float32(mu - float(np.float32(eta)) * (observed - float(np.float32(tau)))))
