"""Embeddings over the reference backend against those of transformers; no torch needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid import LLM
from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import load
from pellucid.core.config import SchedulerConfig
from pellucid.core.pooling_params import PoolingParams
from pellucid.engine.hidden_states import HiddenStates
from pellucid.weights.catalog import cached_path, entries, is_cached
from pellucid.weights.loader import open_model
from tests.parity import goldens
from tests.parity.cases import REAL, TINY, TOLERANCE, tiny_backend, tiny_spec, tiny_tokens
from tests.support.engines import CheckedEngine
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant


def embeddings(backend: Backend, tokens: list[int]) -> dict[str, np.ndarray]:
    """By pooling, in chunks of 40 tokens."""
    tokenizer: Any = FakeTokenizer()
    backend.allocate_kv_cache(64)
    engine = CheckedEngine(backend, tokenizer, SchedulerConfig(2, 40), num_blocks=64, max_model_len=len(tokens))
    for pooling in ("mean", "last"):
        engine.add_request(pooling, tokens, PoolingParams(pooling))  # type: ignore[arg-type]
    engine.run()
    found = {}
    for pooling, reply in engine.replies.items():
        assert reply.pooled is not None, reply.error
        found[pooling] = reply.pooled
    return found


def relative_error(name: str, found: dict[str, np.ndarray]) -> float:
    errors = []
    for pooling, golden in goldens.read("embeddings")[name].items():
        difference = np.abs(found[pooling][: goldens.EMBEDDED] - np.array(golden["begins"])).max()
        errors.append(float(difference / golden["scale"]))
    return max(errors)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_give_the_embeddings_of_transformers(name: str) -> None:
    assert relative_error(name, embeddings(tiny_backend(tiny_spec(TINY[name])), tiny_tokens(TINY[name]))) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_hidden_states_before_the_final_norm_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(HiddenStates.__init__, "2 * len(spec.layers) + 1", "2 * len(spec.layers)")
    monkeypatch.setattr(HiddenStates, "__init__", changed)
    found = embeddings(tiny_backend(tiny_spec(TINY[name])), tiny_tokens(TINY[name]))
    assert relative_error(name, found) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_embeddings_of_transformers(name: str) -> None:
    entry = next(entry for entry in entries() if entry.name == name)
    if not is_cached(entry):
        pytest.skip(f"{name} is not in the cache: pellucid pull {name}")
    with open_model(cached_path(entry)) as model_file:
        wanted = embeddings(load(model_file), REAL[name].tokens)
    assert relative_error(name, wanted) <= TOLERANCE
    with LLM(name, max_model_len=512) as llm:  # the native core, which rounds activations
        for pooling, vector in wanted.items():
            (found,) = llm.embed(REAL[name].tokens, pooling=pooling)  # type: ignore[arg-type]
            assert found.embedding @ vector > 0.999
