"""What a model is, as plain data. A family file fills these in; each backend has one executor that runs them.

Nothing here computes. A field that a family never sets is a field that should not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS normalization, y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) (Zhang & Sennrich, 2019)."""

    eps: float
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al., 2021), half-split layout: pair i is (x[i], x[i + rotary_dim / 2]).

    Attributes:
        inv_freq: rotary_dim / 2 angular frequencies in radians a token, with every scaling variant already folded in.
        attention_factor: multiplies cos and sin (YaRN).
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al., 2023).

    Attributes:
        scale: multiplies q . k.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None sees all.
        qk_norm: normalizes each head of q and k before RoPE.
        bias: q, k and v projections add a bias.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    sliding_window: int | None = None
    qk_norm: NormSpec | None = None
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """Gated feed-forward: down(activation(gate(x)) * up(x)) (Shazeer, 2020)."""

    intermediate_size: int
    activation: Activation


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One pre-norm decoder layer; the post norms are the sandwich norms of Gemma.

    h = x + post_attention_norm(attention(attention_norm(x))); y = h + post_mlp_norm(mlp(mlp_norm(h)))
    """

    attention_norm: NormSpec
    attention: AttentionSpec
    post_attention_norm: NormSpec | None
    mlp_norm: NormSpec
    mlp: MlpSpec
    post_mlp_norm: NormSpec | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        architecture: the family's name, for people.
        embedding_scale: multiplies the embedding of each token.
        tie_word_embeddings: lm_head is embed_tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    embedding_scale: float = 1.0


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names of `spec` with their shapes ([out_features, in_features] for matrices).

    This is the one place where names and shapes are written down; the loader checks a file against it, the tensor maps
    target it and both executors read by it.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}"
        attention = layer.attention
        query_size = attention.num_attention_heads * attention.head_dim
        key_value_size = attention.num_key_value_heads * attention.head_dim
        shapes[f"{prefix}.attention_norm.weight"] = (spec.hidden_size,)
        for name, size in (("q_proj", query_size), ("k_proj", key_value_size), ("v_proj", key_value_size)):
            shapes[f"{prefix}.attention.{name}.weight"] = (size, spec.hidden_size)
            if attention.bias:
                shapes[f"{prefix}.attention.{name}.bias"] = (size,)
        if attention.qk_norm is not None:
            shapes[f"{prefix}.attention.q_norm.weight"] = (attention.head_dim,)
            shapes[f"{prefix}.attention.k_norm.weight"] = (attention.head_dim,)
        shapes[f"{prefix}.attention.o_proj.weight"] = (spec.hidden_size, query_size)
        if layer.post_attention_norm is not None:
            shapes[f"{prefix}.post_attention_norm.weight"] = (spec.hidden_size,)
        shapes[f"{prefix}.mlp_norm.weight"] = (spec.hidden_size,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (layer.mlp.intermediate_size, spec.hidden_size)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (layer.mlp.intermediate_size, spec.hidden_size)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (spec.hidden_size, layer.mlp.intermediate_size)
        if layer.post_mlp_norm is not None:
            shapes[f"{prefix}.post_mlp_norm.weight"] = (spec.hidden_size,)
    shapes["final_norm.weight"] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes
