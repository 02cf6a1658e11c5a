"""Gemma 3, text only (Gemma Team, 2025).

What sets it apart from Llama: a norm on both sides of attention and MLP, q and k normalized a head, a gelu gate, the
embedding scaled by sqrt(hidden_size), and five layers with a sliding window and a RoPE base of their own for each layer
that sees everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.dimensions import (
    GGUF_DIMENSION_FIELDS,
    GGUF_NEUTRAL_FIELDS,
    Dimensions,
    dimensions_from_config,
    dimensions_from_gguf,
)
from pellucid.models.family import Family, GGUFHeader, TensorNames
from pellucid.models.fields import Fields
from pellucid.models.rope import (
    GGUF_SCALING_FIELDS,
    MAX_POSITION,
    default_inv_freq,
    rope_from_config,
    rope_from_gguf,
    rope_spec,
)
from pellucid.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

LOCAL_ROPE_THETA = 10_000.0
GLOBAL_ROPE_THETA = 1_000_000.0
SLIDING_WINDOW_PATTERN = 6
"""Every sixth layer sees the whole context."""

LAYERS_OF_27B = 62

GGUF_NAMES = TensorNames(
    model={
        "embed_tokens.weight": "token_embd.weight",
        "final_norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    layer={
        "attention_norm.weight": "blk.{layer}.attn_norm.weight",
        "attention.q_proj.weight": "blk.{layer}.attn_q.weight",
        "attention.k_proj.weight": "blk.{layer}.attn_k.weight",
        "attention.v_proj.weight": "blk.{layer}.attn_v.weight",
        "attention.q_norm.weight": "blk.{layer}.attn_q_norm.weight",
        "attention.k_norm.weight": "blk.{layer}.attn_k_norm.weight",
        "attention.o_proj.weight": "blk.{layer}.attn_output.weight",
        "post_attention_norm.weight": "blk.{layer}.post_attention_norm.weight",
        "mlp_norm.weight": "blk.{layer}.ffn_norm.weight",
        "mlp.gate_proj.weight": "blk.{layer}.ffn_gate.weight",
        "mlp.up_proj.weight": "blk.{layer}.ffn_up.weight",
        "mlp.down_proj.weight": "blk.{layer}.ffn_down.weight",
        "post_mlp_norm.weight": "blk.{layer}.post_ffw_norm.weight",
    },
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
        "attention.q_norm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
        "attention.k_norm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
        "attention.o_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight",
        "post_attention_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
        "mlp_norm.weight": "model.layers.{layer}.pre_feedforward_layernorm.weight",
        "mlp.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
        "mlp.up_proj.weight": "model.layers.{layer}.mlp.up_proj.weight",
        "mlp.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
        "post_mlp_norm.weight": "model.layers.{layer}.post_feedforward_layernorm.weight",
    },
)

GGUF_FIELDS = frozenset(
    {
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.dimension_count",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
    }
)


def spec_from_gguf(header: GGUFHeader) -> ModelSpec:
    fields = Fields(header.metadata, "gemma3.")
    fields.refuse_other_than(GGUF_DIMENSION_FIELDS | GGUF_SCALING_FIELDS | GGUF_FIELDS, GGUF_NEUTRAL_FIELDS)
    dimensions = dimensions_from_gguf(fields, header.shapes)
    rotary_dim = fields.integer("rope.dimension_count", dimensions.head_dim, maximum=dimensions.head_dim)
    if rotary_dim != dimensions.head_dim:
        raise UnsupportedModelError(
            f"gemma3.rope.dimension_count = {rotary_dim} turns part of a head of {dimensions.head_dim}; "
            "only whole heads are supported",
            param="gemma3.rope.dimension_count",
        )
    global_rope = rope_from_gguf(
        fields,
        theta=fields.positive("rope.freq_base", GLOBAL_ROPE_THETA),
        rotary_dim=rotary_dim,
        context_length=dimensions.max_position_embeddings,
    )
    local_theta = fields.positive("rope.freq_base_swa", LOCAL_ROPE_THETA)
    return _spec(
        dimensions,
        scale=fields.positive("attention.scale", _gguf_attention_scale(dimensions)),
        global_rope=global_rope,
        local_rope=rope_spec(default_inv_freq(local_theta, rotary_dim)),
        sliding_window=fields.integer("attention.sliding_window", 0, minimum=0, maximum=MAX_POSITION),
        slides=_gguf_sliding_layers(fields, dimensions.num_hidden_layers),
        # A GGUF norm weight already has Gemma's 1 added.
        norm=NormSpec(eps=dimensions.rms_norm_eps),
        tie_word_embeddings="output.weight" not in header.shapes,
    )


def _gguf_attention_scale(dimensions: Dimensions) -> float:
    """The file does not say it: 1 / sqrt(head_dim), but for the 27B, which was trained with hidden_size / heads."""
    if dimensions.num_hidden_layers == LAYERS_OF_27B:
        return 1 / math.sqrt(dimensions.hidden_size / dimensions.num_attention_heads)
    return 1 / math.sqrt(dimensions.head_dim)


def _gguf_sliding_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers slide: the pattern is a number n (every n-th layer does not) or a flag a layer; none does where the
    file has no window."""
    if fields.integer("attention.sliding_window", 0, minimum=0, maximum=MAX_POSITION) == 0:
        return [False] * num_layers
    pattern = fields.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list | np.ndarray):
        if len(pattern) != num_layers:
            raise ModelFileError(
                f"gemma3.attention.sliding_window_pattern has {len(pattern)} entries for {num_layers} layers",
                param="gemma3.attention.sliding_window_pattern",
            )
        return [bool(slides) for slides in pattern]
    every = fields.integer("attention.sliding_window_pattern", SLIDING_WINDOW_PATTERN, maximum=MAX_POSITION)
    return _slides_but_every(every, num_layers)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    activation = fields.text("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedModelError(
            f"hidden_activation {activation!r} is not supported; supported: gelu_pytorch_tanh",
            param="hidden_activation",
        )
    for name in ("attention_bias", "use_bidirectional_attention"):
        if fields.flag(name, False):
            raise UnsupportedModelError(f"{name} is not supported for Gemma 3", param=name)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.has(name):
            raise UnsupportedModelError(f"{name} is not supported for Gemma 3", param=name)
    dimensions = dimensions_from_config(fields)
    global_parameters, local_parameters = _config_rope_parameters(fields)
    return _spec(
        dimensions,
        scale=1 / math.sqrt(fields.positive("query_pre_attn_scalar", 256)),
        global_rope=rope_from_config(
            global_parameters,
            rotary_dim=dimensions.head_dim,
            max_position_embeddings=dimensions.max_position_embeddings,
        ),
        local_rope=rope_from_config(
            local_parameters,
            rotary_dim=dimensions.head_dim,
            max_position_embeddings=dimensions.max_position_embeddings,
        ),
        sliding_window=fields.integer("sliding_window", 4096, maximum=MAX_POSITION),
        slides=_config_sliding_layers(fields, dimensions.num_hidden_layers),
        norm=NormSpec(eps=dimensions.rms_norm_eps, weight_offset=1.0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _config_rope_parameters(fields: Fields) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Parameters of the global and the local embedding: nested by layer type since transformers 5, flat before."""
    nested = fields.raw("rope_parameters") or {}
    global_parameters = dict(nested.get("full_attention") or fields.raw("rope_scaling") or {})
    local_parameters = dict(nested.get("sliding_attention") or {})
    global_parameters.setdefault("rope_theta", fields.positive("rope_theta", GLOBAL_ROPE_THETA))
    local_parameters.setdefault("rope_theta", fields.positive("rope_local_base_freq", LOCAL_ROPE_THETA))
    return global_parameters, local_parameters


def _config_sliding_layers(fields: Fields, num_layers: int) -> list[bool]:
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        every = fields.integer("sliding_window_pattern", SLIDING_WINDOW_PATTERN, maximum=MAX_POSITION)
        return _slides_but_every(every, num_layers)
    if len(layer_types) != num_layers or not set(layer_types) <= {"sliding_attention", "full_attention"}:
        raise ModelFileError(
            f"layer_types must name sliding_attention or full_attention for each of {num_layers} layers",
            param="layer_types",
        )
    return [layer_type == "sliding_attention" for layer_type in layer_types]


def _slides_but_every(every: int, num_layers: int) -> list[bool]:
    return [(index + 1) % every != 0 for index in range(num_layers)]


def _spec(
    dimensions: Dimensions,
    *,
    scale: float,
    global_rope: RopeSpec,
    local_rope: RopeSpec,
    sliding_window: int,
    slides: Sequence[bool],
    norm: NormSpec,
    tie_word_embeddings: bool,
) -> ModelSpec:
    def layer(sliding: bool) -> LayerSpec:
        return LayerSpec(
            attention_norm=norm,
            attention=AttentionSpec(
                num_attention_heads=dimensions.num_attention_heads,
                num_key_value_heads=dimensions.num_key_value_heads,
                head_dim=dimensions.head_dim,
                scale=scale,
                rope=local_rope if sliding else global_rope,
                sliding_window=sliding_window if sliding else None,
                qk_norm=norm,
            ),
            post_attention_norm=norm,
            mlp_norm=norm,
            mlp=MlpSpec(intermediate_size=dimensions.intermediate_size, activation="gelu_tanh"),
            post_mlp_norm=norm,
        )

    local_layer, global_layer = layer(sliding=True), layer(sliding=False)
    return ModelSpec(
        architecture="gemma3",
        vocab_size=dimensions.vocab_size,
        hidden_size=dimensions.hidden_size,
        max_position_embeddings=dimensions.max_position_embeddings,
        layers=tuple(local_layer if sliding else global_layer for sliding in slides),
        final_norm=norm,
        tie_word_embeddings=tie_word_embeddings,
        embedding_scale=math.sqrt(dimensions.hidden_size),
    )


FAMILY = Family(
    architecture="gemma3",
    spec_from_gguf=spec_from_gguf,
    gguf_names=GGUF_NAMES,
    spec_from_config=spec_from_config,
    hf_names=HF_NAMES,
)
