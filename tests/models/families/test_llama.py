from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.families.llama import spec_from_config, spec_from_gguf
from pellucid.models.family import GGUFHeader
from tests.support.tiny_models import LLAMA, tiny_spec

CONFIG: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def test_gguf_and_config_give_one_spec() -> None:
    assert tiny_spec(LLAMA) == spec_from_config(CONFIG)
    assert tiny_spec(LLAMA, tied=False) == spec_from_config({**CONFIG, "tie_word_embeddings": False})


def test_old_and_new_config_layouts_give_one_spec() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {**CONFIG, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    assert spec_from_config(old) == spec_from_config(new) != spec_from_config(CONFIG)


def test_defaults_are_those_of_the_first_llama() -> None:
    metadata = {key: value for key, value in LLAMA.items() if "rope" not in key and "head_count_kv" not in key}
    attention = tiny_spec(metadata).layers[0].attention
    assert attention.num_key_value_heads == 4
    assert attention.head_dim == 16
    assert attention.scale == 0.25
    assert attention.rope.inv_freq[1] == pytest.approx(10000 ** (-2 / 16))


def test_bias_is_read_off_the_tensors() -> None:
    assert tiny_spec(LLAMA, bias=True).layers[0].attention.bias
    assert not tiny_spec(LLAMA).layers[0].attention.bias


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert_count", 8),
        ("attention.sliding_window", 4096),
        ("attn_logit_softcapping", 50.0),
        ("attention.value_length", 32),
        ("attention.temperature_scale", 0.1),
        ("rope.dimension_count", 8),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("attention.head_count", np.array([4, 4])),
        ("residual_scale", 0.22),
    ],
)
def test_what_changes_the_arithmetic_and_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        tiny_spec({**LLAMA, f"llama.{field}": value})
    assert (caught.value.param or "").removeprefix("llama.") == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_length", None),
        ("block_count", 2**40),
        ("block_count", 0),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 15),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", -1.0),
        ("vocab_size", 127),
        ("context_length", 2**33),
    ],
)
def test_malformed_fields_are_refused(field: str, value: object) -> None:
    header = GGUFHeader({**LLAMA, f"llama.{field}": value}, {"token_embd.weight": (128, 64)})
    with pytest.raises(ModelFileError):
        spec_from_gguf(header)


def test_a_file_without_embeddings_is_refused() -> None:
    with pytest.raises(ModelFileError, match=r"token_embd\.weight is missing"):
        spec_from_gguf(GGUFHeader(LLAMA, {}))


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"rope_scaling": {"type": "su"}}]
)
def test_configs_that_are_not_supported_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        spec_from_config({**CONFIG, **change})
