from __future__ import annotations

import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pellucid.core.errors import InvalidRequestError
from pellucid.quant import formats
from pellucid.quant.blocks import reciprocal
from pellucid.quant.formats import BlockFormat, dequantize, is_finite, quantize, row_bytes

K_FORMATS = (BlockFormat.Q4_K, BlockFormat.Q5_K, BlockFormat.Q6_K)
FLOAT_FORMATS = (BlockFormat.F32, BlockFormat.F16, BlockFormat.BF16)
SCALED_FORMATS = tuple(format for format in BlockFormat if format not in FLOAT_FORMATS)

# Root-mean-square error relative to a normal distribution's deviation; ggml's own quantizers reach 0.0713, 0.0361 and
# 0.0177 with the same rows.
K_ERROR = {BlockFormat.Q4_K: 0.073, BlockFormat.Q5_K: 0.037, BlockFormat.Q6_K: 0.018}


def oracle(format: BlockFormat) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(format))


def oracle_dequantize(data: np.ndarray, format: BlockFormat) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, oracle(format))


def random_rows(rng: np.random.Generator, format: BlockFormat, rows: int = 37, columns: int = 1024) -> np.ndarray:
    """Every bit pattern, NaN and infinite scales included."""
    return rng.integers(0, 256, (rows, row_bytes(format, columns)), np.uint8)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        return False
    return np.array_equal(np.nan_to_num(a).view(np.uint32), np.nan_to_num(b).view(np.uint32))


def relative_error(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.square(x - y).mean() / np.square(x).mean()))


@pytest.mark.parametrize("format", BlockFormat)
def test_geometry_is_that_of_ggml(format):
    assert oracle(format).name == format.name
    assert (format.block_size, format.block_bytes) == gguf.GGML_QUANT_SIZES[oracle(format)]
    assert row_bytes(format, 512) == 512 * format.bits_per_weight / 8


@pytest.mark.parametrize("format", BlockFormat)
def test_dequantize_equals_gguf_to_the_bit(format):
    data = random_rows(np.random.default_rng(1), format)
    assert same_bits(dequantize(data, format), oracle_dequantize(data, format))


@pytest.mark.parametrize("format", [BlockFormat.Q4_0, BlockFormat.Q5_K])
def test_a_wrong_nibble_order_is_noticed(format, monkeypatch):
    def swapped(blocks):
        blocks = blocks.copy()
        blocks["qs"] = (blocks["qs"] >> 4) | (blocks["qs"] << 4)
        return decode(blocks)

    codec = formats._CODECS[format]
    decode = codec.decode
    monkeypatch.setitem(formats._CODECS, format, replace(codec, decode=swapped))
    data = random_rows(np.random.default_rng(1), format)
    assert not same_bits(dequantize(data, format), oracle_dequantize(data, format))


@pytest.mark.parametrize("format", [format for format in BlockFormat if format not in K_FORMATS])
def test_quantize_equals_gguf_to_the_bit(format):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((64, 512)) * rng.lognormal(0, 2, (64, 1))).astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2] = np.round(x[2] * 4) / 8  # ties
    x[3] *= 1e-30
    x[4, ::32] = 1000  # one outlier a block
    x[5] = -np.abs(x[5])
    expected = gguf.quants.quantize(x, oracle(format)).view(np.uint8)
    assert np.array_equal(quantize(x, format), expected)


@given(x=arrays.arrays(np.float32, (4, 32), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False)))
@settings(max_examples=60, deadline=None)
def test_quantize_equals_gguf_on_anything(x):
    # Below this a block's scale is zero as a float16 and gguf's integers come from infinity times zero.
    x[np.abs(x) < 1e-30] = 0
    for format in (BlockFormat.Q4_0, BlockFormat.Q4_1, BlockFormat.Q5_0, BlockFormat.Q5_1, BlockFormat.Q8_0):
        with np.errstate(all="ignore"):
            expected = gguf.quants.quantize(x, oracle(format))
        if is_finite(expected, format):
            assert np.array_equal(quantize(x, format), expected), format.name
        else:
            with pytest.raises(InvalidRequestError, match="float16"):
                quantize(x, format)


def test_bf16_rounds_to_even_and_keeps_nan_and_infinity():
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F800001, 0x7F7FFFFF]
    x = np.array([bits], np.uint32).view(np.float32)
    encoded = quantize(x, BlockFormat.BF16).view(np.uint16)[0]
    assert encoded.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7FC0, 0x7F80]


@pytest.mark.parametrize("format", FLOAT_FORMATS)
def test_float_formats_round_trip(format):
    data = quantize(np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32), format)
    assert np.array_equal(quantize(dequantize(data, format), format), data)


@pytest.mark.parametrize("format", K_FORMATS)
def test_k_quantizers_are_as_good_as_those_of_ggml(format):
    x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) * np.float32(0.02)
    assert relative_error(x, dequantize(quantize(x, format), format)) < K_ERROR[format]


@pytest.mark.parametrize("format", K_FORMATS)
def test_k_quantizer_without_the_search_is_noticed(format, monkeypatch):
    """One rounding to the full range, without least squares, misses the bound."""
    from pellucid.quant import k_blocks

    def plain_affine(x, levels):
        low = np.minimum(x.min(axis=-1), 0)
        return (x.max(axis=-1) - low) / np.float32(levels), -low

    monkeypatch.setattr(k_blocks, "_fit_affine", plain_affine)
    monkeypatch.setattr(k_blocks, "_fit_symmetric", lambda x: np.abs(x).max(axis=-1) / np.float32(31))
    x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) * np.float32(0.02)
    assert relative_error(x, dequantize(quantize(x, format), format)) > K_ERROR[format]


@pytest.mark.parametrize("format", SCALED_FORMATS)
def test_quantizing_again_changes_next_to_nothing(format):
    x = np.random.default_rng(4).standard_normal((16, 1024)).astype(np.float32)
    once = dequantize(quantize(x, format), format)
    twice = dequantize(quantize(once, format), format)
    if format in (BlockFormat.Q4_K, BlockFormat.Q5_K):  # the search may find another, equally good grid
        assert relative_error(once, twice) < 0.1 * K_ERROR[format]
    else:
        assert np.array_equal(once, twice)


@pytest.mark.parametrize("format", SCALED_FORMATS)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0, 1e-42])
def test_constant_blocks(format, value):
    x = np.full((2, 256), value, np.float32)
    with np.errstate(all="raise", under="ignore"):
        y = dequantize(quantize(x, format), format)
    assert np.allclose(y, x, rtol=0.04, atol=1e-6)


@pytest.mark.parametrize("format", BlockFormat)
def test_leading_axes_and_chunks_do_not_matter(format, monkeypatch):
    x = np.random.default_rng(5).standard_normal((2, 3, 512)).astype(np.float32)
    data = quantize(x, format)
    assert data.shape == (2, 3, row_bytes(format, 512))
    decoded = dequantize(data, format)
    assert decoded.shape == x.shape
    monkeypatch.setattr(formats, "_CHUNK_ELEMENTS", 256)
    assert np.array_equal(quantize(x, format), data)
    assert np.array_equal(dequantize(data, format), decoded)
    assert np.array_equal(dequantize(data[1, 2], format), decoded[1, 2])


def test_rows_that_are_not_contiguous():
    data = random_rows(np.random.default_rng(6), BlockFormat.Q8_0)
    assert same_bits(dequantize(data[::2], BlockFormat.Q8_0), oracle_dequantize(data[::2].copy(), BlockFormat.Q8_0))


@pytest.mark.parametrize("format", BlockFormat)
def test_empty(format):
    assert dequantize(np.empty((0, format.block_bytes), np.uint8), format).shape == (0, format.block_size)
    assert quantize(np.empty((0, format.block_size), np.float32), format).shape == (0, format.block_bytes)


@pytest.mark.parametrize("format", BlockFormat)
def test_dequantize_needs_little_beside_its_result(format):
    data = random_rows(np.random.default_rng(7), format, rows=1024, columns=4096)
    dequantize(data[:1], format)
    tracemalloc.start()
    try:
        result = dequantize(data, format)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < result.nbytes + (4 << 20)


@pytest.mark.parametrize("format", SCALED_FORMATS)
def test_what_cannot_be_encoded_is_refused(format):
    size = format.block_size
    with pytest.raises(InvalidRequestError, match="whole number"):
        quantize(np.zeros((1, size + 1), np.float32), format)
    with pytest.raises(InvalidRequestError, match="blocks"):
        dequantize(np.zeros((1, format.block_bytes + 1), np.uint8), format)
    for value in (np.nan, np.inf, -np.inf):
        x = np.zeros((1, size), np.float32)
        x[0, 3] = value
        with pytest.raises(InvalidRequestError, match="NaN or infinity"):
            quantize(x, format)
    with pytest.raises(InvalidRequestError, match="float16"):
        quantize(np.full((1, size), -3e38, np.float32), format)


def test_dequantize_refuses_another_dtype():
    with pytest.raises(InvalidRequestError, match="uint8"):
        dequantize(np.zeros((1, 34), np.int8), BlockFormat.Q8_0)


def test_row_bytes_refuses_negative_lengths():
    with pytest.raises(InvalidRequestError):
        row_bytes(BlockFormat.Q8_0, -32)


@pytest.mark.parametrize("format", BlockFormat)
def test_is_finite_agrees_with_the_decoded_values(format):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    assert is_finite(quantize(x, format), format)
    scales = [name for name in ("d", "m", "dmin") if name in (formats._CODECS[format].layout.names or ())]
    for name in scales or [None]:
        for value in (np.inf, -np.inf, np.nan):
            blocks = quantize(x, format).reshape(-1).view(formats._CODECS[format].layout)
            if name is None:
                blocks[-1] = quantize(np.full((1, 1), value, np.float32), format).view(blocks.dtype)[0, 0]
            else:
                blocks[name][-1] = value
            data = blocks.view(np.uint8).reshape(3, -1)
            assert not np.isfinite(oracle_dequantize(data, format)).all()
            assert not is_finite(data, format)


@pytest.mark.parametrize("format", SCALED_FORMATS)
def test_the_largest_finite_scales_decode_to_finite_values(format):
    blocks = np.full(1, 0, formats._CODECS[format].layout)
    blocks.view(np.uint8)[:] = 0xFF
    for name in ("d", "m", "dmin"):
        if name in blocks.dtype.names:
            blocks[name] = np.finfo(np.float16).min if name == "m" else np.finfo(np.float16).max
    data = blocks.view(np.uint8).reshape(1, -1)
    assert is_finite(data, format)
    assert np.isfinite(dequantize(data, format)).all()


def test_reciprocal_has_no_infinity():
    d = np.array([0, -0.0, 1e-45, 2.0], np.float32)
    assert reciprocal(d).tolist() == [0, 0, 0, 0.5]
