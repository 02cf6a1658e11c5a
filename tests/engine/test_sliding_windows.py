"""KV blocks that sliding windows have left behind go to others, and no bit of an answer shows it.

On real executors, with a tiny Gemma whose windows are of 40 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.kv_windows import first_visible_block
from pellucid.kvcache import cache_manager
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from tests.engine.test_bit_identity import MAX_MODEL_LEN, requests_for, tiny_model
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.schedules import SCHEDULES, Request, Run, run, run_alone
from tests.support.tiny_models import load_tiny

WINDOW = 40


def requests_of(backend: Backend) -> list[Request]:
    """Prompts of several windows and KV blocks."""
    max_prompt_len, count = (250, 2) if backend.name == "reference" else (600, 20)
    return [request for request in requests_for(100, max_prompt_len) if len(request[0]) > 180][:count]


def scheduled(backend: Backend) -> Run:
    return run(backend, FakeTokenizer(), requests_of(backend), max_model_len=MAX_MODEL_LEN, **SCHEDULES["preempted"])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return load_tiny(tiny_model(tmp_path, "gemma3"), request.param, threads=1)


@pytest.fixture
def wanted(backend: Backend) -> Run:
    """Each request alone, with nothing given back before its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheManager, "_release_behind_windows", lambda self, sequence: None)
        patch.setattr("tests.support.schedules.max_blocks_of_sequence", lambda windows, length, step: 1000)
        return run_alone(backend, FakeTokenizer(), requests_of(backend), max_model_len=MAX_MODEL_LEN)


def test_no_bit_shows(backend: Backend, wanted: Run) -> None:
    assert scheduled(backend) == wanted


def missing(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """The first block that a window shows is given back."""

    def too_early(position: int, window: int | None) -> int:
        return min(position // BLOCK_SIZE, first_visible_block(position, window) + (window is not None))

    monkeypatch.setattr(cache_manager, "first_visible_block", too_early)


def taken(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Something else is in the first block that a window shows."""
    forward = backend.forward

    def mutant(batch: ForwardBatch) -> ForwardOutput:
        tables = batch.block_tables.copy()
        for row, first in enumerate(batch.positions[batch.cu_seqlens[:-1]].tolist()):
            block = first_visible_block(first, WINDOW)
            if block < first // BLOCK_SIZE:
                tables[1:, row, block] = tables[1:, row, block + 1]
        return forward(replace(batch, block_tables=tables))

    monkeypatch.setattr(backend, "forward", mutant)


@pytest.mark.parametrize("mutate", [missing, taken])
def test_mutants_that_give_back_a_block_too_early_are_caught(
    mutate: Callable[[pytest.MonkeyPatch, Backend], None],
    backend: Backend,
    wanted: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch, backend)
    with pytest.raises((AssertionError, CacheIntegrityError)):
        assert scheduled(backend) == wanted
