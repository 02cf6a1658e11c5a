from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig, KVCacheDtype
from pellucid.core.errors import BackendError, CapacityError, InvalidRequestError
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.estimate import memory
from pellucid.estimate.memory import KVCapacity, decide_kv_capacity, free_memory, kv_bytes_per_block, kv_bytes_per_token
from pellucid.weights.loader import open_model
from tests.support.tiny_models import GEMMA3, HEADS_OF_32, LLAMA, tiny_spec, write_tiny_model


def test_kv_bytes_per_block() -> None:
    # 2 layers, keys and values, 2 heads of 16 values, 64 tokens
    assert kv_bytes_per_block(tiny_spec(LLAMA), "f32") == 2 * 2 * 2 * 16 * 64 * 4
    assert kv_bytes_per_block(tiny_spec(LLAMA), "bf16") == 2 * 2 * 2 * 16 * 64 * 2
    assert kv_bytes_per_block(tiny_spec(GEMMA3), "f16") == 2 * 1 * 32 * 64 * 2  # seven groups of a layer
    assert kv_bytes_per_block(tiny_spec(GEMMA3), "q8") == 2 * 1 * 34 * 64
    assert kv_bytes_per_token(tiny_spec(GEMMA3), "f16") == 7 * 2 * 1 * 32 * 2
    assert kv_bytes_per_token(tiny_spec(GEMMA3), "q8") == 7 * 2 * 1 * 34
    with pytest.raises(InvalidRequestError, match="f16, bf16, f32, q8"):
        kv_bytes_per_block(tiny_spec(LLAMA), "int3")
    with pytest.raises(InvalidRequestError, match=r"kv_cache_dtype 'q8'.*head_dim 16: use one of f16, bf16, f32") as e:
        kv_bytes_per_block(tiny_spec(LLAMA), "q8")
    assert e.value.param == "kv_cache_dtype"


def test_every_dtype_has_a_format() -> None:
    assert tuple(memory.KV_FORMATS) == get_args(KVCacheDtype)


def decide(**changes: Any) -> KVCapacity:
    arguments: dict[str, Any] = {
        "bytes_per_block": 1000,
        "windows": (None,),
        "max_num_batched_tokens": 512,
        "model_max_len": 2048,
        "max_model_len": None,
        "max_num_seqs": 4,
        "kv_cache_memory": None,
        "free_memory": 10**9,
        **changes,
    }
    return decide_kv_capacity(**arguments)


def test_capacity() -> None:
    assert decide() == (4 * 32, 2048)  # more is never used
    assert decide(max_model_len=100) == (4 * 2, 100)
    assert decide(free_memory=100_000) == (50, 2048)  # half of it
    assert decide(free_memory=20_000) == (10, 640)  # what the memory holds of what the model could
    assert decide(kv_cache_memory=40_999) == (40, 2048)
    assert decide(kv_cache_memory=32_000, max_model_len=2048) == (32, 2048)
    assert decide(kv_cache_memory=40_000, share=0.25) == (10, 640)
    assert decide(free_memory=100_000, share=0.5) == (25, 1600)


def test_capacity_with_windows() -> None:
    windows = (None, 512, 512)
    # 512 tokens of a step and 511 before them touch 17 blocks at most.
    assert decide(windows=windows) == (4 * (32 + 2 * 17), 2048)
    assert decide(windows=windows, max_num_batched_tokens=1) == (4 * (32 + 2 * 9), 2048)
    assert decide(windows=windows, max_model_len=100) == (4 * 3 * 2, 100)
    assert decide(windows=windows, kv_cache_memory=65_999) == (65, 31 * 64)
    assert decide(windows=windows, kv_cache_memory=66_000) == (66, 2048)
    assert decide(windows=windows, kv_cache_memory=30_000) == (30, 10 * 64)
    assert decide(windows=(512,), kv_cache_memory=17_000, max_model_len=2048) == (17, 2048)
    with pytest.raises(CapacityError, match=r"one KV block.* has 3 at least"):
        decide(windows=windows, kv_cache_memory=2_999)
    with pytest.raises(CapacityError, match=r"66,000 bytes.*65,999.*1984 tokens"):
        decide(windows=windows, kv_cache_memory=65_999, max_model_len=2048)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"2049.*at most 2048"):
        decide(max_model_len=2049)
    with pytest.raises(CapacityError, match=r"32,000 bytes.*31,999.*1984 tokens"):
        decide(kv_cache_memory=31_999, max_model_len=2048)
    with pytest.raises(CapacityError, match="one KV block"):
        decide(kv_cache_memory=999)
    with pytest.raises(CapacityError, match="50% of the free memory"):
        decide(free_memory=1500)
    with pytest.raises(CapacityError, match=r"the model's part of kv_cache_memory, 25%, is 999 bytes"):
        decide(kv_cache_memory=3999, share=0.25)


@given(
    bytes_per_block=st.integers(1, 10**7),
    windows=st.sampled_from([(None,), (None, 512, 512), (128,)]),
    max_num_seqs=st.integers(1, 100),
    kv_cache_memory=st.none() | st.integers(1, 10**11),
    free_memory=st.integers(0, 10**11),
    max_model_len=st.none() | st.integers(2, 2048),
    share=st.floats(0.01, 1.0),
)
def test_it_never_commits_more_than_there_is(**arguments: Any) -> None:
    try:
        capacity = decide(**arguments)
    except CapacityError:
        return
    size = capacity.num_blocks * arguments["bytes_per_block"]
    budget, share = arguments["kv_cache_memory"], arguments["share"]
    most = arguments["free_memory"] / 2 if budget is None else min(budget, arguments["free_memory"])
    assert size <= share * most
    assert capacity.num_blocks >= max_blocks_of_sequence(arguments["windows"], capacity.max_model_len, 512)


def test_more_than_is_free_is_refused_only_where_it_is_needed() -> None:
    assert decide(kv_cache_memory=10**12, free_memory=4 * 32 * 1000) == (4 * 32, 2048)
    with pytest.raises(CapacityError, match=r"128 KV blocks take 128,000 bytes, but 127,999 are free"):
        decide(kv_cache_memory=10**12, free_memory=127_999)


def test_free_memory_obeys_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory() < 2**50
    monkeypatch.setattr(memory, "_system_free_memory", lambda: 10**10)
    monkeypatch.setattr(memory, "_reclaimable_memory", lambda: 500)
    files = {"/sys/fs/cgroup/memory.max": 3000, "/sys/fs/cgroup/memory.current": 1000}
    monkeypatch.setattr(memory, "_read_integer", files.get)
    assert free_memory() == 2500
    monkeypatch.setattr(memory, "_read_integer", lambda path: None)
    assert free_memory() == 10**10


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "f16", "f32", "q8"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backends_take_what_the_formula_says(name: Any, architecture: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture, metadata=HEADS_OF_32[architecture])
    with open_model(path) as model_file:
        try:
            backend = load_backend(model_file, BackendConfig(name, 1), kv_cache_dtype=kv_cache_dtype)
        except BackendError:
            pytest.skip("the native core is not built")
        assert backend.kv_bytes_per_block() == kv_bytes_per_block(model_file.spec, kv_cache_dtype)
        backend.close()
