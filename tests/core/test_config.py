from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pellucid.core.config import BackendConfig, CacheConfig, ModelConfig, SchedulerConfig, num_blocks_for
from pellucid.core.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: ModelConfig("m", max_model_len=1), "max_model_len"),
        (lambda: ModelConfig("m", max_model_len=True), "max_model_len"),
        (lambda: ModelConfig("m", seed=-1), "seed"),
        (lambda: ModelConfig("m", seed=2**64), "seed"),
        (lambda: CacheConfig(dtype="int3"), "kv_cache_dtype"),  # type: ignore[arg-type]
        (lambda: CacheConfig(memory=0), "kv_cache_memory"),
        (lambda: CacheConfig(memory=10**30), "kv_cache_memory"),
        (lambda: CacheConfig(enable_prefix_caching=1), "enable_prefix_caching"),  # type: ignore[arg-type]
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_seqs=10**9), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_seqs=10, max_num_batched_tokens=9), "max_num_batched_tokens"),
        (lambda: SchedulerConfig(max_waiting=0), "max_waiting"),
        (lambda: SchedulerConfig(max_queue_seconds=0), "max_queue_seconds"),
        (lambda: SchedulerConfig(max_queue_seconds=float("nan")), "max_queue_seconds"),
        (lambda: BackendConfig(name="gpu"), "backend"),  # type: ignore[arg-type]
        (lambda: BackendConfig(threads=0), "threads"),
        (lambda: BackendConfig(threads=1.0), "threads"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_parameter(make: Callable[[], Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.param == param
    assert param in caught.value.message


def test_num_blocks_for() -> None:
    assert [num_blocks_for(tokens) for tokens in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]
