"""Packed weights and the matmul kernels against the numpy codecs, float64 products and each other."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.quant.formats import BlockFormat, dequantize, quantize

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

ISAS: list[str] = native.instruction_sets()
FLOATS = (BlockFormat.F32, BlockFormat.F16, BlockFormat.BF16)
QUANTIZED = tuple(format for format in BlockFormat if format not in FLOATS)


def encoded(format: BlockFormat, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(0, 1, (rows, cols)).astype(np.float32)
    return quantize(weights, format).reshape(rows, -1)


def inputs(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (rows, cols)) * rng.choice([1e-3, 1.0, 40.0], (rows, 1))).astype(np.float32)


def quantized_inputs(x: np.ndarray) -> np.ndarray:
    """What the int8 form of `x` stands for (native/quant), in float64."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    levels = np.rint(blocks * (np.float32(127) / largest))
    return (levels.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def outlying_inputs(rows: int, cols: int, seed: int = 5) -> np.ndarray:
    """Inputs of which some blocks, not the same in every row, have far larger values than the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (rows, cols // 32, 32)) * rng.choice([1, 30], (rows, cols // 32, 1), p=[0.9, 0.1])
    return x.reshape(rows, cols).astype(np.float32)


def refined_inputs(x: np.ndarray) -> np.ndarray:
    """What the refined int8 form of `x` stands for (native/include/activation_buffer.h), in float64."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = largest / np.float32(127)
    levels = np.rint(blocks * (np.float32(127) / largest)).astype(np.float64)
    low = np.clip(np.rint((blocks - levels * scale) * (256 / scale.astype(np.float64))), -127, 127)
    refined = scale.astype(np.float64) ** 2 > 2 * (scale.astype(np.float64) ** 2).mean(1, keepdims=True)
    return ((levels + np.where(refined, low / 256, 0)) * scale).reshape(x.shape)


@pytest.mark.parametrize("format", list(BlockFormat))
@pytest.mark.parametrize("rows", [1, 15, 16, 37])
def test_packing_loses_nothing(format: BlockFormat, rows: int) -> None:
    cols = 2 * max(format.block_size, 32)
    data = encoded(format, rows, cols)
    assert np.array_equal(native.unpack(data, int(format), cols), dequantize(data, format).reshape(rows, cols))


@pytest.mark.parametrize("format", list(BlockFormat))
def test_random_bytes_unpack_as_the_codec_decodes_them(format: BlockFormat) -> None:
    rows, cols = 19, 2 * max(format.block_size, 32)
    data = np.random.default_rng(3).integers(0, 256, encoded(format, rows, cols).shape, dtype=np.uint8)
    wanted = dequantize(data, format).reshape(rows, cols)
    if not np.isfinite(wanted).all():
        data &= 0xBF  # exponents of the 16-bit scales stay below their largest
        wanted = dequantize(data, format).reshape(rows, cols)
    assert np.array_equal(native.unpack(data, int(format), cols), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", QUANTIZED)
def test_products_against_float64(format: BlockFormat, isa: str) -> None:
    rows, cols = 37, 512
    data, x = encoded(format, rows, cols), inputs(21, cols)
    weights = dequantize(data, format).reshape(rows, cols).astype(np.float64)
    levels = quantized_inputs(x)
    wanted = levels @ weights.T
    scale = np.abs(levels) @ np.abs(weights).T
    assert np.abs(native.matmul(data, int(format), x, isa) - wanted).max() <= (4e-7 * scale).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", QUANTIZED)
def test_refined_products_against_float64(format: BlockFormat, isa: str) -> None:
    rows, cols = 37, 1024
    data, x = encoded(format, rows, cols), outlying_inputs(37, cols)
    weights = dequantize(data, format).reshape(rows, cols).astype(np.float64)
    levels = refined_inputs(x)
    scale = np.abs(levels) @ np.abs(weights).T
    bound = (4e-7 * scale).max()
    assert np.abs(native.matmul(data, int(format), x, isa, refined=True) - levels @ weights.T).max() <= bound
    # The mutant: without the second bytes the same bound is missed by far.
    assert np.abs(native.matmul(data, int(format), x, isa) - levels @ weights.T).max() > 10 * bound


@pytest.mark.parametrize("isa", ISAS)
def test_a_refined_row_leaves_its_neighbours_alone(isa: str) -> None:
    """Rows with second bytes and rows without, in one tile."""
    data = encoded(BlockFormat.Q4_1, 37, 512)
    even = inputs(16, 512)
    mixed = even.copy()
    mixed[::2] = outlying_inputs(8, 512)
    found = native.matmul(data, int(BlockFormat.Q4_1), mixed, isa, refined=True)
    wanted = native.matmul(data, int(BlockFormat.Q4_1), even, isa, refined=True)
    assert np.array_equal(found[1::2], wanted[1::2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FLOATS)
def test_float_products_against_float64(format: BlockFormat, isa: str) -> None:
    rows, cols = 37, 70
    data, x = encoded(format, rows, cols), inputs(21, cols)
    weights = dequantize(data, format).reshape(rows, cols).astype(np.float64)
    scale = np.abs(x) @ np.abs(weights).T
    assert np.abs(native.matmul(data, int(format), x, isa) - x @ weights.T).max() <= (2e-6 * scale).max()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
@pytest.mark.parametrize("format", list(BlockFormat))
def test_vector_instruction_sets_agree_to_the_bit(format: BlockFormat, isa: str) -> None:
    data, x = encoded(format, 53, 512), outlying_inputs(35, 512)
    for refined in (False, True):
        found, wanted = (native.matmul(data, int(format), x, each, refined=refined) for each in (isa, "avx2"))
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", list(BlockFormat))
def test_a_row_does_not_depend_on_its_neighbours(format: BlockFormat, isa: str) -> None:
    data = encoded(format, 37, 512)
    for refined, x in ((False, inputs(50, 512)), (True, outlying_inputs(50, 512))):
        together = native.matmul(data, int(format), x, isa, refined=refined)
        for size in (1, 2, 3, 7, 16, 17):
            parts = [
                native.matmul(data, int(format), x[i : i + size], isa, i, refined=refined)
                for i in range(0, len(x), size)
            ]
            assert np.array_equal(np.concatenate(parts), together), size


def test_equality_notices_another_order_of_summation() -> None:
    """The mutant: the same products folded over K in two halves, as a split over K by threads would."""
    data, x = encoded(BlockFormat.Q4_1, 37, 1024), inputs(8, 1024)
    halves = np.split(data.reshape(37, -1), 2, axis=1)
    split = sum(
        native.matmul(np.ascontiguousarray(half), int(BlockFormat.Q4_1), np.ascontiguousarray(part))
        for half, part in zip(halves, np.split(x, 2, axis=1), strict=True)
    )
    whole = native.matmul(data, int(BlockFormat.Q4_1), x)
    np.testing.assert_allclose(split, whole, rtol=1e-3, atol=1e-2)
    assert not np.array_equal(split, whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", [0, 255])
def test_extreme_bytes_do_not_saturate(isa: str, level: int) -> None:
    """All weights at either end of their range and all activations at +-127: the largest sums there are."""
    for format in QUANTIZED:
        rows, cols = 16, 512
        data = encoded(format, rows, cols)
        quants = {"Q4_0": (2, 18), "Q4_1": (4, 20), "Q5_0": (2, 22), "Q5_1": (4, 24), "Q8_0": (2, 34)}.get(format.name)
        if quants is None:
            quants = {"Q4_K": (16, 144), "Q5_K": (16, 176), "Q6_K": (0, 192)}[format.name]
        blocks = data.reshape(rows, -1, format.block_bytes)
        blocks[..., quants[0] : quants[1]] = level
        weights = dequantize(data, format).reshape(rows, cols).astype(np.float64)
        x = np.ones((17, cols), np.float32)
        x[1::2] = -1
        wanted = x.astype(np.float64) @ weights.T
        scale = np.abs(x) @ np.abs(weights).T
        assert (np.abs(native.matmul(data, int(format), x, isa) - wanted) <= 1e-6 * scale).all(), format


@pytest.mark.parametrize("format", list(BlockFormat))
def test_weights_that_are_not_finite_are_refused(format: BlockFormat) -> None:
    data = encoded(format, 20, 512)
    where = 208 if format is BlockFormat.Q6_K else 0
    bad = (
        np.array([np.nan], np.float32).view(np.uint8) if format is BlockFormat.F32 else np.array([0xFF, 0x7F], np.uint8)
    )
    data[19, where : where + bad.size] = bad
    with pytest.raises(ValueError, match="not finite"):
        native.unpack(data, int(format), 512)


def test_bad_arguments() -> None:
    data = encoded(BlockFormat.Q4_1, 4, 64)
    with pytest.raises(ValueError, match="not supported"):
        native.unpack(data, 10, 64)
    with pytest.raises(ValueError, match="size of its shape"):
        native.unpack(data, int(BlockFormat.Q4_1), 96)
    with pytest.raises(ValueError, match="size of its shape"):
        native.unpack(data, int(BlockFormat.Q4_1), 60)
    with pytest.raises(ValueError, match=r"instruction set 'mmx' on this machine; it has .*portable"):
        native.matmul(data, int(BlockFormat.Q4_1), inputs(1, 64), "mmx")
