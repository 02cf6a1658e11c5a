"""The reference backend against recorded logits of transformers; no torch needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pellucid.backends.reference.backend import load
from pellucid.models.rope import default_inv_freq, rope_spec
from pellucid.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec
from pellucid.weights.catalog import cached_path, entries, is_cached
from pellucid.weights.loader import open_model
from tests.parity import goldens
from tests.parity.cases import REAL, TINY, TOLERANCE, tiny_backend, tiny_spec, tiny_tokens
from tests.support.tiny_models import all_logits


def relative_error(name: str, logits: np.ndarray) -> float:
    golden = goldens.read("tiny")[name]
    recorded = np.array(golden["logits"])
    computed = logits[golden["positions"], : recorded.shape[1]]
    return float(np.abs(computed - recorded).max() / golden["scale"])


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_give_the_logits_of_transformers(name: str) -> None:
    logits = all_logits(tiny_backend(tiny_spec(TINY[name])), tiny_tokens(TINY[name]))
    assert relative_error(name, logits) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_logits_of_transformers(name: str) -> None:
    entry = next(entry for entry in entries() if entry.name == name)
    if not is_cached(entry):
        pytest.skip(f"{name} is not in the cache: pellucid pull {name}")
    with open_model(cached_path(entry)) as model_file:
        backend = load(model_file)
    logits = all_logits(backend, REAL[name].tokens)
    golden = goldens.read(name)
    for row in golden["top"]:
        computed, allowed = logits[row["position"]], TOLERANCE * golden["scale"]
        np.testing.assert_allclose(computed[row["ids"]], row["logits"], rtol=0, atol=allowed)
        others = np.delete(computed, row["ids"])
        assert others.max() <= row["logits"][-1] + allowed


def every_layer(change: Callable[[LayerSpec], LayerSpec]) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, layers=tuple(map(change, spec.layers)))


def attention(change: Callable[[AttentionSpec], AttentionSpec]) -> Callable[[ModelSpec], ModelSpec]:
    return every_layer(lambda layer: replace(layer, attention=change(layer.attention)))


def widened(spec: AttentionSpec) -> AttentionSpec:
    return spec if spec.sliding_window is None else replace(spec, sliding_window=spec.sliding_window + 1)


MUTANTS: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "rope base": ("llama", attention(lambda a: replace(a, rope=rope_spec(default_inv_freq(10100.0, a.head_dim))))),
    "rope scaling forgotten": (
        "llama-llama3",
        attention(lambda a: replace(a, rope=rope_spec(default_inv_freq(10000.0, a.head_dim)))),
    ),
    "yarn attention factor": (
        "llama-yarn",
        attention(lambda a: replace(a, rope=replace(a.rope, attention_factor=1.0))),
    ),
    "one rope base for all layers": (
        "gemma3",
        attention(lambda a: replace(a, rope=rope_spec(default_inv_freq(1e6, a.head_dim)))),
    ),
    "window off by one": ("gemma3", attention(widened)),
    "window off by one over a block": ("gemma3-window-over-a-block", attention(widened)),
    "attention scale of the head": ("gemma3-grouped", attention(lambda a: replace(a, scale=a.head_dim**-0.5))),
    "qk norm forgotten": ("gemma3", attention(lambda a: replace(a, qk_norm=None))),
    "norm offset": ("gemma3", lambda spec: replace(spec, final_norm=NormSpec(spec.final_norm.eps, 0.0))),
    "norm eps": ("llama", every_layer(lambda layer: replace(layer, attention_norm=NormSpec(1e-3)))),
    "sandwich norm forgotten": ("gemma3", every_layer(lambda layer: replace(layer, post_mlp_norm=None))),
    "embedding scale forgotten": ("gemma3", lambda spec: replace(spec, embedding_scale=1.0)),
    "activation": ("gemma3", every_layer(lambda layer: replace(layer, mlp=replace(layer.mlp, activation="silu")))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_spec_is_caught(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    spec = tiny_spec(TINY[name])
    backend = tiny_backend(spec)
    backend.spec = change(spec)
    assert relative_error(name, all_logits(backend, tiny_tokens(TINY[name]))) > 10 * TOLERANCE
