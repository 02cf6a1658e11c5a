"""Guessing ahead changes no bit of any answer: whoever guesses, however the requests are scheduled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig
from pellucid.core.errors import BackendError
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.engine.speculative import speculation
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.ngram import NgramDrafter
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.weights.loader import open_model
from tests.support.drafters import ScriptedDrafter
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import ALPHABET, FakeTokenizer
from tests.support.mutants import mutant
from tests.support.schedules import SCHEDULES, Request, Run, random_requests, run, run_alone
from tests.support.tiny_models import write_tiny_model

MAX_MODEL_LEN = 340
MAX_PROMPT_LEN = 300
WINDOWS = (None, 100, 70, 1)


def load(folder: Path, architecture: str, name: Any) -> Backend:
    path = write_tiny_model(folder / "tiny.gguf", architecture, vocab_size=VOCAB_SIZE)
    with open_model(path) as model_file:
        try:
            return load_backend(model_file, BackendConfig(name, 1), kv_cache_dtype="f16")
        except BackendError as error:
            if "not installed" in error.message:
                pytest.skip("the native core is not built")
            raise


def requests_for(count: int, max_prompt_len: int = MAX_PROMPT_LEN) -> list[Request]:
    stops = ["e", ("ab", "Q"), "z"]
    return random_requests(count, VOCAB_SIZE, max_prompt_len=max_prompt_len, stops=stops, max_tokens=(1, 4, 12, 40))


def alone(backend: Backend, requests: list[Request]) -> Run:
    return run_alone(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN)


def scheduled(backend: Backend, requests: list[Request], schedule: str, drafter: Drafter) -> Run:
    arguments: dict[str, Any] = SCHEDULES[schedule]
    return run(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, drafter=drafter, **arguments)


def truth_of(requests: list[Request], wanted: Run) -> dict[tuple[int, int], list[int]]:
    return {
        (params.seed or 0, output.index): output.token_ids[len(prompt) if params.echo else 0 :]
        for (prompt, params), outputs in zip(requests, wanted.answers, strict=True)
        for output in outputs
        if params.num_sequences == params.n  # else its index is its rank
    }


def drafters(requests: list[Request], wanted: Run) -> dict[str, Callable[[], Drafter]]:
    truth = truth_of(requests, wanted)
    return {
        "prompt lookup": lambda: NgramDrafter(1, 3),
        "adversary": lambda: ScriptedDrafter(VOCAB_SIZE),
        "oracle": lambda: ScriptedDrafter(VOCAB_SIZE, truth),
        "often right": lambda: ScriptedDrafter(VOCAB_SIZE, truth, wrong=0.2),
    }


def check_all(backend: Backend, requests: list[Request]) -> dict[str, Run]:
    """Each drafter under each schedule; what each came to."""
    wanted = alone(backend, requests)
    runs: dict[str, Run] = {}
    for name, make in drafters(requests, wanted).items():
        for schedule in SCHEDULES:
            got = runs[f"{name} {schedule}"] = scheduled(backend, requests, schedule, make())
            assert got.answers == wanted.answers, (name, schedule)
            assert got.logits == wanted.logits, (name, schedule)
            assert got.prompt_logprobs == wanted.prompt_logprobs, (name, schedule)
    return runs


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_drafter_and_schedule_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    requests = [(prompt, replace(params, best_of=None)) for prompt, params in requests_for(60)]  # which hide the truth
    runs = check_all(load(tmp_path, architecture, "cpu"), requests)
    # They would prove little if none of these happened.
    assert runs["prompt lookup batched"].num_draft_tokens > 500
    assert runs["adversary batched"].num_accepted_tokens < 0.1 * runs["adversary batched"].num_draft_tokens
    assert runs["oracle batched"].num_accepted_tokens > 0.8 * runs["oracle batched"].num_draft_tokens
    assert runs["often right preempted"].num_preemptions > 20
    assert runs["often right cached"].num_cached_tokens > 1000


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_reference_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    check_all(load(tmp_path, architecture, "reference"), requests_for(3, max_prompt_len=130))


def test_every_window_gives_the_same_bits() -> None:
    """Over the fake backend, which finds every block that is missing, wrong or given back too early."""
    check_all(FakeBackend(windows=WINDOWS), requests_for(20))


def test_a_dead_end_after_a_wrong_guess_is_none() -> None:
    """Nothing may follow an `a`; the answer has none, but every guess has. And one whose answer comes to that fails."""
    a, b = (ALPHABET.index(character) for character in "ab")
    lives: dict[str, Any] = {"allowed_token_ids": [a, b], "bad_words": ["aa", "ab"], "max_tokens": 20, "temperature": 0}
    requests = [
        ([5, 6], SamplingParams(seed=1, logit_bias={b: 100}, **lives)),
        (
            [5, 6],
            SamplingParams(
                seed=2, logits_processors=[dead_after_a], **{**lives, "bad_words": [], "logit_bias": {b: 100}}
            ),
        ),
        ([5, 6], SamplingParams(seed=3, logit_bias={a: 100}, **lives)),
    ]
    wanted = alone(FakeBackend(), requests)
    assert [[set(output.token_ids) for output in outputs] for outputs in wanted.answers] == [[{b}], [{b}], []]
    assert wanted.errors == [None, None, "allowed_token_ids"]
    truth = {(seed, 0): [a] * 20 for seed in (1, 2, 3)}
    for schedule in SCHEDULES:
        got = scheduled(FakeBackend(), requests, schedule, ScriptedDrafter(VOCAB_SIZE, truth))
        assert got == wanted


def dead_after_a(token_ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if token_ids and token_ids[-1] == ALPHABET.index("a"):
        raise ValueError("nothing follows an a")
    return logits


# Mutants


def accept_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(speculation._is_right, "drafts[offset] == token_id", "(offset == 0 or drafts[offset] == token_id)")
    monkeypatch.setattr(speculation, "_is_right", changed)


def chosen_after_the_wrong_number_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(InputBuilder.build_sampling, "+= np.array(draft_offsets, np.uint32)", "+= 0")
    monkeypatch.setattr(InputBuilder, "build_sampling", changed)


def logits_of_the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(
        InputBuilder.build,
        "logits_rows += range(len(input_ids) - num_drafts, len(input_ids))",
        "logits_rows += range(len(input_ids) - num_drafts - 1, len(input_ids) - 1)",
    )
    monkeypatch.setattr(InputBuilder, "build", changed)


def wrong_drafts_count_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(Scheduler.postprocess, "-= len(sequence.draft_token_ids)", "-= 0")
    monkeypatch.setattr(Scheduler, "postprocess", changed)


def wrong_drafts_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    postprocess = Scheduler.postprocess

    def changed(self: Scheduler, plan: Plan, token_ids: list[int]) -> None:
        for sequence in plan.drafted:
            known, computed = sequence.num_tokens, sequence.num_computed_tokens
            sequence.token_ids += sequence.draft_token_ids
            sequence.num_computed_tokens = sequence.num_tokens
            self.cache.commit(sequence)
            sequence.num_computed_tokens = computed
            del sequence.token_ids[known:]
        postprocess(self, plan, token_ids)

    monkeypatch.setattr(Scheduler, "postprocess", changed)


def a_token_after_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(speculation._is_right, "and not sequence.is_finished", "")
    monkeypatch.setattr(speculation, "_is_right", changed)


@pytest.mark.parametrize(
    "mutate",
    [
        accept_one_too_many,
        chosen_after_the_wrong_number_of_drafts,
        logits_of_the_token_before,
        wrong_drafts_count_as_computed,
        wrong_drafts_are_registered,
        a_token_after_the_stop,
    ],
)
def test_mutants_are_caught(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    backend, requests = FakeBackend(windows=WINDOWS), requests_for(40)
    wanted = alone(backend, requests)
    drafter = drafters(requests, wanted)["often right"]
    assert scheduled(backend, requests, "batched", drafter()) == wanted
    mutate(monkeypatch)
    try:
        got = scheduled(backend, requests, "batched", drafter())
    except (CacheIntegrityError, AssertionError, KeyError):
        return
    assert got != wanted
