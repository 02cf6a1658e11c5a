"""Float formats, and the 32-element block formats: a float16 scale `d`, for some a minimum `m`, and packed integers.

Each decoder maps blocks [n] of its layout to float32 [n, block size], each encoder back. Rounding follows ggml step by
step, so that both directions agree with it to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.uint8]

F32 = np.dtype("<f4")
F16 = np.dtype("<f2")
BF16 = np.dtype("<u2")
Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


def decode_f32(blocks: NDArray[Any]) -> Floats:
    return blocks.reshape(-1, 1)


def encode_f32(x: Floats) -> NDArray[Any]:
    return x[:, 0]


def decode_f16(blocks: NDArray[Any]) -> Floats:
    return blocks.astype(np.float32).reshape(-1, 1)


def encode_f16(x: Floats) -> NDArray[Any]:
    return x[:, 0].astype(F16)


def decode_bf16(blocks: NDArray[Any]) -> Floats:
    return (blocks.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(-1, 1)


def encode_bf16(x: Floats) -> NDArray[Any]:
    """Rounds to nearest even; a NaN stays a NaN, made quiet."""
    bits = np.ascontiguousarray(x[:, 0]).view(np.uint32)
    high = bits >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = (bits + (np.uint32(0x7FFF) + (high & np.uint32(1)))) >> np.uint32(16)
    return np.where(is_nan, high | np.uint32(0x40), rounded).astype(BF16)


def decode_q4_0(blocks: NDArray[Any]) -> Floats:
    return _scale(blocks) * (unpack_nibbles(blocks["qs"]).astype(np.float32) - np.float32(8))


def encode_q4_0(x: Floats) -> NDArray[Any]:
    d, q = _quantize_symmetric(x, half_range=8)
    blocks = np.empty(len(x), Q4_0)
    blocks["d"] = d
    blocks["qs"] = pack_nibbles(q)
    return blocks


def decode_q4_1(blocks: NDArray[Any]) -> Floats:
    return _scale(blocks) * unpack_nibbles(blocks["qs"]).astype(np.float32) + _minimum(blocks)


def encode_q4_1(x: Floats) -> NDArray[Any]:
    d, m, q = _quantize_affine(x, levels=15)
    blocks = np.empty(len(x), Q4_1)
    blocks["d"] = d
    blocks["m"] = m
    blocks["qs"] = pack_nibbles(q)
    return blocks


def decode_q5_0(blocks: NDArray[Any]) -> Floats:
    return _scale(blocks) * (_unpack_5_bit(blocks).astype(np.float32) - np.float32(16))


def encode_q5_0(x: Floats) -> NDArray[Any]:
    d, q = _quantize_symmetric(x, half_range=16)
    blocks = np.empty(len(x), Q5_0)
    blocks["d"] = d
    _pack_5_bit(blocks, q)
    return blocks


def decode_q5_1(blocks: NDArray[Any]) -> Floats:
    return _scale(blocks) * _unpack_5_bit(blocks).astype(np.float32) + _minimum(blocks)


def encode_q5_1(x: Floats) -> NDArray[Any]:
    d, m, q = _quantize_affine(x, levels=31)
    blocks = np.empty(len(x), Q5_1)
    blocks["d"] = d
    blocks["m"] = m
    _pack_5_bit(blocks, q)
    return blocks


def decode_q8_0(blocks: NDArray[Any]) -> Floats:
    return _scale(blocks) * blocks["qs"].astype(np.float32)


def encode_q8_0(x: Floats) -> NDArray[Any]:
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * reciprocal(d)
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    blocks = np.empty(len(x), Q8_0)
    blocks["d"] = d[:, 0]
    # Half away from zero, C's roundf.
    blocks["qs"] = np.copysign(floor + (magnitude - floor >= np.float32(0.5)), scaled)
    return blocks


def unpack_nibbles(packed: Integers) -> Integers:
    """[..., n] -> [..., 2 n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=-1)


def pack_nibbles(q: Integers) -> Integers:
    """[..., 2 n] -> [..., n]: the inverse of `unpack_nibbles`; bits above the fourth are dropped."""
    half = q.shape[-1] // 2
    return (q[..., :half] & np.uint8(0x0F)) | (q[..., half:] << np.uint8(4))


def reciprocal(d: Floats) -> Floats:
    """1 / d, and 0 where that is not finite: such a d is zero as a float16, so the integers it scales do not matter."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _scale(blocks: NDArray[Any]) -> Floats:
    return blocks["d"].astype(np.float32)[:, None]


def _minimum(blocks: NDArray[Any]) -> Floats:
    return blocks["m"].astype(np.float32)[:, None]


def _unpack_5_bit(blocks: NDArray[Any]) -> Integers:
    fifth = np.unpackbits(blocks["qh"], axis=-1, bitorder="little")
    return unpack_nibbles(blocks["qs"]) | (fifth << np.uint8(4))


def _pack_5_bit(blocks: NDArray[Any], q: Integers) -> None:
    blocks["qh"] = np.packbits(q >> np.uint8(4), axis=-1, bitorder="little")
    blocks["qs"] = pack_nibbles(q)


def _quantize_symmetric(x: Floats, half_range: int) -> tuple[Floats, Integers]:
    """d [n] and q in [0, 2 half_range) with x ~ d (q - half_range); the element of largest magnitude becomes q = 0."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[:, None], axis=-1)
    d = extreme / np.float32(-half_range)
    q = np.trunc(x * reciprocal(d) + np.float32(half_range + 0.5))
    return d[:, 0], np.minimum(q, np.float32(2 * half_range - 1)).astype(np.uint8)


def _quantize_affine(x: Floats, levels: int) -> tuple[Floats, Floats, Integers]:
    """d [n], m [n] and q in [0, levels] with x ~ d q + m."""
    m = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - m) / np.float32(levels)
    q = np.trunc((x - m) * reciprocal(d) + np.float32(0.5))
    return d[:, 0], m[:, 0], np.minimum(q, np.float32(levels)).astype(np.uint8)
