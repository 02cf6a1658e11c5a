from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.fields import Fields
from pellucid.models.rope import (
    default_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    rope_from_config,
    rope_from_gguf,
    yarn_inv_freq,
)

THETA, DIM = 500000.0, 64


def exact_inv_freq() -> np.ndarray:
    return THETA ** -(np.arange(0, DIM, 2, dtype=np.float64) / DIM)


def from_gguf(metadata: dict[str, object], factors: np.ndarray | None = None):
    return rope_from_gguf(Fields(metadata, "llama."), theta=THETA, rotary_dim=DIM, context_length=4096, factors=factors)


def from_config(**parameters: object):
    return rope_from_config({"rope_theta": THETA, **parameters}, rotary_dim=DIM, max_position_embeddings=4096)


def test_default_and_linear_frequencies() -> None:
    np.testing.assert_allclose(default_inv_freq(THETA, DIM), exact_inv_freq(), rtol=5e-7)
    np.testing.assert_allclose(linear_inv_freq(default_inv_freq(THETA, DIM), 8), exact_inv_freq() / 8, rtol=5e-7)
    assert default_inv_freq(THETA, DIM).dtype == np.float32


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaled = llama3_inv_freq(
        default_inv_freq(THETA, DIM), factor=8, low_freq_factor=1, high_freq_factor=4, original_context_length=8192
    )
    ratio = scaled / exact_inv_freq()
    wavelength = 2 * math.pi / exact_inv_freq()
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)
    between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert between.size
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(ratio) <= 1e-6).all()


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_warms_attention() -> None:
    ratio = yarn_inv_freq(THETA, DIM, factor=4, original_context_length=4096) / exact_inv_freq()
    turns = 4096 * exact_inv_freq() / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 32 * 1.6], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1 / 1.6], 1 / 4, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    rope = from_gguf({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0})
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_gguf_and_config_describe_the_same_embedding() -> None:
    assert from_gguf({}) == from_config() == from_gguf({"llama.rope.scaling.type": "none"})
    linear = from_config(rope_type="linear", factor=4.0)
    for metadata in (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ):
        assert from_gguf(metadata) == linear
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    original = {"llama.rope.scaling.original_context_length": 1024}
    assert from_gguf({**yarn, **original}) == from_config(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=1024
    )


def test_gguf_factors_divide_the_frequencies() -> None:
    factors = np.linspace(1, 8, DIM // 2, dtype=np.float32)
    np.testing.assert_allclose(from_gguf({}, factors).inv_freq, exact_inv_freq() / factors, rtol=1e-6)
    for wrong in (factors[:-1], factors * np.nan, -factors):
        with pytest.raises(ModelFileError, match=r"rope_freqs\.weight holds"):
            from_gguf({}, wrong)
    with pytest.raises(UnsupportedModelError, match="beside YaRN"):
        from_gguf({"llama.rope.scaling.type": "yarn"}, factors)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope", "su", "mrope"])
def test_other_variants_are_refused_by_name(scaling: str) -> None:
    message = f"RoPE scaling '{scaling}' is not supported; supported: default, linear, yarn, llama3"
    with pytest.raises(UnsupportedModelError, match=message):
        from_gguf({"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": 2.0})
    with pytest.raises(UnsupportedModelError, match=message):
        from_config(rope_type=scaling, factor=2.0)


def test_a_parameter_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="beta_fast"):
        from_config(rope_type="linear", factor=2.0, beta_fast=32)
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        from_config(partial_rotary_factor=0.5)
