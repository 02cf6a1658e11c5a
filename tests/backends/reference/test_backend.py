from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pellucid.backends.reference import backend as reference
from pellucid.backends.reference import ops
from pellucid.backends.reference.backend import ReferenceBackend, load
from pellucid.core.errors import BackendError, InvalidRequestError, ModelFileError
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from tests.support.gguf_writer import encode
from tests.support.tiny_models import (
    HEADS_OF_32,
    LLAMA,
    all_logits,
    group_blocks,
    make_batch,
    num_kv_groups,
    random_weights,
    tiny_spec,
    write_model,
    write_tiny_model,
)

TOKENS = np.random.default_rng(7).integers(0, 128, 150).tolist()


@pytest.fixture(params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model.gguf", request.param, metadata=HEADS_OF_32[request.param])


def open_backend(path: Path, **options: object) -> ReferenceBackend:
    with open_model(path) as model_file:
        return load(model_file, **options)


@pytest.fixture
def backend(model_path: Path) -> ReferenceBackend:
    return open_backend(model_path)


@pytest.mark.parametrize("kv_cache_dtype", ["f32", "f16", "bf16", "q8"])
def test_chunking_never_changes_a_bit(model_path: Path, kv_cache_dtype: str) -> None:
    backend = open_backend(model_path, kv_cache_dtype=kv_cache_dtype)
    expected = all_logits(backend, TOKENS)
    for chunk in (1, 3, 17, 64):
        np.testing.assert_array_equal(all_logits(backend, TOKENS, chunk), expected)


def test_batch_neighbours_blocks_and_row_order_never_change_a_bit(backend: ReferenceBackend) -> None:
    expected = all_logits(backend, TOKENS)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(32 * groups)
    neighbours = [([5, 6, 7] * (index + 1), 0, [10 + index]) for index in range(7)]
    half = len(TOKENS) // 2
    backend.forward(make_batch([(TOKENS[:half], 0, [9, 3, 4])], groups=groups))
    batch = make_batch([*neighbours[:4], (TOKENS[half:], half, [9, 3, 4]), *neighbours[4:]], groups=groups)
    own = np.arange(batch.cu_seqlens[4], batch.cu_seqlens[5])
    logits = backend.forward(replace(batch, logits_rows=own[::-1].astype(np.int32))).logits
    np.testing.assert_array_equal(logits[::-1], expected[half:])


def test_thread_count_never_changes_a_bit(model_path: Path) -> None:
    expected = all_logits(open_backend(model_path, threads=1), TOKENS)
    for threads in (2, 3):
        np.testing.assert_array_equal(all_logits(open_backend(model_path, threads=threads), TOKENS), expected)


def test_blas_threads_never_change_a_bit(model_path: Path) -> None:
    program = (
        "import hashlib, sys; from pathlib import Path\n"
        "from tests.backends.reference.test_backend import TOKENS, all_logits, open_backend\n"
        "print(hashlib.sha256(all_logits(open_backend(Path(sys.argv[1])), TOKENS[:70]).tobytes()).hexdigest())"
    )
    root = Path(__file__).parents[3]
    digests = set()
    for threads in ("1", "2"):
        limits = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment = {**os.environ, **limits, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        command = [sys.executable, "-c", program, str(model_path)]
        digests.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1


def test_equality_catches_a_product_over_all_rows(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: a product that, as BLAS may, adds up in an order that depends on the number of rows."""

    def product_over_all_rows(
        x: np.ndarray, weight: np.ndarray, bias: object = None, *, executor: object
    ) -> np.ndarray:
        step = 1 if x.shape[0] % 2 else -1
        return np.einsum("ti,oi->to", x[:, ::step].copy(), weight[:, ::step].copy())

    monkeypatch.setattr(reference, "linear", product_over_all_rows)
    backend = open_backend(model_path)
    assert (all_logits(backend, TOKENS, 17) != all_logits(backend, TOKENS)).any()


def test_a_token_does_not_see_the_tokens_after_it(backend: ReferenceBackend) -> None:
    changed = [*TOKENS[:100], *reversed(TOKENS[100:])]
    before, after = all_logits(backend, TOKENS), all_logits(backend, changed)
    np.testing.assert_array_equal(after[:100], before[:100])
    assert (after[100:] != before[100:]).any(axis=1).all()


def test_window_layers_do_not_read_the_blocks_they_have_left(tmp_path: Path) -> None:
    metadata = {"gemma3.block_count": 2, "gemma3.attention.sliding_window": 10}
    backend = open_backend(write_tiny_model(tmp_path / "model.gguf", "gemma3", metadata=metadata))
    expected = all_logits(backend, TOKENS)[-1]
    backend.allocate_kv_cache(3)
    backend.forward(make_batch([(TOKENS[:-1], 0, [0, 1, 2])]))
    logits = backend.forward(make_batch([(TOKENS[-1:], len(TOKENS) - 1, [-1, -1, 2])])).logits
    np.testing.assert_array_equal(logits[0], expected)


def test_copied_blocks_carry_the_context(backend: ReferenceBackend) -> None:
    expected = all_logits(backend, TOKENS[:100])[-1]
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(4 * groups)
    backend.forward(make_batch([(TOKENS[:99], 0, [0, 1])], groups=groups))
    backend.copy_blocks(group_blocks([[0, 3], [1, 2]], groups).reshape(-1, 2))
    backend.forward(make_batch([(TOKENS[::-1], 0, [0, 1, 1])], groups=groups))
    logits = backend.forward(make_batch([(TOKENS[99:100], 99, [3, 2])], groups=groups)).logits
    np.testing.assert_array_equal(logits[0], expected)


def test_block_bytes_are_those_of_keys_and_values(model_path: Path) -> None:
    heads_times_dim = {"llama": 2 * 32 * 2, "gemma3": 1 * 32}  # of two layers, and of one in each of seven groups
    for dtype, size in (("f32", 4), ("f16", 2), ("bf16", 2), ("q8", 34 / 32)):
        backend = open_backend(model_path, kv_cache_dtype=dtype)
        assert backend.kv_bytes_per_block() == 2 * 64 * size * heads_times_dim[backend.spec.architecture]


def test_a_block_that_is_not_there_is_an_error_not_another_block(backend: ReferenceBackend) -> None:
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(2 * groups)
    group_of_first_layer = 1 if groups > 1 else 0  # it has a window, and groups without one come first
    for block, found in ((-1, -1), (2, 2 * groups + group_of_first_layer)):
        with pytest.raises(BackendError, match=f"KV block {found} "):
            backend.forward(make_batch([([1, 2], 0, [block])], groups=groups))


def test_logits_that_are_not_finite_are_an_error(backend: ReferenceBackend) -> None:
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups)
    backend._weights["final_norm.weight"][3] = np.nan
    with pytest.raises(BackendError, match="not finite"):
        backend.forward(make_batch([([1, 2], 0, [0])], groups=groups))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA)
    weights = random_weights(spec)
    damaged = encode(weights["layers.1.mlp.up_proj.weight"], BlockFormat.Q8_0)
    damaged.data[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    extra_tensors = {"blk.1.ffn_up.weight": damaged}
    path = write_model(tmp_path / "model.gguf", LLAMA, weights, spec, extra_tensors=extra_tensors)
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.weight \(Q8_0\) holds NaN"):
        open_backend(path)


def test_an_unknown_cache_type_is_refused(model_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="f16, bf16, f32, q8"):
        open_backend(model_path, kv_cache_dtype="int3")


def test_heads_that_a_cache_type_does_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama")
    with pytest.raises(InvalidRequestError, match=r"kv_cache_dtype 'q8'.*head_dim 16: use one of f16, bf16, f32"):
        open_backend(path, kv_cache_dtype="q8")


def test_values_that_q8_cannot_hold_are_an_error(model_path: Path) -> None:
    for factor in (1e12, np.nan):
        backend = open_backend(model_path, kv_cache_dtype="q8")
        backend._weights["layers.1.attention.v_proj.weight"] *= np.float32(factor)
        with pytest.raises(BackendError, match=r"layer 1 are not finite or too large for q8.*'bf16'"):
            all_logits(backend, TOKENS[:2])


def test_a_closed_backend_refuses_work(backend: ReferenceBackend) -> None:
    backend.close()
    backend.close()
    for call in (lambda: backend.allocate_kv_cache(1), lambda: backend.forward(make_batch([([1], 0, [0])]))):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_lossy_caches_stay_close_to_the_exact_one(model_path: Path) -> None:
    exact = all_logits(open_backend(model_path), TOKENS)
    for dtype, bound in (("f16", 0.01), ("bf16", 0.08), ("q8", 0.08)):
        error = np.abs(all_logits(open_backend(model_path, kv_cache_dtype=dtype), TOKENS) - exact).max()
        assert 0 < error < bound * np.abs(exact).max()


def test_linear_gives_each_row_the_same_bits_wherever_it_stands() -> None:
    rng = np.random.default_rng(0)
    for out_features, in_features in itertools.product((1, 7, 64, 513), (1, 31, 64, 576)):
        x = rng.normal(size=(9, in_features)).astype(np.float32)
        weight = rng.normal(size=(out_features, in_features)).astype(np.float32)
        together = ops.linear(x, weight)
        for row in range(9):
            np.testing.assert_array_equal(ops.linear(x[row : row + 1].copy(), weight)[0], together[row])
        np.testing.assert_allclose(together, x.astype(np.float64) @ weight.T, rtol=1e-4, atol=1e-4)
