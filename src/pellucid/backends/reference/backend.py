"""The executor: embeddings, layers, logits, top to bottom as a newcomer may read it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.reference.attention import ReadBlock, attend, attention_weights
from pellucid.backends.reference.capture import Observer
from pellucid.backends.reference.kv_cache import KVCache
from pellucid.backends.reference.ops import activate, linear, rms_norm, rope_angles, rotate
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import BackendError
from pellucid.core.processors import usable_processors
from pellucid.decoding import sampler
from pellucid.models.kv_groups import kv_groups, kv_layout_name
from pellucid.models.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec
from pellucid.quant.formats import dequantize
from pellucid.weights.loader import ModelFile, require_finite
from pellucid.weights.tensor import WeightTensor

Array = NDArray[np.float32]

_KV_LAYOUT_VERSION = 1
"""Goes up when a KV block's bytes are laid out otherwise, or when the arithmetic comes to other bits."""


def load(model_file: ModelFile, *, threads: int | None = None, kv_cache_dtype: str = "f32") -> ReferenceBackend:
    """Decode the weights of `model_file` to float32 and make them ready to run.

    Args:
        model_file: an open model; it may be closed afterwards.
        threads: rows of a matrix product are spread over so many; all processors where None.
        kv_cache_dtype: "f32", "f16", "bf16" or "q8".

    Raises:
        ModelFileError: a weight is not finite.
        InvalidRequestError: another `kv_cache_dtype`, or one that the model's heads do not fit.
    """
    return ReferenceBackend(model_file.spec, model_file.weights(), threads=threads, kv_cache_dtype=kv_cache_dtype)


class ReferenceBackend:
    """Implements `backends.base.Backend`.

    Args:
        spec: the model.
        weights: every tensor of `models.spec.tensor_shapes(spec)` by its canonical name.
        threads, kv_cache_dtype: see `load`.

    Raises:
        ModelFileError: a weight is not finite.
        InvalidRequestError: another `kv_cache_dtype`, or one that the model's heads do not fit.
    """

    name = "reference"
    threads = 1

    def __init__(
        self,
        spec: ModelSpec,
        weights: Iterable[tuple[str, WeightTensor]],
        *,
        threads: int | None = None,
        kv_cache_dtype: str = "f32",
    ) -> None:
        self.spec = spec
        self._kv_cache = KVCache(spec, kv_cache_dtype)
        self.kv_layout = kv_layout_name("reference", _KV_LAYOUT_VERSION, kv_cache_dtype, spec)
        self._group_of_layer = {layer: group for group, own in enumerate(kv_groups(spec)) for layer in own.layers}
        self._weights = {name: _decode(name, tensor) for name, tensor in weights}
        num_threads = threads or usable_processors()
        self._executor = ThreadPoolExecutor(num_threads, "reference") if num_threads > 1 else None
        self._closed = False

    def kv_bytes_per_block(self) -> int:
        return self._kv_cache.bytes_per_block

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._require_open()
        self._kv_cache.allocate(num_blocks)

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        self._require_open()
        self._kv_cache.copy(pairs)

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        self._require_open()
        return self._kv_cache.read_blocks(blocks)

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._require_open()
        self._kv_cache.write_blocks(blocks, data)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._require_open()
        layers = self._layers(batch)
        observer = Observer(batch.capture, len(self.spec.layers))
        sequence_of_token = np.repeat(np.arange(batch.num_seqs), np.diff(batch.cu_seqlens))
        block_tables = batch.block_tables[:, sequence_of_token]
        ropes = {layer.attention.rope for layer in self.spec.layers}
        angles = {rope: rope_angles(batch.positions, rope) for rope in ropes}
        observer.done("prepare")

        x = self._weights["embed_tokens.weight"][batch.input_ids] * np.float32(self.spec.embedding_scale)
        observer.residual(0, x)
        for index in layers:
            layer = self.spec.layers[index]
            residual = x
            x = self._norm(x, layer.attention_norm, f"layers.{index}.attention_norm")
            observer.done("attention_input", index)
            tables = block_tables[self._group_of_layer[index]]
            x = self._attention(x, index, layer.attention, angles, batch.positions, tables, observer)
            if layer.post_attention_norm is not None:
                x = self._norm(x, layer.post_attention_norm, f"layers.{index}.post_attention_norm")
            x = residual + x
            observer.residual(2 * index + 1, x)

            residual = x
            x = self._norm(x, layer.mlp_norm, f"layers.{index}.mlp_norm")
            observer.done("mlp_input", index)
            x = self._mlp(x, index, layer.mlp, observer)
            if layer.post_mlp_norm is not None:
                x = self._norm(x, layer.post_mlp_norm, f"layers.{index}.post_mlp_norm")
            x = residual + x
            observer.residual(2 * index + 2, x)

        observer.normalized(2 * len(self.spec.layers) + 1, x, self._final_norm)
        x = self._final_norm(x[batch.logits_rows])
        observer.done("head_input")
        logits = self._head(x)
        observer.done("lm_head")
        return ForwardOutput(logits)

    def project(self, hidden: NDArray[np.float32], *, normalize: bool = True) -> NDArray[np.float32]:
        self._require_open()
        if hidden.ndim != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise BackendError(f"hidden states of shape {hidden.shape} are not rows of {self.spec.hidden_size}")
        return self._head(self._final_norm(hidden) if normalize else hidden)

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        self._require_open()
        return sampler.sample(logits, sampling)

    def close(self) -> None:
        self._closed = True
        self._weights.clear()
        self._kv_cache.allocate(0)
        if self._executor is not None:
            self._executor.shutdown()

    def _layers(self, batch: ForwardBatch) -> Iterable[int]:
        """The layers to run."""
        num_layers = len(self.spec.layers)
        if batch.layers is None:
            return range(num_layers)
        layers: list[int] = batch.layers.tolist()
        if batch.capture is not None:
            raise BackendError("a batch that leaves out layers captures nothing")
        if not layers or not all(a < b for a, b in pairwise([-1, *layers, num_layers])):
            raise BackendError(f"layers must rise, each from 0 to {num_layers - 1}, and be at least one; not {layers}")
        return layers

    def _attention(
        self,
        x: Array,
        index: int,
        attention: AttentionSpec,
        angles: dict[RopeSpec, tuple[Array, Array]],
        positions: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        observer: Observer,
    ) -> Array:
        """Attention of layer `index`: x float32 [num_tokens, hidden_size], block_tables int32 [num_tokens, blocks]."""
        prefix = f"layers.{index}.attention"
        num_tokens, head_dim = x.shape[0], attention.head_dim
        query = self._linear(x, f"{prefix}.q_proj").reshape(num_tokens, attention.num_attention_heads, head_dim)
        key = self._linear(x, f"{prefix}.k_proj").reshape(num_tokens, attention.num_key_value_heads, head_dim)
        value = self._linear(x, f"{prefix}.v_proj").reshape(num_tokens, attention.num_key_value_heads, head_dim)
        observer.done("qkv_proj", index)
        if attention.qk_norm is not None:
            query = self._norm(query, attention.qk_norm, f"{prefix}.q_norm")
            key = self._norm(key, attention.qk_norm, f"{prefix}.k_norm")
        query, key = rotate(query, *angles[attention.rope]), rotate(key, *angles[attention.rope])

        for token, position in enumerate(positions.tolist()):
            block, offset = divmod(position, BLOCK_SIZE)
            self._kv_cache.write(index, block_tables[token, block], offset, key[token], value[token])

        def reader(token: int) -> ReadBlock:
            return lambda block, tokens: self._kv_cache.read(index, block_tables[token, block], tokens)

        def weights(token: int) -> Array:
            return attention_weights(query[token], int(positions[token]), reader(token), attention)

        attended = np.empty_like(query)
        for token, position in enumerate(positions.tolist()):
            attended[token] = attend(query[token], position, reader(token), attention)
        observer.done("attention", index)
        observer.attention(index, weights)
        x = self._linear(attended.reshape(num_tokens, -1), f"{prefix}.o_proj")
        observer.done("o_proj", index)
        return x

    def _mlp(self, x: Array, index: int, mlp: MlpSpec, observer: Observer) -> Array:
        prefix = f"layers.{index}.mlp"
        gate = activate(self._linear(x, f"{prefix}.gate_proj"), mlp.activation)
        x = gate * self._linear(x, f"{prefix}.up_proj")
        observer.done("gate_up_proj", index)
        observer.activations(index, x)
        x = self._linear(x, f"{prefix}.down_proj")
        observer.done("down_proj", index)
        return x

    def _final_norm(self, x: Array) -> Array:
        return self._norm(x, self.spec.final_norm, "final_norm")

    def _head(self, x: Array) -> Array:
        logits = self._linear(x, "embed_tokens" if self.spec.tie_word_embeddings else "lm_head")
        if not np.isfinite(logits).all():
            raise BackendError("the model gave logits that are not finite")
        return logits

    def _norm(self, x: Array, norm: NormSpec, name: str) -> Array:
        return rms_norm(x, self._weights[f"{name}.weight"], norm)

    def _linear(self, x: Array, name: str) -> Array:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return linear(x, weight, bias, executor=self._executor)

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the backend was closed")


def _decode(name: str, tensor: WeightTensor) -> Array:
    require_finite(name, tensor)
    return dequantize(tensor.data, tensor.format).reshape(tensor.shape)
