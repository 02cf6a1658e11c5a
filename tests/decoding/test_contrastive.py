"""Contrastive search's choice against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.decoding.contrastive import choose, normalized


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_choosing(alpha: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    context = random.standard_normal((9, 12)).astype(np.float32)
    hidden = random.standard_normal((5, 12)).astype(np.float32)
    probability = random.dirichlet(np.ones(5))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))

    penalties = [max(cosine(h, c) for c in context) for h in hidden]
    scores = [(1 - alpha) * p - alpha * penalty for p, penalty in zip(probability, penalties, strict=True)]
    assert choose(probability, normalized(hidden), normalized(context), alpha) == scores.index(max(scores))


def test_a_candidate_that_repeats_the_context_loses() -> None:
    context = np.eye(4, dtype=np.float32)[:2]
    probability = np.array([0.9, 0.1])
    hidden = np.eye(4, dtype=np.float32)[[0, 3]]  # the first is the first token's again
    assert choose(probability, hidden, context, 0.6) == 1
    assert choose(probability, hidden, context, 0.0) == 0


def test_a_zero_vector_is_like_nothing() -> None:
    assert not normalized(np.zeros((1, 4), np.float32)).any()
