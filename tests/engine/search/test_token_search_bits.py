"""Contrastive search and guidance: the same bits however a request is run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pellucid.backends.base import Backend
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.hidden_states import HiddenStates
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import make_engine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant
from tests.support.random_play import play
from tests.support.schedules import SCHEDULES, Request, Run, random_requests, run, run_alone
from tests.support.tiny_models import load_tiny, write_tiny_model
from tests.support.token_searches import CONTRASTIVE, GUIDED, PROMPT, answered, is_forgotten

MAX_MODEL_LEN = 320


def searching(count: int, max_prompt_len: int) -> list[Request]:
    """Requests of every kind, two of three of which search."""
    requests = random_requests(
        count, VOCAB_SIZE, max_prompt_len=max_prompt_len, stops=["e", ("ab", "Q")], max_tokens=(1, 4, 12)
    )
    searched: list[Request] = []
    for number, (prompt, params) in enumerate(requests):
        plain = replace(params, n=1, best_of=None, stop=params.stop)
        if number % 3 == 1:
            plain = SamplingParams(
                max_tokens=params.max_tokens,
                temperature=0,
                seed=params.seed,
                top_k=2 + number % 2,
                penalty_alpha=0.5,
                stop=params.stop,
                stop_token_ids=params.stop_token_ids,
                ignore_eos=params.ignore_eos,
            )
        elif number % 3 == 2:
            negative = [None, "never this", PROMPT[: 1 + number % 70]][number % 3]
            plain = replace(plain, guidance_scale=2.5, negative_prompt=negative)
        searched.append((prompt, plain if number % 3 else params))
    return searched


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma's embeddings are not tied here: its answers would be one token again and again."""
    folder, tied = tmp_path_factory.mktemp("models"), request.param == "llama"
    return write_tiny_model(folder / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE, tied=tied)


def alone(backend: Backend, requests: list[Request]) -> Run:
    return run_alone(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN)


def scheduled(backend: Backend, requests: list[Request], schedule: str) -> Run:
    options = dict(SCHEDULES[schedule])
    if "spare_blocks" in options:
        options["spare_blocks"] = 30 if len(backend.spec.layers) > 2 else 6  # of a few groups, not of all
    return run(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, **options)


@pytest.mark.parametrize(("name", "count"), [("reference", 6), ("cpu", 60)])
def test_every_schedule_gives_the_same_bits(path: Path, name: str, count: int) -> None:
    requests = searching(count, 140)
    backend = load_tiny(path, name)
    wanted = alone(backend, requests)
    preemptions = 0
    for schedule in SCHEDULES:
        found = scheduled(backend, requests, schedule)
        assert found.answers == wanted.answers, schedule
        assert found.logits == wanted.logits, schedule
        preemptions += found.num_preemptions
    backend.close()
    assert scheduled(load_tiny(path, name, threads=2), requests, "batched") == wanted
    assert preemptions > (20 if name == "cpu" else 0)


def test_nothing_of_them_is_guessed(path: Path) -> None:
    """The others are drafted in the same steps, and no answer changes."""
    backend = load_tiny(path, "cpu")
    requests = [
        (prompt, replace(params, dola_layers=[0]) if number % 6 == 0 else params)
        for number, (prompt, params) in enumerate(searching(30, 60))
    ]
    wanted = alone(backend, requests)
    drafter = ScriptedDrafter(VOCAB_SIZE, wrong=0.5)
    found = run(
        backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, drafter=drafter, **SCHEDULES["batched"]
    )
    assert found == wanted
    assert found.num_draft_tokens > 50
    assert {sequence.group.is_lockstep for sequence, _, _ in drafter.observed} == {False}
    assert all(sequence.group.sampling_params.dola_layers is None for sequence, _, _ in drafter.observed)


def hidden_states_of_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    want = mutant(HiddenStates._want, "begin + sequence.num_scheduled_tokens", "begin + 1")
    monkeypatch.setattr(HiddenStates, "_want", want)


def prefix_cache_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = mutant(HiddenStates.open, "group.max_cached_tokens = reader.num_known", "pass")
    monkeypatch.setattr(HiddenStates, "open", opened)


@pytest.mark.parametrize(
    "defect",
    [
        hidden_states_of_another_token,
        prefix_cache_trusted,
    ],
)
def test_mutants_are_caught(defect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = load_tiny(write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE), "reference")
    requests = [(prompt, replace(params, max_tokens=4)) for prompt, params in searching(12, 100)[1::3]]
    wanted = alone(backend, requests)
    schedules = ("cached", "preempted")
    assert [scheduled(backend, requests, schedule) for schedule in schedules] == [wanted, wanted]
    defect(monkeypatch)
    try:
        found = [scheduled(backend, requests, schedule) for schedule in schedules]
    except (AssertionError, ValueError, IndexError, KeyError):
        return
    assert found != [wanted, wanted]


def test_pausing_changes_nothing() -> None:
    engine = make_engine(num_blocks=30, max_num_seqs=6, max_num_batched_tokens=40)
    wanted = {"c": answered(engine, "c alone", CONTRASTIVE), "g": answered(engine, "g alone", GUIDED)}
    engine.add_request("c", PROMPT, CONTRASTIVE)
    engine.add_request("g", PROMPT, GUIDED)
    for number in range(12):
        name = "cg"[number % 2]
        engine.step()
        engine.pause(name)
        engine.step()
        if number % 3 == 0:
            engine.scheduler.preempt_last()
        engine.resume(name)
    engine.run()
    assert {name: engine.replies[name].outputs[0] for name in wanted} == wanted


def run_random_schedule(seed: int) -> int:
    """Searches among others that are paused, resumed, preempted and aborted: each that was not aborted is answered as
    if alone. How often one gave way."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice([4, 6, 9])
    engine = make_engine(
        num_blocks=rng.choice([24, 30, 60]),
        max_model_len=300,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs, 20, 100]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    for number in range(12):
        prompt = [7] * rng.choice([0, 64, 130]) + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 50))]
        max_tokens = rng.choice([1, 7, 30])
        params = rng.choice(
            [
                replace(CONTRASTIVE, max_tokens=max_tokens, top_k=rng.choice([2, 3, 4]), ignore_eos=False),
                replace(GUIDED, max_tokens=max_tokens, seed=number, negative_prompt=rng.choice([None, [9] * 90])),
                SamplingParams(max_tokens=max_tokens, seed=number, n=rng.choice([1, 3])),
                SamplingParams(max_tokens=max_tokens, seed=number, dola_layers=[0]),
            ]
        )
        requests[str(number)] = (prompt, params)
    aborted = play(engine, requests, rng, pause=0.3)
    for name, (prompt, params) in requests.items():
        if name not in aborted:
            one = make_engine(num_blocks=60, max_model_len=300, max_num_batched_tokens=400)
            one.add_request(name, prompt, params)
            one.run()
            assert engine.replies[name].outputs == one.replies[name].outputs, (seed, name)
    assert is_forgotten(engine)
    return sum(reply.metrics.preemptions for reply in engine.replies.values())


def test_random_schedules_change_no_answer() -> None:
    assert sum(run_random_schedule(seed) for seed in range(6)) > 10
