"""Small random models as GGUF files, and batches to run them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.batch import ForwardBatch
from pellucid.core.config import BLOCK_SIZE, BackendConfig
from pellucid.models.family import GGUFHeader
from pellucid.models.kv_groups import kv_groups
from pellucid.models.registry import family_for_architecture
from pellucid.models.spec import ModelSpec, tensor_shapes
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from pellucid.weights.tensor import WeightTensor
from pellucid.weights.tensor_map import tensor_sources
from tests.support.gguf_writer import encode, write_gguf

if TYPE_CHECKING:
    from pellucid.backends.cpu.backend import CpuBackend

try:
    from pellucid.backends.cpu import _native
except ImportError:
    ISAS: list[str] = []
else:
    ISAS = _native.instruction_sets()
"""What the native core has kernels for here; nothing where it is not built."""

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 1024,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 16,
}

GEMMA3: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 1024,
    "gemma3.embedding_length": 64,
    "gemma3.block_count": 7,
    "gemma3.feed_forward_length": 96,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 32,
    "gemma3.attention.value_length": 32,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 40,
    "gemma3.rope.freq_base": 1000000.0,
}

METADATA = {"llama": LLAMA, "gemma3": GEMMA3}

HEADS_OF_32: dict[str, dict[str, Any]] = {
    "llama": {
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
    },
    "gemma3": {},
}
"""What makes each of METADATA fit a KV cache of q8, whose blocks are of 32."""

ODD: dict[str, Any] = {
    "llama.embedding_length": 75,
    "llama.feed_forward_length": 129,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 34,
    "llama.attention.value_length": 34,
    "llama.rope.dimension_count": 34,
}
"""What gives LLAMA widths that fill no vector."""


def tiny_spec(
    metadata: Mapping[str, Any], *, vocab_size: int = 128, tied: bool = True, bias: bool = False
) -> ModelSpec:
    """The spec that a file of this metadata will have."""
    hidden_size = metadata[f"{metadata['general.architecture']}.embedding_length"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, hidden_size)}
    if not tied:
        shapes["output.weight"] = (vocab_size, hidden_size)
    if bias:
        shapes["blk.0.attn_q.bias"] = (hidden_size,)
    return family_for_architecture(metadata["general.architecture"]).spec_from_gguf(GGUFHeader(metadata, shapes))


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical name -> float32 array. Large enough for attention to be far from uniform, norms far from 1."""
    rng = np.random.RandomState(seed)  # unlike default_rng, promised to give the same numbers in every numpy
    weights = {}
    for name, shape in tensor_shapes(spec).items():
        if len(shape) == 1 and "norm" in name:
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(0, 2 / np.sqrt(shape[-1]), shape)
        weights[name] = values.astype(np.float32)
    return weights


def write_model(
    path: Path | str,
    metadata: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    spec: ModelSpec,
    *,
    formats: Mapping[str, BlockFormat] | BlockFormat = BlockFormat.F32,
    extra_metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray | WeightTensor] | None = None,
) -> Path:
    """Writes canonical `weights` under the names, and in the row order, of a GGUF file of the architecture.

    Args:
        formats: the format of every matrix, or of each by its canonical name (F32 where it is missing).
        extra_tensors: further ones by the file's name, or in place of those above.
    """
    family = family_for_architecture(metadata["general.architecture"])
    tensors = {}
    for name, source in tensor_sources(spec, family.gguf_names).items():
        values = weights[name]
        if source.interleaved_heads:
            values = interleave_heads(values, source.interleaved_heads)
        format = formats if isinstance(formats, BlockFormat) else formats.get(name, BlockFormat.F32)
        tensors[source.name] = encode(values, format if values.ndim == 2 else BlockFormat.F32)
    return write_gguf(path, {**metadata, **(extra_metadata or {})}, {**tensors, **(extra_tensors or {})})


def write_tiny_model(
    path: Path | str,
    architecture: str = "llama",
    *,
    metadata: Mapping[str, Any] | None = None,
    vocab_size: int = 128,
    tied: bool = True,
    seed: int = 0,
    formats: Mapping[str, BlockFormat] | BlockFormat = BlockFormat.F32,
    extra_metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A random model; `metadata` overrides that of `METADATA[architecture]`, `extra_metadata` (a tokenizer, say) is
    written as it is."""
    described = {**METADATA[architecture], **(metadata or {})}
    spec = tiny_spec(described, vocab_size=vocab_size, tied=tied)
    weights = random_weights(spec, seed)
    return write_model(path, described, weights, spec, formats=formats, extra_metadata=extra_metadata)


def interleave_heads(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Half-split rows of each head -> interleaved pairs, as GGUF's llama files hold them."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def num_kv_groups(backend: Backend) -> int:
    """KV blocks that 64 tokens of the backend's model take."""
    return len(kv_groups(backend.spec))


def make_batch(
    pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    logits_rows: Sequence[int] | None = None,
    *,
    groups: int = 1,
    layers: Sequence[int] | None = None,
) -> ForwardBatch:
    """A step over sequences, each (new tokens, tokens already computed, KV blocks); logits of all new tokens by
    default. In a model with so many KV `groups`, number n stands for the blocks `group_blocks` gives."""
    lengths = [len(tokens) for tokens, _, _ in pieces]
    width = max(len(blocks) for _, _, blocks in pieces)
    num_tokens = sum(lengths)
    return ForwardBatch(
        input_ids=np.concatenate([np.asarray(tokens, np.int32) for tokens, _, _ in pieces]),
        positions=np.concatenate([np.arange(start, start + len(t), dtype=np.int32) for t, start, _ in pieces]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        kv_lens=np.array([start + len(tokens) for tokens, start, _ in pieces], np.int32),
        block_tables=group_blocks([[*blocks, *[-1] * (width - len(blocks))] for _, _, blocks in pieces], groups),
        logits_rows=np.arange(num_tokens, dtype=np.int32) if logits_rows is None else np.array(logits_rows, np.int32),
        layers=None if layers is None else np.array(layers, np.int32),
    )


def group_blocks(numbers: Any, groups: int) -> np.ndarray:
    """int32 [groups, ...]: the KV blocks that each of `numbers` stands for, a different one in each group; -1 stays."""
    first = groups * np.asarray(numbers, np.int32)
    return np.stack([np.where(first < 0, -1, first + group) for group in range(groups)]).astype(np.int32)


def all_logits(backend: Backend, tokens: Sequence[int], chunk: int | None = None, *, first: int = 0) -> np.ndarray:
    """Logits of the tokens from `first` on of one sequence, run `chunk` tokens a step in fresh KV blocks."""
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups * num_blocks)
    chunk = chunk or len(tokens)
    logits = []
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        wanted = range(min(max(first - start, 0), len(piece)), len(piece))
        logits.append(
            backend.forward(make_batch([(piece, start, range(num_blocks))], wanted, groups=groups)).logits.copy()
        )
    return np.concatenate(logits)


def load_native(path: Path, **options: Any) -> CpuBackend:
    """The native core with the model at `path`; `options` are those of CpuBackend."""
    from pellucid.backends.cpu.backend import CpuBackend

    with open_model(path) as model_file:
        return CpuBackend(model_file.spec, model_file.weights(), **options)


def load_tiny(path: Path, name: Any, threads: int | None = 1, kv_cache_dtype: Any = "f16") -> Backend:
    """The backend `name` with the model at `path`; skips where the native core is not built."""
    if name == "cpu":
        pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    with open_model(path) as model_file:
        return load_backend(model_file, BackendConfig(name, threads), kv_cache_dtype=kv_cache_dtype)
