from __future__ import annotations

from dataclasses import replace

import pytest

from pellucid.models.kv_groups import KVGroup, kv_groups, kv_windows, values_per_token
from pellucid.models.spec import ModelSpec
from tests.support.tiny_models import GEMMA3, LLAMA, tiny_spec


def gemma(num_layers: int, *, window: int = 512, **metadata: int) -> ModelSpec:
    """As many layers as a Gemma 3 of that size has, every sixth without a window."""
    sizes = {"gemma3.block_count": num_layers, "gemma3.attention.sliding_window": window}
    return tiny_spec({**GEMMA3, "gemma3.context_length": 32768, **sizes, **metadata})


def check(spec: ModelSpec) -> tuple[KVGroup, ...]:
    """Each layer in one group, with its own window; no block with room for one more layer of another's."""
    groups = kv_groups(spec)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(spec.layers)))
    for group in groups:
        assert list(group.layers) == sorted(group.layers)
        assert {spec.layers[layer].attention.sliding_window for layer in group.layers} == {group.sliding_window}
    return groups


def waste(spec: ModelSpec) -> float:
    """Share of a block of each group that stays unused."""
    used = [sum(values_per_token(spec.layers[index].attention) for index in group.layers) for group in kv_groups(spec)]
    return 1 - sum(used) / (len(used) * max(used))


@pytest.mark.parametrize(
    ("num_layers", "full", "sliding", "unused"),
    [
        (18, [3], [3] * 5, 0),  # 270m
        (26, [2] * 2, [2] * 11, 0),  # 1B
        (34, [5], [5] * 5 + [4], 1 / 35),  # 4B
        (48, [8], [8] * 5, 0),  # 12B
        (62, [5] * 2, [5] * 10 + [2], 3 / 65),  # 27B
    ],
)
def test_gemma_3(num_layers: int, full: list[int], sliding: list[int], unused: float) -> None:
    spec = gemma(num_layers)
    groups = check(spec)
    assert [len(group.layers) for group in groups] == full + sliding
    assert kv_windows(spec) == (None,) * len(full) + (512,) * len(sliding)
    assert waste(spec) == pytest.approx(unused)


def test_one_kind_of_window_is_one_group() -> None:
    assert kv_groups(tiny_spec(LLAMA)) == (KVGroup((0, 1), None),)
    assert kv_groups(gemma(5)) == (KVGroup((0, 1, 2, 3, 4), 512),)


def test_a_window_as_wide_as_the_context_is_none() -> None:
    assert kv_groups(gemma(18, window=32768)) == (KVGroup(tuple(range(18)), None),)
    assert len(kv_groups(gemma(18, window=32767))) == 6


def test_wider_windows_come_first() -> None:
    spec = gemma(7)
    layers = list(spec.layers)
    for index, window in ((0, 64), (3, 100)):
        attention = replace(layers[index].attention, sliding_window=window)
        layers[index] = replace(layers[index], attention=attention)
    spec = replace(spec, layers=tuple(layers))
    assert [group.sliding_window for group in check(spec)] == [None, 512, 512, 512, 512, 100, 64]


def test_layers_of_different_sizes_share_blocks_of_one_size() -> None:
    spec = gemma(12)  # full attention in layers 5 and 11
    wide = [
        replace(layer, attention=replace(layer.attention, num_key_value_heads=2))
        if layer.attention.sliding_window is None
        else layer
        for layer in spec.layers
    ]
    spec = replace(spec, layers=tuple(wide))
    groups = check(spec)
    assert [group.layers for group in groups[:3]] == [(5,), (11,), (0, 1)]
    assert waste(spec) == 0


def test_many_layers_take_few_groups() -> None:
    assert len(check(gemma(500))) <= 16
