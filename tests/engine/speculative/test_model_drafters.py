"""Lookahead, layer skipping and a draft model in the engine: no bit of any answer changes, nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.config import SpeculativeConfig
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.engine.speculative import layer_skip as layer_skip_module
from pellucid.engine.speculative.draft_model import DraftModelDrafter
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.layer_skip import LayerSkipDrafter
from pellucid.engine.speculative.lookahead import LookaheadDrafter
from pellucid.engine.speculative.speculation import Speculation
from tests.engine.speculative.test_draft_model import check_blocks
from tests.engine.speculative.test_lossless import MAX_MODEL_LEN, WINDOWS, alone, load, requests_for, scheduled
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import answer_alone, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.mutants import mutant
from tests.support.schedules import SCHEDULES, Request, Run

NUM_DRAFT_BLOCKS = 60


def draft_model(backend: Backend, num_blocks: int = NUM_DRAFT_BLOCKS) -> DraftModelDrafter:
    backend.allocate_kv_cache(num_blocks)
    return DraftModelDrafter(
        backend, num_blocks=num_blocks, max_num_seqs=64, max_num_batched_tokens=150, max_model_len=MAX_MODEL_LEN
    )


def layer_skip(backend: Backend) -> LayerSkipDrafter:
    return LayerSkipDrafter(backend, max_num_seqs=64, max_model_len=MAX_MODEL_LEN)


def check(backend: Backend, requests: list[Request], drafters: dict[str, Callable[[], Drafter]]) -> dict[str, Run]:
    wanted = alone(backend, requests)
    runs: dict[str, Run] = {}
    for name, make in drafters.items():
        for schedule in SCHEDULES:
            drafter = make()
            got = runs[f"{name} {schedule}"] = scheduled(backend, requests, schedule, drafter)
            assert got.answers == wanted.answers, (name, schedule)
            assert got.logits == wanted.logits, (name, schedule)
            if isinstance(drafter, DraftModelDrafter):
                check_blocks(drafter)
                assert drafter._cache.pool.num_used == 0
            if isinstance(drafter, LookaheadDrafter):
                assert not drafter._states
    return runs


def drafters_of(backend: Backend, small: Backend) -> dict[str, Callable[[], Drafter]]:
    return {
        "lookahead": lambda: LookaheadDrafter(4, 8),
        "layer skip": lambda: layer_skip(backend),
        "draft model": lambda: draft_model(small),
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_native_core_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    backend, small = load(tmp_path, architecture, "cpu"), load(tmp_path / "small", "llama", "cpu")
    runs = check(backend, requests_for(20), drafters_of(backend, small))
    for name in ("lookahead", "layer skip", "draft model"):
        assert runs[f"{name} batched"].num_draft_tokens > 100
    assert runs["layer skip preempted"].num_preemptions > 5


def test_a_draft_model_that_is_the_model_is_always_right(tmp_path: Path) -> None:
    """Of requests without masks, which it does not know of, and however tokens are drawn."""
    (tmp_path / "small").mkdir()
    backend, small = load(tmp_path, "llama", "cpu"), load(tmp_path / "small", "llama", "cpu")
    params = [
        SamplingParams(temperature=0, max_tokens=40, seed=1, ignore_eos=True),
        SamplingParams(temperature=1.5, max_tokens=60, seed=2, ignore_eos=True, n=2),
        SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.3, max_tokens=60, seed=3, ignore_eos=True),
        SamplingParams(
            temperature=1.2, xtc_probability=0.5, dry_multiplier=0.8, max_tokens=60, seed=4, ignore_eos=True
        ),
    ]
    requests = [(list(range(number, 50)), each) for number, each in enumerate(params)]
    wanted = alone(backend, requests)
    got = scheduled(backend, requests, "batched", draft_model(small))
    assert got == wanted
    assert got.num_accepted_tokens == got.num_draft_tokens > 150


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_reference_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    backend = load(tmp_path, architecture, "reference")
    check(backend, requests_for(2, max_prompt_len=100), {"layer skip": lambda: layer_skip(backend)})


def test_every_window_gives_the_same_bits() -> None:
    """Over the fake backend, which finds keys and values of guesses that are read as if they were the model's own."""
    backend = FakeBackend(windows=WINDOWS)
    runs = check(backend, requests_for(12), drafters_of(backend, FakeBackend(windows=WINDOWS)))
    for name in ("layer skip", "draft model"):
        assert runs[f"{name} batched"].num_accepted_tokens > 20


def test_it_shows_where_guesses_are_taken_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: guessing begins a token early, and leaves there what is not computed again."""
    changed = mutant(layer_skip_module._shadow, "= sequence.num_computed_tokens", "= sequence.num_computed_tokens - 1")
    backend, requests = FakeBackend(), requests_for(12)
    wanted = alone(backend, requests)
    assert scheduled(backend, requests, "batched", layer_skip(backend)) == wanted
    monkeypatch.setattr(layer_skip_module, "_shadow", changed)
    with pytest.raises(AssertionError, match="leaves out layers wrote is read"):
        scheduled(backend, requests, "batched", layer_skip(backend))


class Asked(LayerSkipDrafter):
    """Notes whether the last plan had blocks yet to be copied, whenever it is asked."""

    last_plan: Plan
    num_asked = 0

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        self.num_asked += 1
        assert not self.last_plan.copies
        return super().propose(sequences, max_tokens)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_model_guesses_before_blocks_are_copied(adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess would write to blocks that are yet to be copied from, by whoever had them before."""
    backend = FakeBackend()
    drafter = Asked(backend, max_num_seqs=8, max_model_len=1024)
    engine = make_engine(
        backend=backend, drafter=drafter, speculative=SpeculativeConfig("layer_skip", adaptive=adaptive)
    )
    schedule, num_with_copies = Scheduler.schedule, []

    def noted(self: Scheduler, now: float) -> Plan:
        drafter.last_plan = plan = schedule(self, now)
        num_with_copies.append(bool(plan.copies))
        return plan

    monkeypatch.setattr(Scheduler, "schedule", noted)
    engine.add_request("forked", [5, 6, 7], SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True))
    engine.run()
    assert sum(num_with_copies) == 1
    assert drafter.num_asked > 0


def test_a_reset_gives_back_what_the_draft_model_holds() -> None:
    small = FakeBackend()
    drafter = draft_model(small)
    backend = FakeBackend()
    engine = make_engine(
        backend=backend, drafter=drafter, speculative=SpeculativeConfig("draft_model", draft_model="x", adaptive=False)
    )
    params = SamplingParams(n=2, seed=1, max_tokens=60, ignore_eos=True)
    engine.add_request("first", list(range(50)), params)
    for _ in range(5):
        engine.step()
    assert drafter._cache.pool.num_used > 0
    engine.reset(RuntimeError("a defect"))
    assert drafter._cache.pool.num_used == 0
    assert not drafter._shadows
    for _ in range(2):  # it goes on with the same drafter
        engine.replies.clear()
        engine.add_request("second", list(range(50)), params)
        engine.run()
        assert engine.replies["second"].outputs == answer_alone(range(50), params, seed=1).outputs
    assert drafter._cache.pool.num_used == 0


@pytest.mark.parametrize("end", ["abort", "stop", "length"])
def test_an_ended_request_gives_back_what_the_draft_model_holds(end: str) -> None:
    drafter = draft_model(FakeBackend())
    engine = make_engine(
        drafter=drafter,
        speculative=SpeculativeConfig("draft_model", num_draft_tokens=3, draft_model="x", adaptive=False),
    )
    answer = (
        answer_alone(range(50), SamplingParams(seed=1, max_tokens=25, ignore_eos=True), seed=1).outputs[0].token_ids
    )
    stop = next(token_id for token_id in answer[9:] if token_id not in answer[:9])
    engine.add_request("kept", list(range(9)), SamplingParams(seed=2, max_tokens=1000, ignore_eos=True))
    params = SamplingParams(
        seed=1,
        max_tokens=1000 if end == "abort" else 25,
        stop_token_ids=(stop,) if end == "stop" else (),
        ignore_eos=True,
    )
    engine.add_request("ended", list(range(50)), params)
    for _ in range(3):
        engine.step()
    assert len(drafter._shadows) == 2
    if end == "abort":
        engine.abort("ended")
    while "ended" not in engine.replies:
        engine.step()
    assert engine.replies["ended"].outputs[0].finish_reason == end
    assert [sequence.group.request_id for sequence in drafter._shadows] == ["kept"]
    check_blocks(drafter)
    engine.abort("kept")
    assert drafter._cache.pool.num_used == 0


def test_a_sequence_that_gave_way_gives_back_what_the_draft_model_holds() -> None:
    drafter = draft_model(FakeBackend())
    config = SpeculativeConfig("draft_model", num_draft_tokens=3, draft_model="x", adaptive=False)
    engine = make_engine(drafter=drafter, speculative=config)
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    for number in range(2):
        engine.add_request(str(number), list(range(number, 50)), params)
    for _ in range(3):
        engine.step()
    assert len(drafter._shadows) == 2
    engine.scheduler.preempt_last()
    gone = engine.scheduler.waiting[0]
    engine.pause("1")
    engine.step()
    assert gone not in drafter._shadows
    assert len(drafter._shadows) == 1
    engine.resume("1")
    engine.run()
    for number in range(2):
        assert engine.replies[str(number)].outputs == answer_alone(range(number, 50), params, seed=1).outputs


class Clock:
    """Seconds, which pass only where something is said to take them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedBackend(FakeBackend):
    """A step takes 1 second, and 0.1 for each token beyond the first."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._clock.now += 0.9 + 0.1 * batch.num_tokens
        return super().forward(batch)


class CostlyDrafter(ScriptedDrafter):
    """Guesses what is right, but for a share of `wrong`, and takes its time."""

    is_cheap = False

    def __init__(self, clock: Clock, truth: Any, wrong: float, *, preparing: float, guessing: float) -> None:
        super().__init__(VOCAB_SIZE, truth, wrong, shorten=0)
        self._clock = clock
        self._preparing = preparing
        self._guessing = guessing
        self._num_known: dict[Sequence, int] = {}

    def prepare(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            num_new = sequence.num_tokens - self._num_known.get(sequence, 0)
            self._clock.now += self._preparing * max(0, num_new - 5)
            self._num_known[sequence] = sequence.num_tokens

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        guesses = super().propose(sequences, max_tokens)
        self._clock.now += self._guessing * max(map(len, guesses), default=0)
        return guesses


LONG = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True, seed=9)


@cache
def long_answer() -> list[int]:
    return answer_alone(range(60), LONG, seed=0).outputs[0].token_ids


def seconds_of_long_answer(wrong: float, *, preparing: float, guessing: float) -> float:
    """How long 800 tokens take, for each second that they take without a guess."""
    clock, truth = Clock(), {(9, 0): long_answer()}
    drafter = CostlyDrafter(clock, truth, wrong, preparing=preparing, guessing=guessing)
    engine = make_engine(
        backend=TimedBackend(clock), drafter=drafter, speculative=SpeculativeConfig("layer_skip"), clock=clock
    )
    engine.add_request("a", list(range(60)), LONG)
    engine.run()
    assert engine.replies["a"].outputs[0].token_ids == long_answer()
    return clock.now / (0.9 + 0.1 * 60 + 799)


def test_a_drafter_that_pays_is_used() -> None:
    assert seconds_of_long_answer(0.1, preparing=0, guessing=0.1) < 0.6
    assert seconds_of_long_answer(0.3, preparing=0, guessing=0.3) < 0.95


@pytest.mark.parametrize(
    ("wrong", "preparing", "guessing"),
    [(0.4, 0, 0.8), (0.0, 0, 1.0), (1.0, 0, 0.01), (0.9, 0.05, 0.2), (0.7, 0.2, 0.5)],
)
def test_a_drafter_that_does_not_pay_costs_next_to_nothing(wrong: float, preparing: float, guessing: float) -> None:
    assert seconds_of_long_answer(wrong, preparing=preparing, guessing=guessing) < 1.03


def test_the_bound_notices_what_is_tried_out_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(Speculation._try_out, "self._debt > 0", "False")
    monkeypatch.setattr(Speculation, "_try_out", changed)
    assert seconds_of_long_answer(0.4, preparing=0, guessing=0.8) > 1.1


def test_the_bound_notices_preparations_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(Speculation._try_out, "(end - start +", "(end - prepared +")
    monkeypatch.setattr(Speculation, "_try_out", changed)
    assert seconds_of_long_answer(0.7, preparing=0.2, guessing=0.5) > 1.05
