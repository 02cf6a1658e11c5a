"""The operations of a decoder, in float32 numpy.

Each works on one row at a time, or element by element, so that a row's result depends, to the bit, on that row alone: a
matrix product over all rows at once would add up in an order that depends on how many there are.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from pellucid.models.spec import Activation, NormSpec, RopeSpec

Array = NDArray[np.float32]

ROWS_PER_TASK = 8

GELU_SCALE = np.float32(math.sqrt(2 / math.pi))
GELU_CUBIC = np.float32(0.044715)


def linear(x: Array, weight: Array, bias: Array | None = None, *, executor: Executor | None = None) -> Array:
    """x @ weight.T + bias, one row of x at a time.

    Args:
        x: float32 [num_tokens, in_features].
        weight: float32 [out_features, in_features].
        bias: float32 [out_features].
        executor: spreads the rows over threads; each row is still one call, so the bits stay.

    Returns:
        float32 [num_tokens, out_features].
    """
    num_tokens = x.shape[0]
    y = np.empty((num_tokens, weight.shape[0]), np.float32)

    def rows(first: int) -> None:
        for index in range(first, min(first + ROWS_PER_TASK, num_tokens)):
            np.einsum("i,oi->o", x[index], weight, out=y[index])

    tasks = range(0, num_tokens, ROWS_PER_TASK)
    for _ in map(rows, tasks) if executor is None or len(tasks) == 1 else executor.map(rows, tasks):
        pass
    return y if bias is None else y + bias


def rms_norm(x: Array, weight: Array, norm: NormSpec) -> Array:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last axis (Zhang & Sennrich, 2019).

    Args:
        x: float32 [..., n].
        weight: float32 [n].

    Returns:
        float32 [..., n].
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return x / np.sqrt(mean_square + np.float32(norm.eps)) * (weight + np.float32(norm.weight_offset))


def rope_angles(positions: NDArray[np.int32], rope: RopeSpec) -> tuple[Array, Array]:
    """cos and sin of position * frequency (Su et al., 2021), float32 [num_tokens, rotary_dim / 2] each.

    Args:
        positions: int32 [num_tokens], absolute.
    """
    angles = positions.astype(np.float32)[:, None] * np.asarray(rope.inv_freq, np.float32)
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn pair i of every head, (x[i], x[i + h]) with h = rotary_dim / 2, by its angle; later elements stay.

    Args:
        x: float32 [num_tokens, num_heads, head_dim].
        cos: float32 [num_tokens, h].
        sin: float32 [num_tokens, h].

    Returns:
        float32 [num_tokens, num_heads, head_dim].
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def activate(x: Array, activation: Activation) -> Array:
    """silu(x) = x sigmoid(x), or the tanh form of gelu (Hendrycks & Gimpel, 2016), element by element; float32."""
    y: Array
    if activation == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf for x far below zero gives the right limit, -0
            y = x / (1 + np.exp(-x))
    else:
        y = np.float32(0.5) * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))
    return y
