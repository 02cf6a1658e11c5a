"""Keys and values in blocks of 64 tokens, each of the layers of one KV group."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import BackendError, CapacityError, InvalidRequestError
from pellucid.estimate.memory import KV_FORMATS, kv_bytes_per_block, kv_head_bytes
from pellucid.models.kv_groups import kv_groups
from pellucid.models.spec import ModelSpec
from pellucid.quant.formats import dequantize, quantize


class KVCache:
    """Paged keys and values; blocks are named by the engine's block tables.

    Args:
        spec: the model.
        dtype: what is stored, a key of `estimate.memory.KV_FORMATS`.

    Raises:
        InvalidRequestError: another `dtype`, or one that the model's heads do not fit.
    """

    def __init__(self, spec: ModelSpec, dtype: str) -> None:
        self.bytes_per_block = kv_bytes_per_block(spec, dtype)
        self._dtype = dtype
        self._format = KV_FORMATS[dtype]
        self._spec = spec
        self._blocks = np.zeros((0, self.bytes_per_block), np.uint8)
        self._layers: list[NDArray[np.uint8]] = []  # of every block, what a layer would find there

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def allocate(self, num_blocks: int) -> None:
        """Make room for `num_blocks` blocks, dropping what was there.

        Raises:
            CapacityError: the memory is not to be had.
        """
        self._layers = []
        self._blocks = self._blocks[:0].copy()
        try:
            self._blocks = np.zeros((num_blocks, self.bytes_per_block), np.uint8)
        except (MemoryError, ValueError):  # ValueError: more bytes than an array can have
            raise CapacityError(
                f"no memory for {num_blocks} KV blocks of {self.bytes_per_block} bytes; ask for fewer",
                param="num_blocks",
            ) from None
        self._layers = [self._blocks[:, part].reshape(num_blocks, *shape) for part, shape in self._block_parts()]

    def copy(self, pairs: NDArray[np.int32]) -> None:
        """Copy blocks (source, destination), int32 [n, 2], one after the other."""
        for source, destination in pairs.tolist():
            self._blocks[destination] = self._blocks[source]

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        """uint8 [n, bytes_per_block] of `blocks`, int32 [n]."""
        for block in blocks.tolist():
            self._require_block(block)
        return self._blocks[blocks]

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Put back what `read_blocks` gave."""
        for block in blocks.tolist():
            self._require_block(block)
        if data.dtype != np.uint8 or data.shape != (len(blocks), self.bytes_per_block):
            raise BackendError(
                f"{len(blocks)} KV blocks take uint8 [{len(blocks)}, {self.bytes_per_block}], "
                f"not {data.dtype} {list(data.shape)}"
            )
        self._blocks[blocks] = data

    def write(self, layer: int, block: int, offset: int, key: NDArray[np.float32], value: NDArray[np.float32]) -> None:
        """Store one token's `key` and `value`, float32 [num_key_value_heads, head_dim], at `offset` of `block`.

        Raises:
            BackendError: a value is not finite, or too large, in a dtype with scales; others store it as infinity.
        """
        stored = self._block(layer, block)
        try:
            stored[0, :, offset] = quantize(key, self._format)
            stored[1, :, offset] = quantize(value, self._format)
        except InvalidRequestError as error:
            raise BackendError(
                f"keys or values of layer {layer} are not finite or too large for {self._dtype}: "
                "try kv_cache_dtype='bf16'"
            ) from error

    def read(self, layer: int, block: int, tokens: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of the tokens `tokens` of `block`, float32 [num_key_value_heads, n, head_dim] each."""
        keys, values = dequantize(self._block(layer, block)[:, :, tokens], self._format)
        return keys, values

    def _block(self, layer: int, block: int) -> NDArray[np.uint8]:
        self._require_block(block)
        stored: NDArray[np.uint8] = self._layers[layer][block]
        return stored

    def _require_block(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise BackendError(f"KV block {block} was named, but {self.num_blocks} are allocated")

    def _block_parts(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Where each layer's part of a block lies, in bytes, and its shape: [2 (key, value), num_key_value_heads, 64,
        bytes of a head]."""
        parts: dict[int, tuple[slice, tuple[int, ...]]] = {}
        for group in kv_groups(self._spec):
            begin = 0
            for layer in group.layers:
                attention = self._spec.layers[layer].attention
                head_bytes = kv_head_bytes(attention.head_dim, self._dtype)
                shape = (2, attention.num_key_value_heads, BLOCK_SIZE, head_bytes)
                parts[layer] = slice(begin, begin + math.prod(shape)), shape
                begin += math.prod(shape)
        return [parts[layer] for layer in range(len(self._spec.layers))]
