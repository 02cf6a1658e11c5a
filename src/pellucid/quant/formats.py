"""Block formats of GGUF: what a tensor's bytes mean, as bit-exact numpy codecs.

The layouts and the arithmetic are those of ggml (ggml-common.h, ggml-quants.c); `gguf.quants` is the test oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.quant import blocks, k_blocks

# Elements decoded or encoded at once: temporaries stay in the cache and far below the size of a tensor.
_CHUNK_ELEMENTS = 1 << 17

_EXPONENT_F16 = np.uint16(0x7C00)


class BlockFormat(IntEnum):
    """GGUF tensor types; the value is the type's number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Elements in a block; a row is a whole number of blocks."""
        return _CODECS[self].block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of an encoded block."""
        return _CODECS[self].layout.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


@dataclass(frozen=True, slots=True)
class _Codec:
    """One format.

    Attributes:
        layout: structured dtype of a block; the fields `d`, `m` and `dmin` are float16 scales.
        block_size: elements in a block.
        decode: blocks [n] of `layout` -> float32 [n, block_size].
        encode: float32 [n, block_size] -> blocks [n] of `layout`.
    """

    layout: np.dtype[Any]
    block_size: int
    decode: Callable[[NDArray[Any]], NDArray[np.float32]]
    encode: Callable[[NDArray[np.float32]], NDArray[Any]]


_CODECS = {
    BlockFormat.F32: _Codec(blocks.F32, 1, blocks.decode_f32, blocks.encode_f32),
    BlockFormat.F16: _Codec(blocks.F16, 1, blocks.decode_f16, blocks.encode_f16),
    BlockFormat.BF16: _Codec(blocks.BF16, 1, blocks.decode_bf16, blocks.encode_bf16),
    BlockFormat.Q4_0: _Codec(blocks.Q4_0, 32, blocks.decode_q4_0, blocks.encode_q4_0),
    BlockFormat.Q4_1: _Codec(blocks.Q4_1, 32, blocks.decode_q4_1, blocks.encode_q4_1),
    BlockFormat.Q5_0: _Codec(blocks.Q5_0, 32, blocks.decode_q5_0, blocks.encode_q5_0),
    BlockFormat.Q5_1: _Codec(blocks.Q5_1, 32, blocks.decode_q5_1, blocks.encode_q5_1),
    BlockFormat.Q8_0: _Codec(blocks.Q8_0, 32, blocks.decode_q8_0, blocks.encode_q8_0),
    BlockFormat.Q4_K: _Codec(k_blocks.Q4_K, 256, k_blocks.decode_q4_k, k_blocks.encode_q4_k),
    BlockFormat.Q5_K: _Codec(k_blocks.Q5_K, 256, k_blocks.decode_q5_k, k_blocks.encode_q5_k),
    BlockFormat.Q6_K: _Codec(k_blocks.Q6_K, 256, k_blocks.decode_q6_k, k_blocks.encode_q6_k),
}


def row_bytes(format: BlockFormat, num_elements: int) -> int:
    """Bytes of an encoded row of `num_elements`.

    Raises:
        InvalidRequestError: `num_elements` is not a whole number of blocks.
    """
    block_count, rest = divmod(num_elements, format.block_size)
    if rest or num_elements < 0:
        raise InvalidRequestError(
            f"a row of {num_elements} elements is not a whole number of {format.name} blocks of {format.block_size}"
        )
    return block_count * format.block_bytes


def dequantize(data: NDArray[np.uint8], format: BlockFormat) -> NDArray[np.float32]:
    """Decodes rows, bit-exact with ggml's reference implementation.

    Args:
        data: uint8 [..., row_bytes].

    Returns:
        float32 [..., n]; beside it only a small chunk of temporaries is allocated.

    Raises:
        InvalidRequestError: the last axis is not a whole number of blocks.
    """
    codec = _CODECS[format]
    encoded = _blocks_of(data, format)
    decoded = np.empty((encoded.size, codec.block_size), np.float32)
    with np.errstate(invalid="ignore"):  # a block with an infinite or NaN scale decodes to what IEEE 754 makes of it
        for chunk in _chunks(encoded.size, codec.block_size):
            decoded[chunk] = codec.decode(encoded[chunk])
    return decoded.reshape(*data.shape[:-1], data.shape[-1] // codec.layout.itemsize * codec.block_size)


def quantize(x: NDArray[np.float32], format: BlockFormat) -> NDArray[np.uint8]:
    """Encodes rows, bit-exact with `gguf.quants` where that implements the format (all but the K formats).

    Args:
        x: float32 [..., n].

    Returns:
        uint8 [..., row_bytes].

    Raises:
        InvalidRequestError: n is not a whole number of blocks; or, in a format with block scales, a value is not finite
            or too large for a float16 scale.
    """
    codec = _CODECS[format]
    x = np.ascontiguousarray(x, np.float32)
    width = row_bytes(format, x.shape[-1])
    values = x.reshape(-1, codec.block_size)
    encoded = np.empty(len(values), codec.layout)
    for chunk in _chunks(len(values), codec.block_size):
        if codec.block_size > 1 and not np.isfinite(values[chunk]).all():
            raise InvalidRequestError(f"{format.name} cannot hold NaN or infinity")
        with np.errstate(over="ignore", invalid="ignore"):
            encoded[chunk] = codec.encode(values[chunk])
    data = encoded.view(np.uint8).reshape(*x.shape[:-1], width)
    if codec.block_size > 1 and not is_finite(data, format):
        raise InvalidRequestError(f"a block is too large for {format.name}: its scale does not fit in a float16")
    return data


def is_finite(data: NDArray[np.uint8], format: BlockFormat) -> bool:
    """Whether every decoded value is finite. Reads only the scales of a block format: no finite scale overflows.

    Args:
        data: uint8 [..., row_bytes].
    """
    encoded = _blocks_of(data, format)
    names = encoded.dtype.names or ()
    scales = [name for name in ("d", "m", "dmin") if name in names]
    for chunk in _chunks(encoded.size, format.block_size):
        part = encoded[chunk]
        if not scales:
            if not np.isfinite(_CODECS[format].decode(part)).all():
                return False
            continue
        for name in scales:
            if ((part[name].view(np.uint16) & _EXPONENT_F16) == _EXPONENT_F16).any():
                return False
    return True


def _blocks_of(data: NDArray[np.uint8], format: BlockFormat) -> NDArray[Any]:
    layout = _CODECS[format].layout
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % layout.itemsize:
        raise InvalidRequestError(
            f"{format.name} needs uint8 rows of whole {layout.itemsize}-byte blocks, found {data.dtype} {data.shape}"
        )
    return np.ascontiguousarray(data).reshape(-1).view(layout)


def _chunks(num_blocks: int, block_size: int) -> list[slice]:
    step = _CHUNK_ELEMENTS // block_size
    return [slice(start, start + step) for start in range(0, num_blocks, step)]
