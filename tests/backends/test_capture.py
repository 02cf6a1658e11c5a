"""What backends write down: the very numbers that flow on, and the same in the native core as in the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.backends.reference.ops import linear, rms_norm
from pellucid.core.capture import SequenceCapture, operation_names
from pellucid.core.errors import BackendError
from pellucid.quant.formats import BlockFormat, dequantize
from pellucid.weights.loader import open_model
from tests.support.captures import buffers, with_capture
from tests.support.tiny_models import ISAS, ODD, load_native, make_batch, num_kv_groups, write_tiny_model

TOKENS = np.random.default_rng(11).integers(0, 128, 150).tolist()
QUANTIZED = {"llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.rope.dimension_count": 64}


@pytest.fixture(scope="module", params=["llama", "gemma3", "odd"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = ODD if request.param == "odd" else None
    architecture = "llama" if request.param == "odd" else request.param
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", architecture, metadata=metadata)


def reference(path: Path, kv_cache_dtype: str = "f32") -> ReferenceBackend:
    with open_model(path) as file:
        return ReferenceBackend(file.spec, file.weights(), threads=1, kv_cache_dtype=kv_cache_dtype)


def capture(backend: Backend, tokens: list[int], chunk: int | None = None) -> tuple[SequenceCapture, np.ndarray]:
    """Everything there is to see of the last chunk of `tokens`, and its logits."""
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(3 * groups)
    chunk = chunk or len(tokens)
    for start in range(0, len(tokens), chunk):
        batch = make_batch([(tokens[start : start + chunk], start, range(3))], groups=groups)
        wanted = buffers(backend, batch)
        logits = backend.forward(with_capture(batch, wanted)).logits.copy()
    return wanted, logits


def assert_close(found: SequenceCapture, expected: SequenceCapture, tolerance: float) -> None:
    """AssertionError where the two differ by more than `tolerance` times the largest of an array."""
    pairs = [("residual", found.residual, expected.residual)]
    pairs += [(f"mlp {layer}", found.mlp[layer], expected.mlp[layer]) for layer in expected.mlp]
    pairs += [(f"attention {layer}", found.attention[layer], expected.attention[layer]) for layer in expected.attention]
    for name, a, b in pairs:
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, (name, error)


def test_the_last_residual_gives_the_logits(path: Path) -> None:
    backend = reference(path)
    wanted, logits = capture(backend, TOKENS[:70], 40)
    weights = backend._weights
    normalized = rms_norm(wanted.residual[-1], weights["final_norm.weight"], backend.spec.final_norm)
    assert np.array_equal(linear(normalized, weights["embed_tokens.weight"]), logits)


def test_the_first_residual_is_the_embedding(path: Path) -> None:
    backend = reference(path)
    wanted, _ = capture(backend, TOKENS[:70])
    embedded = backend._weights["embed_tokens.weight"][TOKENS[:70]] * np.float32(backend.spec.embedding_scale)
    assert np.array_equal(wanted.residual[0], embedded)


def test_activations_are_what_the_residual_stream_moves_by(path: Path) -> None:
    backend = reference(path)
    wanted, _ = capture(backend, TOKENS[:20])
    for index, layer in enumerate(backend.spec.layers):
        contribution = linear(wanted.mlp[index], backend._weights[f"layers.{index}.mlp.down_proj.weight"])
        if layer.post_mlp_norm is not None:
            weight = backend._weights[f"layers.{index}.post_mlp_norm.weight"]
            contribution = rms_norm(contribution, weight, layer.post_mlp_norm)
        before, after = wanted.residual[2 * index + 1 : 2 * index + 3]
        assert np.array_equal(before + contribution, after), index
        # The mutant: another layer's activations.
        assert not np.array_equal(before + np.roll(contribution, 1), after), index


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("chunk", [17, 149, 150])
def test_the_native_core_agrees_with_the_reference(path: Path, isa: str, chunk: int) -> None:
    expected, _ = capture(reference(path), TOKENS, chunk)
    found, _ = capture(load_native(path, kv_cache_dtype="f32", isa=isa), TOKENS, chunk)
    assert_close(found, expected, 2e-4)
    found.attention[1][:] = found.attention[0]  # the mutant: a layer's weights are another's
    with pytest.raises(AssertionError, match="attention 1"):
        assert_close(found, expected, 2e-4)


@pytest.mark.skipif(not ISAS, reason="the native core is not built")
@pytest.mark.parametrize("kv_cache_dtype", ["f16", "bf16"])
def test_lossy_caches_agree_too(path: Path, kv_cache_dtype: str) -> None:
    """Both round the same keys and values; one that falls on the other side moves what follows by as much."""
    expected, _ = capture(reference(path, kv_cache_dtype), TOKENS)
    found, _ = capture(load_native(path, kv_cache_dtype=kv_cache_dtype), TOKENS)
    assert_close(found, expected, {"f16": 0.01, "bf16": 0.08}[kv_cache_dtype])
    for weights in found.attention.values():
        assert np.abs(weights.sum(-1) - 1).max() <= 1e-5


@pytest.mark.skipif(not ISAS, reason="the native core is not built")
@pytest.mark.parametrize("format", [BlockFormat.Q4_1, BlockFormat.Q8_0])
def test_quantized_models_write_down_what_flows_on(tmp_path: Path, format: BlockFormat) -> None:
    """The residual stream and the activations before they are rounded: what down_proj and the head make of them moves
    the stream, and is the logits, within the rounding to 8 bits (0.005 was seen). Rows of a neighbour are far off."""
    path = write_tiny_model(tmp_path / "quantized.gguf", metadata=QUANTIZED, formats=format)
    backend = load_native(path, threads=2)
    wanted, logits = capture(backend, TOKENS[:70], 64)
    with open_model(path) as file:
        weights = {name: dequantize(t.data, t.format).reshape(t.shape) for name, t in file.weights()}
    for layer in range(2):
        moved = wanted.residual[2 * layer + 2] - wanted.residual[2 * layer + 1]
        contribution = wanted.mlp[layer] @ weights[f"layers.{layer}.mlp.down_proj.weight"].T
        assert np.abs(moved - contribution).max() <= 0.02 * np.abs(contribution).max()
        assert np.abs(moved - np.roll(contribution, 1, axis=0)).max() > 0.2 * np.abs(contribution).max()
    normalized = rms_norm(wanted.residual[-1], weights["final_norm.weight"], backend.spec.final_norm)
    expected = normalized @ weights["embed_tokens.weight"].T
    assert np.abs(logits - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, path: Path) -> Backend:
    if request.param == "cpu" and not ISAS:
        pytest.skip("the native core is not built")
    return load_native(path, threads=2) if request.param == "cpu" else reference(path)


def test_a_step_that_decodes_many_writes_down_each(backend: Backend) -> None:
    """Many decoding sequences take another way through attention than one does."""
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(12 * groups)
    for seq in range(6):
        backend.forward(make_batch([(TOKENS[seq : seq + 70], 0, [2 * seq, 2 * seq + 1])], [], groups=groups))
    pieces = [([9], 70, [2 * seq, 2 * seq + 1]) for seq in range(6)]
    batch = make_batch(pieces, groups=groups)
    together = [buffers(backend, batch, row) for row in range(6)]
    backend.forward(with_capture(batch, *together))
    for row, found in enumerate(together):
        alone_batch = make_batch(pieces[row : row + 1], groups=groups)
        alone = buffers(backend, alone_batch)
        backend.forward(with_capture(alone_batch, alone))
        assert_close(found, alone, 0)


def test_rows_without_logits_have_a_last_residual(backend: Backend) -> None:
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(2 * groups)
    batch = make_batch([(TOKENS[:70], 0, [0, 1])], groups=groups)
    with_logits, without = buffers(backend, batch), buffers(backend, batch)
    backend.forward(with_capture(batch, with_logits))
    seconds = np.zeros(len(operation_names(len(backend.spec.layers))))
    unasked = make_batch([(TOKENS[:70], 0, [0, 1])], [], groups=groups)
    backend.forward(with_capture(unasked, without, seconds=seconds))
    assert_close(without, with_logits, 0)
    assert (seconds[:-2] > 0).all()


@pytest.mark.skipif(not ISAS, reason="the native core is not built")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row", 1, "sequence that is not in the batch"),
        ("tokens", np.array([5], np.int32), "names what is not there"),
        ("tokens", np.array([0], np.int64), "wrong type"),
        ("queries", np.array([-1], np.int32), "names what is not there"),
        ("heads", np.array([99], np.int32), "names what is not there"),
        ("residual_points", np.array([99], np.int32), "names what is not there"),
        ("residual", np.zeros((1, 1, 1), np.float32), "residual has the wrong shape"),
        ("residual", np.zeros((5, 5), np.float32), "wrong type, dimensions or layout"),
        ("mlp", {0: np.zeros((2, 96), np.float32)}, "mlp has the wrong shape"),
        ("mlp", {0: np.zeros((96, 5), np.float32).T}, "wrong type, dimensions or layout"),
        ("mlp", {9: np.zeros((5, 96), np.float32)}, "a layer that the model does not have"),
        ("attention", {0: np.zeros((4, 5, 6), np.float32)}, "attention has the wrong shape"),
        ("attention", {-1: np.zeros((4, 5, 5), np.float32)}, "a layer that the model does not have"),
    ],
)
def test_memory_that_does_not_fit_is_never_written_to(tmp_path: Path, field: str, value: Any, message: str) -> None:
    backend = load_native(write_tiny_model(tmp_path / "tiny.gguf"))
    backend.allocate_kv_cache(1)
    batch = make_batch([(TOKENS[:5], 0, [0])])
    wanted = buffers(backend, batch)
    fields = {name: getattr(wanted, name) for name in SequenceCapture.__dataclass_fields__}
    with pytest.raises(BackendError, match=message):
        backend.forward(with_capture(batch, SequenceCapture(**{**fields, field: value})))
    assert np.isnan(wanted.residual).all()
    with pytest.raises(BackendError, match="seconds has the wrong shape"):
        backend.forward(with_capture(batch, wanted, seconds=np.zeros(3)))
