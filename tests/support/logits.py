"""Rows of logits that tests of transforms share, and softmax and entropy in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding.distribution import Logits


def random_logits(seed: int, vocab_size: int = 1000, spread: float = 3.0) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, vocab_size).astype(np.float32)


def many_logits(seed: int, num_rows: int) -> Iterator[Logits]:
    """Rows of many sizes and shapes: flat and peaked, a language model's, ties, masked tokens, one token."""
    generator = np.random.default_rng(seed)
    for row in range(num_rows):
        vocab_size = int(generator.choice([1, 2, 3, 5, 15, 17, 100, 1000]))
        logits = generator.normal(0, generator.choice([0.1, 1.0, 3.0, 10.0]), vocab_size).astype(np.float32)
        kind = row % 5
        if kind == 1:
            logits[generator.random(vocab_size) < 0.1] += 10.0
        elif kind == 2:
            logits[generator.random(vocab_size) < 0.5] = -np.inf
            logits[generator.integers(vocab_size)] = 1.0
        elif kind == 3:
            logits = np.round(logits)
        elif kind == 4:
            logits += np.float32(1000.0)
        yield logits


def softmax(logits: Logits) -> NDArray[np.float64]:
    e = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(e / e.sum())


def naive_entropy(logits: Logits) -> float:
    p = softmax(logits)
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def kept(logits: Logits) -> list[int]:
    return np.flatnonzero(logits > -np.inf).tolist()
