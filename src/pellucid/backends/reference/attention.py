"""Causal attention of one token over a paged KV cache, and the weights that it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pellucid.core.config import BLOCK_SIZE
from pellucid.models.spec import AttentionSpec

Array = NDArray[np.float32]

ReadBlock = Callable[[int, slice], tuple[Array, Array]]
"""(absolute block index, tokens of the block) -> keys, values, float32 [num_key_value_heads, n, head_dim] each."""


def attend(query: Array, position: int, read_block: ReadBlock, attention: AttentionSpec) -> Array:
    """softmax(scale q . k) v over the tokens that the token at `position` sees, itself among them.

    The softmax is folded block by block, left to right (Milakov & Gimelshein, 2018; Dao et al., 2022): a running
    maximum, the sum of exp(score - maximum), and the values weighted by it. Blocks begin at multiples of 64 positions
    whatever the step computed, so the order of every addition is a function of `position` alone.

    Args:
        query: float32 [num_attention_heads, head_dim], after RoPE.
        position: absolute position of the token.
        read_block: gives the keys and values of a block.

    Returns:
        float32 [num_attention_heads, head_dim].
    """
    query = query.reshape(*_by_kv_head(attention))
    maximum = np.full((*query.shape[:2], 1), -np.inf, np.float32)
    total = np.zeros_like(maximum)
    weighted = np.zeros_like(query)
    for _, scores, values in _blocks(query, position, read_block, attention):
        new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
        shrink = np.exp(maximum - new_maximum)
        weights = np.exp(scores - new_maximum)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        weighted = weighted * shrink + np.einsum("kgt,ktd->kgd", weights, values)
        maximum = new_maximum
    return (weighted / total).reshape(attention.num_attention_heads, attention.head_dim)


def attention_weights(query: Array, position: int, read_block: ReadBlock, attention: AttentionSpec) -> Array:
    """The weights with which `attend` adds up the values, by the same fold.

    Args:
        query, position, read_block: as in `attend`.

    Returns:
        float32 [num_attention_heads, position + 1]; 0 for tokens outside a sliding window.
    """
    query = query.reshape(*_by_kv_head(attention))
    weights = np.zeros((*query.shape[:2], position + 1), np.float32)
    maximum = np.full((*query.shape[:2], 1), -np.inf, np.float32)
    total = np.zeros_like(maximum)
    for tokens, scores, _ in _blocks(query, position, read_block, attention):
        new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
        shrink = np.exp(maximum - new_maximum)
        weights *= shrink
        weights[..., tokens] = np.exp(scores - new_maximum)
        total = total * shrink + weights[..., tokens].sum(axis=-1, keepdims=True)
        maximum = new_maximum
    return (weights / total).reshape(attention.num_attention_heads, position + 1)


def _by_kv_head(attention: AttentionSpec) -> tuple[int, int, int]:
    """The query heads that share a KV head lie next to each other: g of them for each KV head k."""
    group_size = attention.num_attention_heads // attention.num_key_value_heads
    return attention.num_key_value_heads, group_size, attention.head_dim


def _blocks(
    query: Array, position: int, read_block: ReadBlock, attention: AttentionSpec
) -> Iterator[tuple[slice, Array, Array]]:
    """The KV blocks that the token at `position` sees, from left to right.

    Yields:
        the positions it sees in a block; its scores there, float32 [k, g, n]; their values, float32 [k, n, head_dim].
    """
    first_visible = 0 if attention.sliding_window is None else max(0, position - attention.sliding_window + 1)
    for block in range(first_visible // BLOCK_SIZE, position // BLOCK_SIZE + 1):
        start = block * BLOCK_SIZE
        visible = slice(max(first_visible - start, 0), min(position + 1 - start, BLOCK_SIZE))
        keys, values = read_block(block, visible)
        scores = np.einsum("kgd,ktd->kgt", query, keys) * np.float32(attention.scale)
        yield slice(start + visible.start, start + visible.stop), scores, values
