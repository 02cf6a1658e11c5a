"""The sizes that every decoder states, read and checked the same way for each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.fields import Fields
from pellucid.models.rope import MAX_POSITION

# Far above any model there is: they keep a hostile file from asking for absurd sizes before a tensor is looked at.
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The names are those of a config.json; `head_dim` is even, and the query heads divide into the KV heads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFileError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_key_value_heads} KV heads",
                param="num_key_value_heads",
            )
        if self.head_dim % 2:
            raise ModelFileError(f"head_dim is {self.head_dim}; RoPE turns pairs and needs it even", param="head_dim")


GGUF_DIMENSION_FIELDS = frozenset(
    {
        "vocab_size",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "context_length",
        "attention.layer_norm_rms_epsilon",
    }
)
"""The metadata that `dimensions_from_gguf` reads."""

GGUF_NEUTRAL_FIELDS: Mapping[str, Any] = MappingProxyType(
    {
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.max_alibi_bias": 0.0,
        "attn_logit_softcapping": 0.0,
        "embedding_scale": 1.0,
        "expert_count": 0,
        "expert_used_count": 0,
        "final_logit_softcapping": 0.0,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "tensor_data_layout": "Meta AI original pth",
        "use_parallel_residual": False,
    }
)
"""Metadata some writers add, with the one value that leaves the arithmetic as it is."""


def dimensions_from_gguf(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> Dimensions:
    """Read the sizes from GGUF metadata; the vocabulary is as long as the embedding table.

    Args:
        fields: metadata below the architecture's prefix.
        shapes: logical tensor shapes by the file's names.

    Raises:
        ModelFileError: a malformed field, or one at odds with the embedding table.
        UnsupportedModelError: values narrower or wider than keys.
    """
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ModelFileError("tensor token_embd.weight is missing or not a matrix", param="token_embd.weight")
    vocab_size = fields.integer("vocab_size", embedding[0], maximum=MAX_SIZE)
    if vocab_size != embedding[0]:
        raise ModelFileError(
            f"vocab_size is {vocab_size}, but token_embd.weight has {embedding[0]} rows", param="vocab_size"
        )
    hidden_size = fields.integer("embedding_length", maximum=MAX_SIZE)
    num_attention_heads = fields.integer("attention.head_count", maximum=MAX_HEADS)
    head_dim = fields.integer(
        "attention.key_length", hidden_size // num_attention_heads, minimum=2, maximum=MAX_HEAD_DIM
    )
    value_dim = fields.integer("attention.value_length", head_dim, maximum=MAX_HEAD_DIM)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"attention.value_length {value_dim} differs from attention.key_length {head_dim}, which is not supported",
            param="attention.value_length",
        )
    return Dimensions(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length", maximum=MAX_SIZE),
        num_hidden_layers=fields.integer("block_count", maximum=MAX_LAYERS),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=fields.integer("attention.head_count_kv", num_attention_heads, maximum=MAX_HEADS),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("context_length", maximum=MAX_POSITION),
        rms_norm_eps=_float32(fields.positive("attention.layer_norm_rms_epsilon")),
    )


def dimensions_from_config(fields: Fields) -> Dimensions:
    """Read the sizes from a config.json.

    Raises:
        ModelFileError: a malformed field.
    """
    hidden_size = fields.integer("hidden_size", maximum=MAX_SIZE)
    num_attention_heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    return Dimensions(
        vocab_size=fields.integer("vocab_size", maximum=MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", maximum=MAX_SIZE),
        num_hidden_layers=fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", num_attention_heads, maximum=MAX_HEADS),
        head_dim=fields.integer("head_dim", hidden_size // num_attention_heads, minimum=2, maximum=MAX_HEAD_DIM),
        max_position_embeddings=fields.integer("max_position_embeddings", maximum=MAX_POSITION),
        rms_norm_eps=_float32(fields.positive("rms_norm_eps")),
    )


def _float32(value: float) -> float:
    """What the arithmetic sees of it, and all that GGUF keeps."""
    return float(np.float32(value))
