from __future__ import annotations

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.families.llama import GGUF_NAMES
from pellucid.models.spec import tensor_shapes
from pellucid.quant.formats import BlockFormat, dequantize
from pellucid.weights.tensor_map import check_tensors, split_interleaved_heads, tensor_sources
from tests.support.gguf_writer import encode
from tests.support.tiny_models import LLAMA, interleave_heads, tiny_spec

SPEC = tiny_spec(LLAMA)
SOURCES = tensor_sources(SPEC, GGUF_NAMES)
SHAPES = {SOURCES[name].name: shape for name, shape in tensor_shapes(SPEC).items()}


def test_every_canonical_tensor_has_one_source() -> None:
    assert SOURCES.keys() == tensor_shapes(SPEC).keys()
    assert len(SHAPES) == len(SOURCES)
    assert SOURCES["layers.1.attention.q_proj.weight"].interleaved_heads == 4
    assert SOURCES["layers.1.attention.k_proj.weight"].interleaved_heads == 2
    assert SOURCES["layers.1.attention.v_proj.weight"].interleaved_heads == 0


def test_a_file_that_fits_passes() -> None:
    check_tensors(SPEC, SOURCES, SHAPES)
    check_tensors(SPEC, SOURCES, {**SHAPES, "rope_freqs.weight": (8,)}, not_weights=GGUF_NAMES.not_weights)


def test_missing_tensors_are_named() -> None:
    without = {name: shape for name, shape in SHAPES.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(ModelFileError, match=r"^tensor blk\.1\.ffn_up\.weight is missing"):
        check_tensors(SPEC, SOURCES, without)
    with pytest.raises(ModelFileError, match=r"and 15 more are missing"):
        check_tensors(SPEC, SOURCES, {})


def test_tensors_left_over_are_named() -> None:
    for name in ("blk.0.attn_output.bias", "blk.2.attn_q.weight", "rope_freqs.weight"):
        with pytest.raises(UnsupportedModelError, match=f"tensor {name} is not part of a llama model"):
            check_tensors(SPEC, SOURCES, {**SHAPES, name: (64,)})


def test_a_wrong_shape_is_refused_with_both() -> None:
    wrong = {**SHAPES, "blk.1.ffn_up.weight": (64, 96)}
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight has shape \[64, 96\]; .* \[96, 64\]"):
        check_tensors(SPEC, SOURCES, wrong)


@pytest.mark.parametrize("format", [BlockFormat.F32, BlockFormat.F16, BlockFormat.Q4_1, BlockFormat.Q4_K])
def test_heads_are_split_exactly_in_any_format(format: BlockFormat) -> None:
    values = np.random.default_rng(0).normal(size=(4 * 16, 256)).astype(np.float32)
    split = split_interleaved_heads(encode(interleave_heads(values, 4), format), 4)
    np.testing.assert_array_equal(split.data, encode(values, format).data)
    assert split.shape == values.shape


def test_a_vector_is_split_by_element() -> None:
    values = np.arange(32, dtype=np.float32)
    for format in (BlockFormat.F32, BlockFormat.BF16):
        split = split_interleaved_heads(encode(interleave_heads(values, 2), format), 2)
        np.testing.assert_array_equal(dequantize(split.data, format), values[None])


def test_the_split_is_no_identity() -> None:
    values = np.arange(32, dtype=np.float32)
    assert (split_interleaved_heads(encode(values), 2).data != encode(values).data).any()
