"""Beam search over real kernels: the same answers and the same logits to the bit, however it is scheduled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pellucid.backends.base import Backend
from pellucid.engine.speculative.ngram import NgramDrafter
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.schedules import SCHEDULES, Request, Run, random_requests, run, run_alone
from tests.support.tiny_models import load_tiny, write_tiny_model

MAX_MODEL_LEN = 240


def requests_with_beams(count: int) -> list[Request]:
    """Requests with transforms of every kind, half of which search with beams."""
    requests = random_requests(
        count, VOCAB_SIZE, max_prompt_len=140, stops=["e", ("ab", "Q")], max_tokens=(1, 4, 12, 40)
    )
    for number, (prompt, params) in enumerate(requests[::2]):
        num_groups = 2 if number % 4 == 3 else 1
        searching = replace(
            params,
            temperature=0,
            n=1 + number % 2,
            best_of=None,
            num_beams=2 + number % 2 if num_groups == 1 else 4,
            num_beam_groups=num_groups,
            diversity_penalty=num_groups - 1,
            early_stopping=(True, False, "never")[number % 3],
            logprobs_mode="processed",
        )
        requests[2 * number] = prompt, searching
    return requests


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tied = tmp_path_factory.mktemp("models"), request.param == "llama"
    return write_tiny_model(folder / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE, tied=tied)


def scheduled(backend: Backend, requests: list[Request], schedule: str, **options: Any) -> Run:
    options = {**SCHEDULES[schedule], **options}
    if "spare_blocks" in options:
        options["spare_blocks"] = 70 if len(backend.spec.layers) > 2 else 8  # of a few groups, not of all
    return run(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, **options)


@pytest.mark.parametrize(("name", "count"), [("reference", 6), ("cpu", 30)])
def test_every_schedule_gives_the_same_bits(path: Path, name: str, count: int) -> None:
    requests = requests_with_beams(count)
    backend = load_tiny(path, name)
    wanted = run_alone(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN)
    preemptions = 0
    for schedule in SCHEDULES:
        found = scheduled(backend, requests, schedule)
        assert found.answers == wanted.answers, schedule
        assert found.logits == wanted.logits, schedule
        preemptions += found.num_preemptions
    backend.close()
    assert scheduled(load_tiny(path, name, threads=2), requests, "batched") == wanted
    assert preemptions > (20 if name == "cpu" else 0)


def test_beside_drafted_ones(path: Path) -> None:
    requests = requests_with_beams(24)
    backend = load_tiny(path, "cpu")
    wanted = run_alone(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN)
    for schedule in ("batched", "chunked", "preempted"):
        found = scheduled(backend, requests, schedule, drafter=NgramDrafter(1, 3))
        assert found == wanted, schedule
        assert found.num_draft_tokens > 0
