from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.families.gemma3 import spec_from_config
from pellucid.models.spec import LayerSpec, ModelSpec, NormSpec
from tests.support.tiny_models import GEMMA3, tiny_spec

CONFIG: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 40,
}


def with_norm_offset(spec: ModelSpec, offset: float) -> ModelSpec:
    norm = NormSpec(spec.final_norm.eps, offset)

    def changed(layer: LayerSpec) -> LayerSpec:
        attention = dataclasses.replace(layer.attention, qk_norm=norm)
        return LayerSpec(norm, attention, norm, norm, layer.mlp, norm)

    return dataclasses.replace(spec, layers=tuple(map(changed, spec.layers)), final_norm=norm)


def test_gguf_and_config_give_one_spec_but_for_the_norm_offset() -> None:
    assert with_norm_offset(tiny_spec(GEMMA3), 1.0) == spec_from_config(CONFIG)
    assert with_norm_offset(spec_from_config(CONFIG), 0.0) == tiny_spec(GEMMA3)


def test_every_sixth_layer_sees_everything_and_has_its_own_rope_base() -> None:
    layers = tiny_spec(GEMMA3).layers
    assert [layer.attention.sliding_window for layer in layers] == [40] * 5 + [None, 40]
    assert layers[0].attention.rope.inv_freq[1] == pytest.approx(1e4 ** (-2 / 32))
    assert layers[5].attention.rope.inv_freq[1] == pytest.approx(1e6 ** (-2 / 32))


def test_rope_scaling_touches_the_global_layers_only() -> None:
    scaled = {**GEMMA3, "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    layers, plain = tiny_spec(scaled).layers, tiny_spec(GEMMA3).layers
    assert layers[0] == plain[0]
    assert layers[5].attention.rope.inv_freq[3] == plain[5].attention.rope.inv_freq[3] / 8
    assert tiny_spec(scaled) == with_norm_offset(
        spec_from_config({**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}), 0.0
    )


def test_the_pattern_is_read_where_the_file_has_it() -> None:
    def windows(pattern: object) -> list[int | None]:
        metadata = {**GEMMA3, "gemma3.attention.sliding_window_pattern": pattern}
        return [layer.attention.sliding_window for layer in tiny_spec(metadata).layers]

    assert windows(2) == [40, None, 40, None, 40, None, 40]
    assert windows(np.array([False, True, True, True, True, True, False])) == [None, *[40] * 5, None]
    with pytest.raises(ModelFileError, match="2 entries for 7 layers"):
        windows(np.array([True, False]))


def test_no_window_means_every_layer_sees_everything() -> None:
    without = {key: value for key, value in GEMMA3.items() if "window" not in key}
    for metadata in (without, {**without, "gemma3.attention.sliding_window": 0}):
        assert set(tiny_spec(metadata).layers) == {tiny_spec(GEMMA3).layers[5]}


def test_attention_scale_is_the_files_else_that_of_the_head_but_for_the_27b() -> None:
    assert tiny_spec(GEMMA3).layers[0].attention.scale == pytest.approx(32**-0.5)
    assert tiny_spec({**GEMMA3, "gemma3.attention.scale": 0.5}).layers[0].attention.scale == 0.5
    large = {**GEMMA3, "gemma3.block_count": 62}
    assert tiny_spec(large).layers[0].attention.scale == pytest.approx((64 / 4) ** -0.5)


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 30.0), ("expert_count", 4), ("attention.shared_kv_layers", 2)]
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        tiny_spec({**GEMMA3, f"gemma3.{field}": value})


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"use_bidirectional_attention": True},
        {"final_logit_softcapping": 30.0},
        {"hidden_activation": "gelu"},
    ],
)
def test_configs_that_are_not_supported_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        spec_from_config({**CONFIG, **change})


def test_layer_types_must_fit() -> None:
    types = ["sliding_attention", "full_attention", *["sliding_attention"] * 5]
    assert spec_from_config({**CONFIG, "layer_types": types}).layers[1].attention.sliding_window is None
    for wrong in (types[:-1], [*types[:-1], "chunked_attention"]):
        with pytest.raises(ModelFileError, match="layer_types"):
            spec_from_config({**CONFIG, "layer_types": wrong})
