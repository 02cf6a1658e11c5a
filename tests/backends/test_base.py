"""What every backend keeps of the contract: here, KV blocks as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig, KVCacheDtype
from pellucid.core.errors import BackendError
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.tiny_models import HEADS_OF_32, group_blocks, make_batch, num_kv_groups, write_tiny_model

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB_SIZE, 200)]
NUM_BLOCKS = 9


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_model(path, request.param, metadata=HEADS_OF_32[request.param], vocab_size=VOCAB_SIZE)


def load(model_path: Path, name: str, dtype: str) -> Backend:
    if name == "fake":
        backend: Backend = FakeBackend()
    else:
        if name == "cpu":
            pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
        with open_model(model_path) as model_file:
            backend = load_backend(model_file, BackendConfig(name), kv_cache_dtype=dtype)  # type: ignore[arg-type]
    backend.allocate_kv_cache(NUM_BLOCKS * num_kv_groups(backend))
    return backend


KINDS = [("fake", ""), *((name, dtype) for name in ("reference", "cpu") for dtype in get_args(KVCacheDtype))]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_blocks_go_out_and_in_to_the_bit(model_path: Path, name: str, dtype: str) -> None:
    """The rest of a text gives the same logits on blocks that were moved to other places of another cache."""
    backend = load(model_path, name, dtype)
    groups = num_kv_groups(backend)
    backend.forward(make_batch([(TOKENS[:192], 0, [4, 2, 7])], groups=groups))
    data = backend.read_blocks(group_blocks([4, 2, 7], groups).reshape(-1))
    assert data.shape == (3 * groups, backend.kv_bytes_per_block())
    assert data.dtype == np.uint8
    wanted = backend.forward(make_batch([(TOKENS[192:], 192, [4, 2, 7, 5])], groups=groups)).logits.copy()

    backend.allocate_kv_cache(NUM_BLOCKS * groups)
    places = group_blocks([0, 8, 3], groups).reshape(-1)
    backend.write_blocks(places, data)
    found = backend.forward(make_batch([(TOKENS[192:], 192, [0, 8, 3, 1])], groups=groups)).logits
    assert np.array_equal(found, wanted)
    assert np.array_equal(backend.read_blocks(places), data)
    assert np.array_equal(backend.read_blocks(places[::-1]), data[::-1])
    assert backend.read_blocks(places[:0]).shape == (0, backend.kv_bytes_per_block())


@pytest.mark.parametrize(("name", "dtype"), [("fake", ""), ("reference", "f16"), ("cpu", "f16")])
def test_what_does_not_fit_is_refused_and_nothing_written(model_path: Path, name: str, dtype: str) -> None:
    backend = load(model_path, name, dtype)
    groups = num_kv_groups(backend)
    backend.forward(make_batch([(TOKENS[:64], 0, [0])], groups=groups))
    every = np.arange(NUM_BLOCKS * groups, dtype=np.int32)
    before = backend.read_blocks(every)
    size = backend.kv_bytes_per_block()
    ones = np.ones((2, size), np.uint8)
    for blocks in ([0, len(every)], [0, -1], [2**31 - 1, 0]):
        with pytest.raises(BackendError):
            backend.read_blocks(np.array(blocks, np.int32))
        with pytest.raises(BackendError):
            backend.write_blocks(np.array(blocks, np.int32), ones)
    for data in (ones[:1], ones[:, 1:], np.ones((2, size + 1), np.uint8), ones.astype(np.float32), ones[0]):
        with pytest.raises(BackendError):
            backend.write_blocks(np.array([0, 1], np.int32), data)
    assert np.array_equal(backend.read_blocks(every), before)


def test_layouts_differ_where_bytes_do(model_path: Path) -> None:
    layouts = [load(model_path, name, dtype).kv_layout for name, dtype in KINDS]
    assert len(set(layouts)) == len(layouts)
    assert load(model_path, "cpu", "f16").kv_layout == layouts[KINDS.index(("cpu", "f16"))]


@pytest.mark.parametrize("format", [BlockFormat.F32, BlockFormat.Q4_1, BlockFormat.Q8_0])
def test_kernels_that_differ_in_bits_differ_in_layout(
    format: BlockFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    model_path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE, formats=format)
    layouts: dict[str, set[bytes]] = {}
    for isa in native.instruction_sets():
        monkeypatch.setenv("PELLUCID_ISA", isa)
        backend = load(model_path, "cpu", "f32")
        backend.forward(make_batch([(TOKENS[:64], 0, [0])], groups=num_kv_groups(backend)))
        layouts.setdefault(backend.kv_layout, set()).add(backend.read_blocks(np.array([0], np.int32)).tobytes())
    assert all(len(bits) == 1 for bits in layouts.values())
