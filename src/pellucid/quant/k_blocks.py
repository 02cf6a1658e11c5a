"""K formats: super-blocks of 256 elements whose sub-blocks have integer scales, themselves scaled by float16 numbers.

Decoding agrees with ggml to the bit. Encoding searches each sub-block's scale (and minimum) for the smallest weighted
squared error over a few roundings, each refined by least squares, as ggml's `make_qkx2_quants` and `make_qx_quants` do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.quant.blocks import Floats, Integers, pack_nibbles, reciprocal, unpack_nibbles

Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
Q6_K = np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])

_MAX_SCALE = 63  # 6 bits
_SINGULAR = np.float32(1e-5)  # a relative determinant below this is rounding noise: every q is the same
_BIT_OF_SUB_BLOCK = np.arange(8, dtype=np.uint8)[:, None]
_CRUMB_OF_QUARTER = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


def decode_q4_k(blocks: NDArray[Any]) -> Floats:
    return _decode_affine(blocks, _low_bits(blocks))


def encode_q4_k(x: Floats) -> NDArray[Any]:
    blocks = np.empty(len(x), Q4_K)
    _encode_affine(blocks, x, levels=15)
    return blocks


def decode_q5_k(blocks: NDArray[Any]) -> Floats:
    fifth = (blocks["qh"][:, None, :] >> _BIT_OF_SUB_BLOCK) & np.uint8(1)
    return _decode_affine(blocks, _low_bits(blocks) | (fifth << np.uint8(4)))


def encode_q5_k(x: Floats) -> NDArray[Any]:
    blocks = np.empty(len(x), Q5_K)
    q = _encode_affine(blocks, x, levels=31)
    blocks["qh"] = np.bitwise_or.reduce((q >> np.uint8(4)) << _BIT_OF_SUB_BLOCK, axis=1)
    return blocks


def decode_q6_k(blocks: NDArray[Any]) -> Floats:
    low = unpack_nibbles(blocks["ql"]).reshape(-1, 2, 4, 32)
    high = (blocks["qh"][:, :, None, :] >> _CRUMB_OF_QUARTER) & np.uint8(3)
    q = (low | (high << np.uint8(4))).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scale = blocks["d"].astype(np.float32)[:, None] * blocks["scales"].astype(np.float32)
    return (scale[:, :, None] * q).reshape(-1, 256)


def encode_q6_k(x: Floats) -> NDArray[Any]:
    sub_blocks = x.reshape(-1, 16, 16)
    scale = _fit_symmetric(sub_blocks)
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1)[:, None], axis=-1)
    blocks = np.empty(len(x), Q6_K)
    blocks["d"] = (extreme / np.float32(-128))[:, 0]
    d = blocks["d"].astype(np.float32)[:, None]
    blocks["scales"] = np.clip(np.rint(scale * reciprocal(d)), -128, 127)
    step = d * blocks["scales"].astype(np.float32)
    signed = np.clip(np.rint(sub_blocks * reciprocal(step)[:, :, None]), -32, 31)
    q = (signed + np.float32(32)).astype(np.uint8).reshape(-1, 2, 4, 32)
    blocks["ql"] = pack_nibbles(q.reshape(-1, 2, 128))
    blocks["qh"] = np.bitwise_or.reduce((q >> np.uint8(4)) << _CRUMB_OF_QUARTER, axis=2)
    return blocks


def _low_bits(blocks: NDArray[Any]) -> Integers:
    """[n, 8, 32]: byte row g holds sub-block 2 g in its low nibbles and sub-block 2 g + 1 in its high ones."""
    return unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32)


def _decode_affine(blocks: NDArray[Any], q: Integers) -> Floats:
    scales, minima = _unpack_scales(blocks["scales"])
    step = blocks["d"].astype(np.float32)[:, None] * scales.astype(np.float32)
    offset = blocks["dmin"].astype(np.float32)[:, None] * minima.astype(np.float32)
    return (step[:, :, None] * q.astype(np.float32) - offset[:, :, None]).reshape(-1, 256)


def _encode_affine(blocks: NDArray[Any], x: Floats, levels: int) -> Integers:
    """Fills d, dmin, scales and the low four bits; returns q [n, 8, 32]."""
    sub_blocks = x.reshape(-1, 8, 32)
    scale, minimum = _fit_affine(sub_blocks, levels)
    blocks["d"] = scale.max(axis=-1) / np.float32(_MAX_SCALE)
    blocks["dmin"] = minimum.max(axis=-1) / np.float32(_MAX_SCALE)
    d = blocks["d"].astype(np.float32)[:, None]
    dmin = blocks["dmin"].astype(np.float32)[:, None]
    scales = np.clip(np.rint(scale * reciprocal(d)), 0, _MAX_SCALE)
    minima = np.clip(np.rint(minimum * reciprocal(dmin)), 0, _MAX_SCALE)
    step = reciprocal(d * scales)[:, :, None]
    q: Integers = np.clip(np.rint((sub_blocks + (dmin * minima)[:, :, None]) * step), 0, levels).astype(np.uint8)
    blocks["scales"] = _pack_scales(scales.astype(np.uint8), minima.astype(np.uint8))
    blocks["qs"] = pack_nibbles(q.reshape(-1, 4, 64))
    return q


def _unpack_scales(packed: Integers) -> tuple[Integers, Integers]:
    """[n, 12] -> 6-bit scales [n, 8] and minima [n, 8].

    Bytes 0-3 and 4-7 hold the first four scales and minima; their two top bits, with the nibbles of bytes 8-11, make
    the last four.
    """
    first, second, nibbles = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    top = np.uint8(0x30)
    scales = [first & np.uint8(0x3F), (nibbles & np.uint8(0x0F)) | ((first >> np.uint8(2)) & top)]
    minima = [second & np.uint8(0x3F), (nibbles >> np.uint8(4)) | ((second >> np.uint8(2)) & top)]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _pack_scales(scales: Integers, minima: Integers) -> Integers:
    """The inverse of `_unpack_scales`."""
    top = np.uint8(0x30)
    first = scales[:, :4] | ((scales[:, 4:] & top) << np.uint8(2))
    second = minima[:, :4] | ((minima[:, 4:] & top) << np.uint8(2))
    nibbles = (scales[:, 4:] & np.uint8(0x0F)) | (minima[:, 4:] << np.uint8(4))
    return np.concatenate([first, second, nibbles], axis=-1)


def _fit_affine(x: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and minimum, both >= 0 and [...], with x [..., n] ~ scale q - minimum, q in [0, levels]."""
    weight = np.sqrt(np.square(x).mean(axis=-1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    width = x.max(axis=-1, keepdims=True) - low
    position = (x - low) * reciprocal(width)
    sum_w = weight.sum(axis=-1)
    sum_x = (weight * x).sum(axis=-1)

    def squared_error(q: Floats, scale: Floats, offset: Floats) -> Floats:
        error: Floats = (weight * np.square(scale[..., None] * q + offset[..., None] - x)).sum(axis=-1)
        return error

    best_scale, best_offset = (width / np.float32(levels))[..., 0], low[..., 0]
    best_error = squared_error(np.rint(position * np.float32(levels)), best_scale, best_offset)
    for stretch in np.arange(-1, 1.01, 0.1, dtype=np.float32):
        q = np.clip(np.rint(position * (np.float32(levels) + stretch)), 0, levels)
        sum_q = (weight * q).sum(axis=-1)
        sum_qq = (weight * q * q).sum(axis=-1)
        sum_qx = (weight * q * x).sum(axis=-1)
        determinant = sum_w * sum_qq - sum_q * sum_q
        inverse = reciprocal(determinant)
        scale = (sum_w * sum_qx - sum_x * sum_q) * inverse
        offset = (sum_qq * sum_x - sum_q * sum_qx) * inverse
        # An offset above zero cannot be stored: fit the scale alone.
        scale = np.where(offset > 0, sum_qx * reciprocal(sum_qq), scale)
        offset = np.minimum(offset, 0)
        error = squared_error(q, scale, offset)
        better = (error < best_error) & (determinant > _SINGULAR * sum_w * sum_qq) & (scale >= 0)
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_offset = np.where(better, offset, best_offset)
    return best_scale, -best_offset


def _fit_symmetric(x: Floats) -> Floats:
    """Signed scale [...] with x [..., n] ~ scale q, q in [-32, 31]; errors weigh with x^2."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    unit = x * reciprocal(extreme)  # squares of x itself could overflow
    weight = np.square(unit)
    best_scale = np.zeros(x.shape[:-1], np.float32)
    best_gain = np.zeros(x.shape[:-1], np.float32)
    for stretch in np.arange(-0.9, 0.91, 0.1, dtype=np.float32):
        q = np.clip(np.rint(unit * -(np.float32(32) + stretch)), -32, 31)
        sum_qx = (weight * q * unit).sum(axis=-1)
        scale = sum_qx * reciprocal((weight * q * q).sum(axis=-1))
        gain = scale * sum_qx
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, scale, best_scale)
    return best_scale * extreme[..., 0]
