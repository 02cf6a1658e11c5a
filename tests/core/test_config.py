from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pellucid.core.config import (
    BackendConfig,
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    num_blocks_for,
    speculative_config,
)
from pellucid.core.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: ModelConfig("m", max_model_len=1), "max_model_len"),
        (lambda: ModelConfig("m", max_model_len=True), "max_model_len"),
        (lambda: ModelConfig("m", seed=-1), "seed"),
        (lambda: ModelConfig("m", seed=2**64), "seed"),
        (lambda: CacheConfig(kv_cache_dtype="int3"), "kv_cache_dtype"),  # type: ignore[arg-type]
        (lambda: CacheConfig(kv_cache_memory=0), "kv_cache_memory"),
        (lambda: CacheConfig(kv_cache_memory=10**30), "kv_cache_memory"),
        (lambda: CacheConfig(enable_prefix_caching=1), "enable_prefix_caching"),  # type: ignore[arg-type]
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_seqs=10**9), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_seqs=10, max_num_batched_tokens=9), "max_num_batched_tokens"),
        (lambda: SchedulerConfig(max_waiting=0), "max_waiting"),
        (lambda: SchedulerConfig(max_queue_seconds=0), "max_queue_seconds"),
        (lambda: SchedulerConfig(max_queue_seconds=float("nan")), "max_queue_seconds"),
        (lambda: BackendConfig(backend="gpu"), "backend"),  # type: ignore[arg-type]
        (lambda: BackendConfig(threads=0), "threads"),
        (lambda: BackendConfig(threads=1.0), "threads"),  # type: ignore[arg-type]
        (lambda: SpeculativeConfig("magic"), "speculative"),  # type: ignore[arg-type]
        (lambda: speculative_config("magic"), "speculative"),  # type: ignore[arg-type]
        (lambda: speculative_config(3), "speculative"),  # type: ignore[arg-type]
        (lambda: SpeculativeConfig("ngram", 0), "num_draft_tokens"),
        (lambda: SpeculativeConfig("ngram", 65), "num_draft_tokens"),
        (lambda: SpeculativeConfig("ngram", adaptive=1), "adaptive"),  # type: ignore[arg-type]
        (lambda: SpeculativeConfig("ngram", prompt_lookup_max=0), "prompt_lookup_max"),
        (lambda: SpeculativeConfig("ngram", prompt_lookup_min=0), "prompt_lookup_min"),
        (lambda: SpeculativeConfig("ngram", prompt_lookup_min=3, prompt_lookup_max=2), "prompt_lookup_min"),
        (lambda: SpeculativeConfig("lookahead", prompt_lookup_min=3), "prompt_lookup_min"),
        (lambda: SpeculativeConfig("lookahead", lookahead_ngram=1), "lookahead_ngram"),
        (lambda: SpeculativeConfig("lookahead", lookahead_ngram=17), "lookahead_ngram"),
        (lambda: SpeculativeConfig("lookahead", lookahead_window=0), "lookahead_window"),
        (lambda: SpeculativeConfig("lookahead", lookahead_window=65), "lookahead_window"),
        (lambda: SpeculativeConfig("ngram", lookahead_window=8), "lookahead_window"),
        (lambda: SpeculativeConfig("layer_skip", lookahead_ngram=4), "lookahead_ngram"),
        (lambda: SpeculativeConfig("ngram", draft_model="small"), "draft_model"),
        (lambda: SpeculativeConfig("draft_model"), "draft_model"),
        (lambda: SpeculativeConfig("draft_model", draft_model=""), "draft_model"),
        (lambda: SpeculativeConfig("ngram", layers=[1]), "layers"),
        (lambda: SpeculativeConfig("layer_skip", layers=[]), "layers"),
        (lambda: SpeculativeConfig("layer_skip", layers=[2, 1]), "layers"),
        (lambda: SpeculativeConfig("layer_skip", layers=[1, 1]), "layers"),
        (lambda: SpeculativeConfig("layer_skip", layers=[-1]), "layers"),
        (lambda: SpeculativeConfig("layer_skip", layers="12"), "layers"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_parameter(make: Callable[[], Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.param == param
    assert param in caught.value.message


def test_num_blocks_for() -> None:
    assert [num_blocks_for(tokens) for tokens in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_speculative_config_is_resolved() -> None:
    config = speculative_config("ngram")
    assert config is not None
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (2, 4)
    assert SpeculativeConfig("ngram", prompt_lookup_max=1).prompt_lookup_min == 1
    lookahead = SpeculativeConfig("lookahead", lookahead_window=5)
    assert (lookahead.lookahead_ngram, lookahead.lookahead_window) == (4, 5)
    assert SpeculativeConfig("layer_skip", layers=range(3)).layers == (0, 1, 2)
    assert speculative_config(config) is config
    assert speculative_config(None) is None
