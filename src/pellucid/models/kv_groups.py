"""KV groups: which layers share a KV block.

A block holds the keys and values of 64 tokens in every layer of one group. The layers of a group have one attention
window, so a block that the window has left behind is of no use to any of them and can be given to another sequence.
The blocks of all groups are of one size and come from one pool, as in vLLM's hybrid KV cache manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from pellucid.core.config import BLOCK_SIZE
from pellucid.models.spec import AttentionSpec, ModelSpec

PREFERRED_MAX_KV_GROUPS = 16
"""Up to so many groups, what counts is the memory left unused: each group costs a block table."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share KV blocks.

    Attributes:
        layers: their indices, rising; a block holds them in this order.
        sliding_window: the window of each; None sees everything.
    """

    layers: tuple[int, ...]
    sliding_window: int | None


@lru_cache(maxsize=4)
def kv_groups(spec: ModelSpec) -> tuple[KVGroup, ...]:
    """The KV groups of a model; every layer is in one.

    A model with one kind of window is one group, and so is one whose windows are wider than its longest context.
    Otherwise the size of a block is chosen so that least of it stays unused, first by the layers that see everything,
    whose blocks are never given back, then by all; at equal waste the fewest groups are taken. Gemma 3 270m: one
    group of its 3 full-attention layers and five of 3 sliding layers each, nothing unused. Gemma 3 4B: one of 5 layers
    and six that hold its 29 sliding layers; 1 place in 35 stays unused.

    Full attention comes first, then the wider windows before the narrower.
    """
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        window = layer.attention.sliding_window
        if window is not None and window >= spec.max_position_embeddings:
            window = None
        kinds.setdefault(window, []).append(index)
    if len(kinds) == 1:
        return tuple(KVGroup(tuple(layers), window) for window, layers in kinds.items())
    sizes = [values_per_token(layer.attention) for layer in spec.layers]
    candidates = {total for layers in kinds.values() for total in accumulate(sizes[index] for index in layers)}

    def cost(block_size: int) -> tuple[int, int, int, int]:
        counts = {window: len(_split(layers, sizes, block_size)) for window, layers in kinds.items()}
        num_groups = sum(counts.values())
        waste = block_size * num_groups - sum(sizes)
        waste_of_full = block_size * counts.get(None, 0) - sum(sizes[index] for index in kinds.get(None, ()))
        return max(num_groups, PREFERRED_MAX_KV_GROUPS), waste_of_full, waste, num_groups

    block_size = min((size for size in sorted(candidates) if size >= max(sizes)), key=cost)
    return tuple(
        KVGroup(layers, window)
        for window in sorted(kinds, key=lambda window: (window is not None, -(window or 0)))
        for layers in _split(kinds[window], sizes, block_size)
    )


def kv_layout_name(backend: str, version: int, dtype: str, spec: ModelSpec) -> str:
    """`Backend.kv_layout` of a backend that stores keys and values as `dtype` in its layout number `version`."""
    groups = ", ".join(f"{len(group.layers)}/{group.sliding_window or 'all'}" for group in kv_groups(spec))
    return f"{backend} {version}, {dtype}, blocks of {BLOCK_SIZE} tokens in groups (layers/window) {groups}"


def kv_windows(spec: ModelSpec) -> tuple[int | None, ...]:
    """The window of each KV group of a model."""
    return tuple(group.sliding_window for group in kv_groups(spec))


def values_per_token(attention: AttentionSpec) -> int:
    """Numbers that a layer keeps of a token, as keys and again as values."""
    return attention.num_key_value_heads * attention.head_dim


def _split(layers: Sequence[int], sizes: Sequence[int], block_size: int) -> list[tuple[int, ...]]:
    """`layers` in runs whose sizes add up to at most `block_size`."""
    runs: list[list[int]] = []
    room = 0
    for index in layers:
        if sizes[index] > room:
            runs.append([])
            room = block_size
        runs[-1].append(index)
        room -= sizes[index]
    return [tuple(run) for run in runs]
