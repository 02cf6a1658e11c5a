"""Contrastive search (Su et al., 2022, arXiv:2202.06417): candidates that are probable and unlike what was said."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def normalized(hidden: Array) -> Array:
    """Rows of length 1, for cosines: float32 of the shape of `hidden`, whose last axis is a vector."""
    length = np.sqrt(np.square(hidden.astype(np.float64)).sum(axis=-1, keepdims=True))
    return np.asarray(hidden / np.maximum(length, np.finfo(np.float32).tiny), np.float32)


def choose(probability: NDArray[np.float64], candidate: Array, context: Array, alpha: float) -> int:
    """Which candidate maximizes (1 - alpha) * its probability - alpha * the largest cosine between its hidden state and
    one of the context; the first of equals.

    Args:
        probability: float64 [num_candidates].
        candidate: float32 [num_candidates, hidden_size], of length 1.
        context: float32 [num_tokens, hidden_size], of length 1: every token before the candidates.
    """
    penalty = np.array([np.einsum("ij,j->i", context, row).max() for row in candidate], np.float64)
    return int(np.argmax((1 - alpha) * probability - alpha * penalty))
