"""Beam search gives the sequences that `generate` of transformers gave; no torch needed."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import load
from pellucid.decoding import beam
from pellucid.engine.search.beam import BeamGroupSearch
from pellucid.engine.search.book import SearchBook
from pellucid.weights.catalog import cached_path, entries, is_cached
from pellucid.weights.loader import open_model
from tests.parity import goldens
from tests.parity.beam_cases import BEAM_CASES, SMOLLM2, BeamCase, answers
from tests.parity.cases import TINY, tiny_backend, tiny_spec
from tests.support.mutants import mutant


def check(backend: Backend, cases: list[BeamCase]) -> None:
    recorded = goldens.read(f"beams-{cases[0].model}")
    for case, outputs in zip(cases, answers(backend, cases), strict=True):
        golden = recorded[case.name]
        assert [output.token_ids for output in outputs] == golden["sequences"], case
        scores = [output.cumulative_logprob / len(output.token_ids) ** case.length_penalty for output in outputs]
        assert scores == pytest.approx(golden["scores"], abs=1e-3), case


def check_tiny(model: str, cases: slice = slice(None)) -> None:
    check(tiny_backend(tiny_spec(TINY[model])), BEAM_CASES[model][cases])


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_tiny_models(model: str) -> None:
    check_tiny(model)


@pytest.mark.slow
def test_smollm2() -> None:
    entry = next(entry for entry in entries() if entry.name == SMOLLM2)
    if not is_cached(entry):
        pytest.skip(f"{SMOLLM2} is not in the cache: pellucid pull {SMOLLM2}")
    with open_model(cached_path(entry)) as model_file:
        backend = load(model_file)
    check(backend, BEAM_CASES[SMOLLM2])


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        (SearchBook, "take_rows", "for sequence in group.live]", "for sequence in group.live[::-1]]"),
        (BeamGroupSearch, "advance", "beam.parent.row", "0"),
        (beam._Group, "advance", "/ length**self._length_penalty", "/ length"),
        (beam._Group, "_is_over", "return True", "pass"),
    ],
)
def test_mutants_are_caught(owner: Any, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name), old, new))
    with pytest.raises((AssertionError, IndexError)):
        check_tiny("llama", slice(0, 10))
