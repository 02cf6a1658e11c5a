"""Writes small GGUF files for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pellucid.quant.formats import BlockFormat, quantize
from pellucid.weights.tensor import WeightTensor

_STRING, _ARRAY, _BOOL = 8, 9, 7
_TYPE_OF = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": _BOOL, "u8": 10, "i8": 11, "f8": 12}

# A scalar; a numpy scalar keeps its type; a numpy array; a list of str, int or float.
MetadataValue = object


def encode(x: np.ndarray, format: BlockFormat = BlockFormat.F32) -> WeightTensor:
    """Quantizes float32 [out_features, in_features] or [size] into a tensor to write."""
    x = np.asarray(x, np.float32)
    data = quantize(x, format)
    return WeightTensor(format, x.shape, data.reshape(-1, data.shape[-1]))


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, WeightTensor | np.ndarray] | None = None,
    *,
    version: int = 3,
) -> Path:
    """Writes a file; a plain array becomes an F32 tensor. `general.alignment` in the metadata is honoured.

    Scalars: bool, int (uint32 where it fits, else int64), float (float32), str, or a numpy scalar of the exact type.
    """
    Path(path).write_bytes(gguf_bytes(metadata, tensors, version=version))
    return Path(path)


def gguf_bytes(
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, WeightTensor | np.ndarray] | None = None,
    *,
    version: int = 3,
) -> bytes:
    encoded = {
        name: tensor if isinstance(tensor, WeightTensor) else encode(tensor) for name, tensor in (tensors or {}).items()
    }
    alignment = int(metadata.get("general.alignment", 32))  # type: ignore[call-overload]
    out = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(encoded), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(value)
    offset = 0
    for name, tensor in encoded.items():
        out += _string(name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", tensor.format, offset)
        offset += _padded(tensor.data.nbytes, alignment)
    out += bytes(_padded(len(out), alignment) - len(out))
    for tensor in encoded.values():
        out += tensor.data.tobytes()
        out += bytes(_padded(tensor.data.nbytes, alignment) - tensor.data.nbytes)
    return bytes(out)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: MetadataValue) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, Sequence) and (not value or isinstance(value[0], str)):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray | Sequence):
        array = _typed_array(value)
        return struct.pack("<IIQ", _ARRAY, _TYPE_OF[array.dtype.str[1:]], array.size) + array.tobytes()
    array = _typed_array(value)
    return struct.pack("<I", _TYPE_OF[array.dtype.str[1:]]) + array.tobytes()


def _typed_array(value: object) -> np.ndarray:
    array = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        return array
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype == np.int64:
        is_scalar_u32 = array.ndim == 0 and 0 <= int(array) < 2**32
        return array.astype(np.uint32) if is_scalar_u32 else array.astype(np.int32 if array.ndim else np.int64)
    return array
