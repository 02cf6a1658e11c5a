"""Guidance, DoLa and contrastive search against golden tokens, and against transformers where it is there."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import load
from pellucid.core.config import SchedulerConfig
from pellucid.core.sampling_params import SamplingParams
from pellucid.decoding.contrast import dola, guide
from pellucid.engine import guidance, layer_contrast
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.search import contrastive
from pellucid.engine.search.contrastive import ContrastiveSearch
from pellucid.weights.catalog import cached_path, entries, is_cached
from pellucid.weights.loader import open_model
from tests.parity.cases import TINY, tiny_backend, tiny_spec
from tests.parity.contrast import CASES, Case, continued, golden_tokens, model_of
from tests.support.engines import CheckedEngine
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant

TINY_CASES = [name for name, case in CASES.items() if case.model in TINY]
REAL_CASES = [name for name, case in CASES.items() if case.model not in TINY]


def answer(backend: Backend, cases: list[Case]) -> list[list[int]]:
    """The tokens of each of `cases`, all of one model, batched with one another and some of them chunked."""
    num_blocks = 200
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=50)
    engine = CheckedEngine(backend, FakeTokenizer(), config, num_blocks=num_blocks, max_model_len=200)
    for number, case in enumerate(cases):
        params = SamplingParams(
            temperature=0, max_tokens=case.max_tokens, ignore_eos=True, detokenize=False, **case.params
        )
        engine.add_request(str(number), case.prompt, params)
    engine.run()
    replies = [engine.replies[str(number)] for number in range(len(cases))]
    assert [reply.error for reply in replies] == [None] * len(cases)
    return [reply.outputs[0].token_ids for reply in replies]


def cases_of(model: str) -> dict[str, Case]:
    return {name: case for name, case in CASES.items() if case.model == model}


def backend_of(model: str) -> Backend:
    if model in TINY:
        return tiny_backend(tiny_spec(TINY[model]))
    entry = next(entry for entry in entries() if entry.name == model)
    if not is_cached(entry):
        pytest.skip(f"{model} is not in the cache: pellucid pull {model}")
    with open_model(cached_path(entry)) as model_file:
        return load(model_file)


def check(model: str) -> None:
    cases = cases_of(model)
    expected = golden_tokens()
    found = answer(backend_of(model), list(cases.values()))
    assert dict(zip(cases, found, strict=True)) == {name: expected[name] for name in cases}


@pytest.mark.parametrize("model", sorted({CASES[name].model for name in TINY_CASES}))
def test_tiny_models_continue_as_transformers_would(model: str) -> None:
    check(model)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({CASES[name].model for name in REAL_CASES}))
def test_real_models_continue_as_transformers_would(model: str) -> None:
    check(model)


def other_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "guide", lambda c, u, scale: guide(c, u, scale + 0.5))


def other_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_contrast, "dola", mutant(dola, "np.argmax([", "np.argmin(["))


def normalized_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    projected = mutant(LayerContrast._projected, "normalize=False", "normalize=True")
    monkeypatch.setattr(LayerContrast, "_projected", projected)


def no_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "choose", lambda probability, hidden, context, alpha: int(probability.argmax()))


def a_token_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = mutant(ContrastiveSearch.advance, "self._context[: self.num_known]", "self._context[1 : self.num_known]")
    monkeypatch.setattr(ContrastiveSearch, "advance", advance)


@pytest.mark.parametrize("defect", [other_scale, other_layer, normalized_lens, no_penalty, a_token_forgotten])
def test_mutants_are_caught(defect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        check("gemma3-untied")


@pytest.mark.parity
@pytest.mark.parametrize("name", TINY_CASES)
def test_the_goldens_are_what_transformers_gives_today(name: str) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install 'pellucid[parity]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'pellucid[parity]'")
    assert continued(model_of(CASES[name].model), CASES[name]) == golden_tokens()[name]
