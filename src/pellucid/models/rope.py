"""Angular frequencies of rotary position embeddings, with their scaling variants folded in.

All in float32, operation by operation as the models were trained: a frequency off by one rounding turns a key at
position 100,000 by a visible angle.

A variant that depends on how long the sequence has become (dynamic NTK, LongRoPE) is refused: the keys already in the
cache would have to turn again, and a token's logits would depend on tokens after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.fields import LARGEST, Fields
from pellucid.models.spec import RopeSpec

FloatVector = NDArray[np.float32]

SUPPORTED_SCALING = "default, linear, yarn, llama3"

MAX_POSITION = 2**31 - 1

ROPE_FACTORS = "rope_freqs.weight"
"""The GGUF tensor that divides the frequencies; this is how a file carries the scaling of Llama 3.1."""


def default_inv_freq(theta: float, rotary_dim: int) -> FloatVector:
    """theta ** (-2 i / rotary_dim) for i < rotary_dim / 2 (Su et al., 2021).

    Raises:
        ModelFileError: `theta` is not above 1.
    """
    if theta <= 1:
        raise ModelFileError(f"the base of RoPE is {theta}; expected a number above 1", param="rope_theta")
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    inv_freq: FloatVector = np.float32(1) / np.power(np.float32(theta), exponent)
    return inv_freq


def linear_inv_freq(inv_freq: FloatVector, factor: float) -> FloatVector:
    """Position interpolation (Chen et al., 2023)."""
    scaled: FloatVector = inv_freq / np.float32(factor)
    return scaled


def llama3_inv_freq(
    inv_freq: FloatVector,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_length: int,
) -> FloatVector:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = np.float32(2 * math.pi) / inv_freq
    kept = (original_context_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - kept) * inv_freq / np.float32(factor) + kept * inv_freq
    stretched = np.where(wavelength > original_context_length / low_freq_factor, inv_freq / np.float32(factor), blended)
    return np.where(wavelength < original_context_length / high_freq_factor, inv_freq, stretched).astype(np.float32)


def yarn_inv_freq(
    theta: float,
    rotary_dim: int,
    *,
    factor: float,
    original_context_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> FloatVector:
    """YaRN (Peng et al., 2023): pairs that turn fewer than `beta_slow` times over the original context are stretched by
    `factor`, those that turn more than `beta_fast` times are kept, those between are blended linearly."""

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(original_context_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    inv_freq = default_inv_freq(theta, rotary_dim)
    scaled: FloatVector = (inv_freq / np.float32(factor) * ramp + inv_freq * (1 - ramp)).astype(np.float32)
    return scaled


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by, to keep the entropy of attention: 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_spec(inv_freq: FloatVector, attention_factor: float = 1.0) -> RopeSpec:
    """The spec of these frequencies.

    Raises:
        ModelFileError: they, or the factor, are not finite.
    """
    if not (np.isfinite(inv_freq).all() and attention_factor <= LARGEST):
        raise ModelFileError("the RoPE scaling gives frequencies that are not finite", param="rope.scaling.factor")
    return RopeSpec(inv_freq=tuple(inv_freq.tolist()), attention_factor=attention_factor)


GGUF_SCALING_FIELDS = frozenset(
    {
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
"""The metadata that `rope_from_gguf` reads (`finetuned` only tells how the model came about)."""


@np.errstate(over="ignore", invalid="ignore")  # rope_spec refuses what comes of it
def rope_from_gguf(
    fields: Fields, *, theta: float, rotary_dim: int, context_length: int, factors: FloatVector | None = None
) -> RopeSpec:
    """The rotary embedding that GGUF metadata describes.

    Args:
        fields: metadata below the architecture's prefix.
        theta: base of the frequencies.
        rotary_dim: elements of a head that turn.
        context_length: stands in where `rope.scaling.original_context_length` is missing.
        factors: float32 [rotary_dim / 2], the tensor `ROPE_FACTORS`, where the file has it.

    Raises:
        UnsupportedModelError: a scaling variant that is not supported.
        ModelFileError: a malformed field.
    """
    inv_freq = default_inv_freq(theta, rotary_dim)
    if factors is not None:
        if factors.shape != inv_freq.shape or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ModelFileError(
                f"{ROPE_FACTORS} holds {factors.size} values; expected {inv_freq.size} finite ones above zero",
                param=ROPE_FACTORS,
            )
        inv_freq = inv_freq / factors

    scaling = fields.text("rope.scaling.type", "linear")
    factor = fields.positive("rope.scaling.factor", fields.positive("rope.scale_linear", 1.0))
    if scaling == "none":
        return rope_spec(inv_freq)
    if scaling == "linear":
        return rope_spec(linear_inv_freq(inv_freq, factor), fields.positive("rope.scaling.attn_factor", 1.0))
    if scaling == "yarn":
        if factors is not None:
            raise UnsupportedModelError(f"{ROPE_FACTORS} beside YaRN scaling is not supported", param=ROPE_FACTORS)
        scaled = yarn_inv_freq(
            theta,
            rotary_dim,
            factor=factor,
            original_context_length=fields.integer(
                "rope.scaling.original_context_length", context_length, maximum=MAX_POSITION
            ),
            beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        )
        return rope_spec(scaled, fields.positive("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor))
    raise _unsupported(scaling)


CONFIG_SCALING_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


@np.errstate(over="ignore", invalid="ignore")
def rope_from_config(parameters: Mapping[str, Any], *, rotary_dim: int, max_position_embeddings: int) -> RopeSpec:
    """The rotary embedding that the `rope_parameters` of a config.json describe, `rope_theta` among them.

    Raises:
        UnsupportedModelError: a scaling variant, or a parameter of one, that is not supported.
        ModelFileError: a malformed field.
    """
    fields = Fields(parameters)
    scaling = fields.text("rope_type", fields.text("type", "default"))
    if scaling not in CONFIG_SCALING_FIELDS:
        raise _unsupported(scaling)
    known = CONFIG_SCALING_FIELDS[scaling] | {"rope_theta", "rope_type", "type"}
    # The library writes this one into every variant that has a notion of it; only these two read it.
    neutral = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": max_position_embeddings}
    fields.refuse_other_than(known, neutral)

    theta = fields.positive("rope_theta")
    inv_freq = default_inv_freq(theta, rotary_dim)
    if scaling == "default":
        return rope_spec(inv_freq)
    if scaling == "linear":
        return rope_spec(linear_inv_freq(inv_freq, fields.positive("factor")))
    original_context_length = fields.integer(
        "original_max_position_embeddings", max_position_embeddings, maximum=MAX_POSITION
    )
    if scaling == "llama3":
        low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
        if low == high:
            raise ModelFileError("low_freq_factor equals high_freq_factor", param="low_freq_factor")
        scaled = llama3_inv_freq(
            inv_freq,
            factor=fields.positive("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_context_length=original_context_length,
        )
        return rope_spec(scaled)
    factor = fields.positive("factor", max_position_embeddings / original_context_length)
    attention_factor = yarn_attention_factor(factor)
    if fields.has("mscale") and fields.has("mscale_all_dim"):
        attention_factor = yarn_attention_factor(factor, fields.positive("mscale")) / yarn_attention_factor(
            factor, fields.positive("mscale_all_dim")
        )
    scaled = yarn_inv_freq(
        theta,
        rotary_dim,
        factor=factor,
        original_context_length=original_context_length,
        beta_fast=fields.positive("beta_fast", 32.0),
        beta_slow=fields.positive("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
    )
    return rope_spec(scaled, fields.positive("attention_factor", attention_factor))


def _unsupported(scaling: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"RoPE scaling {scaling!r} is not supported; supported: {SUPPORTED_SCALING}", param="rope.scaling.type"
    )
