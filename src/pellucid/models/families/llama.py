"""Llama (Touvron et al., 2023) and what shares its shape: Llama 2 and 3, SmolLM, TinyLlama."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pellucid.core.errors import UnsupportedModelError
from pellucid.models.dimensions import (
    GGUF_DIMENSION_FIELDS,
    GGUF_NEUTRAL_FIELDS,
    Dimensions,
    dimensions_from_config,
    dimensions_from_gguf,
)
from pellucid.models.family import Family, GGUFHeader, TensorNames
from pellucid.models.fields import Fields
from pellucid.models.rope import GGUF_SCALING_FIELDS, ROPE_FACTORS, rope_from_config, rope_from_gguf
from pellucid.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

GGUF_NAMES = TensorNames(
    model={
        "embed_tokens.weight": "token_embd.weight",
        "final_norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    layer={
        "attention_norm.weight": "blk.{layer}.attn_norm.weight",
        "attention.q_proj.weight": "blk.{layer}.attn_q.weight",
        "attention.q_proj.bias": "blk.{layer}.attn_q.bias",
        "attention.k_proj.weight": "blk.{layer}.attn_k.weight",
        "attention.k_proj.bias": "blk.{layer}.attn_k.bias",
        "attention.v_proj.weight": "blk.{layer}.attn_v.weight",
        "attention.v_proj.bias": "blk.{layer}.attn_v.bias",
        "attention.o_proj.weight": "blk.{layer}.attn_output.weight",
        "mlp_norm.weight": "blk.{layer}.ffn_norm.weight",
        "mlp.gate_proj.weight": "blk.{layer}.ffn_gate.weight",
        "mlp.up_proj.weight": "blk.{layer}.ffn_up.weight",
        "mlp.down_proj.weight": "blk.{layer}.ffn_down.weight",
    },
    interleaved_rope=frozenset(
        {
            "attention.q_proj.weight",
            "attention.q_proj.bias",
            "attention.k_proj.weight",
            "attention.k_proj.bias",
        }
    ),
    not_weights=frozenset({ROPE_FACTORS}),
)

HF_NAMES = TensorNames(
    model={
        "embed_tokens.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layer={
        "attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
        "attention.q_proj.weight": "model.layers.{layer}.self_attn.q_proj.weight",
        "attention.k_proj.weight": "model.layers.{layer}.self_attn.k_proj.weight",
        "attention.v_proj.weight": "model.layers.{layer}.self_attn.v_proj.weight",
        "attention.o_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight",
        "mlp_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
        "mlp.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
        "mlp.up_proj.weight": "model.layers.{layer}.mlp.up_proj.weight",
        "mlp.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
    },
)


def spec_from_gguf(header: GGUFHeader) -> ModelSpec:
    fields = Fields(header.metadata, "llama.")
    fields.refuse_other_than(
        GGUF_DIMENSION_FIELDS | GGUF_SCALING_FIELDS | {"rope.freq_base", "rope.dimension_count"}, GGUF_NEUTRAL_FIELDS
    )
    dimensions = dimensions_from_gguf(fields, header.shapes)
    rotary_dim = fields.integer("rope.dimension_count", dimensions.head_dim, maximum=dimensions.head_dim)
    if rotary_dim != dimensions.head_dim:
        raise UnsupportedModelError(
            f"llama.rope.dimension_count = {rotary_dim} turns part of a head of {dimensions.head_dim}; "
            "only whole heads are supported",
            param="llama.rope.dimension_count",
        )
    rope = rope_from_gguf(
        fields,
        theta=fields.positive("rope.freq_base", 10_000.0),
        rotary_dim=rotary_dim,
        context_length=dimensions.max_position_embeddings,
        factors=header.rope_factors,
    )
    return _spec(
        dimensions,
        rope,
        bias="blk.0.attn_q.bias" in header.shapes,
        tie_word_embeddings="output.weight" not in header.shapes,
    )


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; supported: silu", param="hidden_act")
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, False):
            raise UnsupportedModelError(f"{name} is not supported for Llama", param=name)
    dimensions = dimensions_from_config(fields)
    parameters = dict(fields.raw("rope_parameters") or fields.raw("rope_scaling") or {})
    parameters.setdefault("rope_theta", fields.positive("rope_theta", 10_000.0))
    rope = rope_from_config(
        parameters, rotary_dim=dimensions.head_dim, max_position_embeddings=dimensions.max_position_embeddings
    )
    return _spec(dimensions, rope, bias=False, tie_word_embeddings=fields.flag("tie_word_embeddings", False))


def _spec(dimensions: Dimensions, rope: RopeSpec, *, bias: bool, tie_word_embeddings: bool) -> ModelSpec:
    norm = NormSpec(eps=dimensions.rms_norm_eps)
    layer = LayerSpec(
        attention_norm=norm,
        attention=AttentionSpec(
            num_attention_heads=dimensions.num_attention_heads,
            num_key_value_heads=dimensions.num_key_value_heads,
            head_dim=dimensions.head_dim,
            scale=1 / math.sqrt(dimensions.head_dim),
            rope=rope,
            bias=bias,
        ),
        post_attention_norm=None,
        mlp_norm=norm,
        mlp=MlpSpec(intermediate_size=dimensions.intermediate_size, activation="silu"),
        post_mlp_norm=None,
    )
    return ModelSpec(
        architecture="llama",
        vocab_size=dimensions.vocab_size,
        hidden_size=dimensions.hidden_size,
        max_position_embeddings=dimensions.max_position_embeddings,
        layers=(layer,) * dimensions.num_hidden_layers,
        final_norm=norm,
        tie_word_embeddings=tie_word_embeddings,
    )


FAMILY = Family(
    architecture="llama",
    spec_from_gguf=spec_from_gguf,
    gguf_names=GGUF_NAMES,
    spec_from_config=spec_from_config,
    hf_names=HF_NAMES,
)
