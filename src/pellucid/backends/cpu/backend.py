"""The native core as a backend: packed weights, one C++ call a step (docs/kernels.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.cpu import _native
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.errors import BackendError, CapacityError, InvalidRequestError, UnsupportedModelError
from pellucid.core.processors import usable_processors
from pellucid.estimate.memory import kv_bytes_per_block
from pellucid.models.kv_groups import kv_groups, kv_layout_name
from pellucid.models.spec import ModelSpec, tensor_shapes
from pellucid.quant.formats import dequantize
from pellucid.weights.loader import ModelFile, not_finite
from pellucid.weights.tensor import WeightTensor

if TYPE_CHECKING:
    from pellucid.models.spec import LayerSpec, NormSpec

ISA_VARIABLE = "PELLUCID_ISA"
"""Environment variable that forces an instruction set: amx, avx512, avx2 or portable."""

_KV_LAYOUT_VERSION = 1
"""Goes up when a KV block's bytes are laid out otherwise, or when the kernels come to other bits."""

_PANEL_ROWS = 16
_PACKED_AT_ONCE = 4 << 20  # bytes: what is in memory both as it lies in the file and packed


def load(model_file: ModelFile, *, threads: int | None = None, kv_cache_dtype: str = "f16") -> CpuBackend:
    """Pack the weights of `model_file` and make them ready to run.

    Args:
        model_file: an open model; it may be closed afterwards.
        threads: all processors this process may use where None.
        kv_cache_dtype: "f16", "bf16", "f32" or "q8".

    Raises:
        ModelFileError: a weight is not finite.
        UnsupportedModelError: the core has no kernels for a part of the model.
        CapacityError: the memory for the weights is not to be had.
        InvalidRequestError: a bad thread count, KV type (or one that the heads do not fit) or PELLUCID_ISA.
    """
    return CpuBackend(
        model_file.spec,
        model_file.weights(),
        threads=threads,
        kv_cache_dtype=kv_cache_dtype,
        release=model_file.release,
    )


class CpuBackend:
    """Implements `backends.base.Backend`.

    Args:
        spec: the model.
        weights: every tensor of `models.spec.tensor_shapes(spec)` by its canonical name.
        threads, kv_cache_dtype: see `load`.
        isa: the instruction set to use; None takes PELLUCID_ISA, else the best there is.
        release: called with rows of a tensor's data once they are packed, so that their memory can go.

    Attributes:
        kv_layout: see `backends.base.Backend`.
        isa: the instruction set that was chosen.
        threads: threads a step runs on.
        weight_bytes: bytes of packed weights that one decode step reads.
    """

    name = "cpu"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Iterable[tuple[str, WeightTensor]],
        *,
        threads: int | None = None,
        kv_cache_dtype: str = "f16",
        isa: str | None = None,
        release: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        self.spec = spec
        for index, layer in enumerate(spec.layers):
            if layer.attention.head_dim > _native.MAX_HEAD_DIM:
                raise UnsupportedModelError(
                    f"layer {index} has head_dim {layer.attention.head_dim}; the native core goes up to "
                    f"{_native.MAX_HEAD_DIM}: use the reference backend",
                    param="head_dim",
                )
        kv_bytes_per_block(spec, kv_cache_dtype)  # refuses a dtype that is not there or does not fit
        num_threads = threads or usable_processors()
        try:
            self._model: _native.Model | None = _native.Model(
                _native_spec(spec), num_threads, kv_cache_dtype, isa or os.environ.get(ISA_VARIABLE) or None
            )
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error
        except RuntimeError as error:
            raise BackendError(f"cannot start {num_threads} threads: {error}", param="threads") from error
        try:
            self._load(weights, release)
        except MemoryError as error:
            raise CapacityError("not enough memory for the weights of this model") from error
        self.isa: str = self._model.isa
        self.threads: int = self._model.num_threads
        self.weight_bytes: int = self._model.weight_bytes
        kernels = " portable" if self.isa == "portable" else ""  # the others agree to the bit
        self.kv_layout = kv_layout_name(f"cpu{kernels}", _KV_LAYOUT_VERSION, kv_cache_dtype, spec)
        self._kv_cache_dtype = kv_cache_dtype
        self._logits = np.empty((0, spec.vocab_size), dtype=np.float32)

    def kv_bytes_per_block(self) -> int:
        return self._open().block_bytes

    def allocate_kv_cache(self, num_blocks: int) -> None:
        try:
            self._open().allocate_kv_cache(num_blocks)
        except MemoryError as error:
            size = num_blocks * self.kv_bytes_per_block()
            raise CapacityError(f"not enough memory for {num_blocks} KV blocks ({size / 1e9:.2f} GB)") from error

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        self._open().copy_blocks(pairs)

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        data = np.empty((len(blocks), self.kv_bytes_per_block()), np.uint8)
        try:
            self._open().read_blocks(blocks, data)
        except ValueError as error:
            raise BackendError(f"cannot read KV blocks: {error}") from error
        return data

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        try:
            self._open().write_blocks(blocks, np.ascontiguousarray(data))
        except (TypeError, ValueError) as error:  # TypeError: another dtype or number of axes
            raise BackendError(f"cannot write KV blocks: {error}") from error

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        rows = batch.logits_rows.shape[0]
        try:
            if self._logits.shape[0] < rows:
                self._logits = np.empty((rows, self.spec.vocab_size), dtype=np.float32)
            logits = self._logits[:rows]
            finite = self._open().forward(
                batch.input_ids,
                batch.positions,
                batch.cu_seqlens,
                batch.kv_lens,
                batch.block_tables,
                batch.logits_rows,
                logits,
                batch.layers,
                batch.capture,
            )
        except MemoryError as error:
            raise BackendError(f"not enough memory for a step of {batch.num_tokens} tokens") from error
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"the forward pass failed: {error}") from error
        self._require_finite(finite)
        return ForwardOutput(logits)

    def project(self, hidden: NDArray[np.float32], *, normalize: bool = True) -> NDArray[np.float32]:
        try:
            logits = np.empty((len(hidden), self.spec.vocab_size), np.float32)
            finite = self._open().project(np.ascontiguousarray(hidden), normalize, logits)
        except MemoryError as error:
            raise BackendError(f"not enough memory for the logits of {len(hidden)} hidden states") from error
        except (TypeError, ValueError) as error:  # TypeError: another dtype or number of axes
            raise BackendError(f"hidden states of shape {hidden.shape} cannot be projected: {error}") from error
        self._require_finite(finite)
        return logits

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        return SampledTokens(
            *self._open().sample(
                logits,
                sampling.rows.view(np.uint8),
                sampling.tokens,
                sampling.bias,
                sampling.masks,
                sampling.dry_breakers,
            )
        )

    def close(self) -> None:
        self._model = None

    def _open(self) -> _native.Model:
        if self._model is None:
            raise BackendError("this backend is closed")
        return self._model

    def _require_finite(self, finite: bool) -> None:
        if not finite:
            raise BackendError(
                "the model's logits are not finite: its weights or its activations have overflowed"
                + _range_hint(self._kv_cache_dtype)
            )

    def _load(
        self, weights: Iterable[tuple[str, WeightTensor]], release: Callable[[NDArray[np.uint8]], None] | None
    ) -> None:
        model = self._open()
        offsets = _norm_offsets(self.spec)
        for name, tensor in weights:
            if len(tensor.shape) == 1:
                values = dequantize(tensor.data, tensor.format).reshape(-1)
                model.set_vector(name, values + np.float32(offsets.get(name, 0.0)))
                continue
            rows, cols = tensor.shape
            model.allocate_matrix(name, int(tensor.format), rows, cols)
            step = max(1, _PACKED_AT_ONCE // (_PANEL_ROWS * tensor.data.shape[1])) * _PANEL_ROWS
            for first in range(0, len(tensor.data), step):
                if not model.pack_rows(name, part := tensor.data[first : first + step]):
                    raise not_finite(name, tensor)
                if release is not None:
                    release(part)
        model.finish()


def _range_hint(kv_cache_dtype: str) -> str:
    if kv_cache_dtype in ("f32", "bf16"):
        return ""
    return f"; keys and values may have left the range of {kv_cache_dtype}: try kv_cache_dtype='bf16'"


def _native_spec(spec: ModelSpec) -> dict[str, object]:
    groups = kv_groups(spec)
    group_of_layer = {layer: number for number, group in enumerate(groups) for layer in group.layers}
    ropes = list(dict.fromkeys(layer.attention.rope for layer in spec.layers))
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "embedding_scale": spec.embedding_scale,
        "final_norm_eps": spec.final_norm.eps,
        "ropes": [{"inv_freq": rope.inv_freq, "attention_factor": rope.attention_factor} for rope in ropes],
        "kv_windows": [group.sliding_window or 0 for group in groups],
        "layers": [
            {**_native_layer(layer, ropes.index(layer.attention.rope)), "kv_group": group_of_layer[index]}
            for index, layer in enumerate(spec.layers)
        ],
        "shapes": tensor_shapes(spec),
    }


def _native_layer(layer: LayerSpec, rope: int) -> dict[str, object]:
    attention = layer.attention
    return {
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "scale": attention.scale,
        "sliding_window": attention.sliding_window or 0,
        "rope": rope,
        "activation": layer.mlp.activation,
        "attention_norm_eps": layer.attention_norm.eps,
        "qk_norm_eps": _eps(attention.qk_norm),
        "post_attention_norm_eps": _eps(layer.post_attention_norm),
        "mlp_norm_eps": layer.mlp_norm.eps,
        "post_mlp_norm_eps": _eps(layer.post_mlp_norm),
    }


def _eps(norm: NormSpec | None) -> float:
    return 0.0 if norm is None else norm.eps


def _norm_offsets(spec: ModelSpec) -> dict[str, float]:
    """What is added to each norm's weights, by tensor name."""
    norms: dict[str, NormSpec | None] = {"final_norm.weight": spec.final_norm}
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}"
        norms[f"{prefix}.attention_norm.weight"] = layer.attention_norm
        norms[f"{prefix}.attention.q_norm.weight"] = layer.attention.qk_norm
        norms[f"{prefix}.attention.k_norm.weight"] = layer.attention.qk_norm
        norms[f"{prefix}.post_attention_norm.weight"] = layer.post_attention_norm
        norms[f"{prefix}.mlp_norm.weight"] = layer.mlp_norm
        norms[f"{prefix}.post_mlp_norm.weight"] = layer.post_mlp_norm
    return {name: norm.weight_offset for name, norm in norms.items() if norm is not None}
