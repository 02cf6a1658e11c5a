"""Requests that are paused: their places and, where needed, their blocks go to others, and no answer changes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pellucid.core.errors import EngineError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.output_processor import OutputProcessor
from pellucid.engine.queues import Queues
from pellucid.engine.scheduler import Scheduler
from pellucid.kvcache.block_pool import CacheIntegrityError
from tests.support.engines import CheckedEngine, answer_alone, make_engine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.random_play import play

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def run_random_schedule(seed: int) -> CheckedEngine:
    """Requests that are paused, resumed, preempted and aborted; each that was not aborted is answered as if alone."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice([3, 4, 8])
    engine = make_engine(
        num_blocks=rng.choice([9, 12, 40]),
        max_model_len=500,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs, 64]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    for number in range(12):
        prompt = [7] * rng.choice([0, 64, 200]) + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 70))]
        params = SamplingParams(max_tokens=rng.choice([2, 20, 90]), n=rng.choice([1, 1, 3]), seed=number)
        requests[str(number)] = (prompt, params)
    aborted = play(engine, requests, rng, preempt=0.05, pause=0.3)
    for name, (prompt, params) in requests.items():
        if name not in aborted:
            assert engine.replies[name].outputs == answer_alone(prompt, params, seed=0, max_model_len=500).outputs
    return engine


@pytest.mark.parametrize("seed", range(30))
def test_pausing_changes_no_answer(seed: int) -> None:
    run_random_schedule(seed)


def test_a_paused_request_takes_part_in_no_step() -> None:
    engine = make_engine()
    for name in ("stays", "paused"):
        engine.add_request(name, [1, 2, 3], GREEDY, stream=True)
    engine.step()
    engine.pause("paused")
    for _ in range(5):
        engine.step()
    assert (len(engine.tokens["stays"]), len(engine.tokens["paused"])) == (6, 1)
    assert engine.metrics().paused_sequences == 1
    engine.resume("paused")
    engine.step()
    assert (len(engine.tokens["stays"]), len(engine.tokens["paused"])) == (7, 2)
    engine.run()
    assert engine.replies["paused"].metrics.preemptions == 0
    for name in ("unknown", "paused"):
        engine.pause(name)
        engine.resume(name)


def test_with_all_paused_there_is_no_work_and_nothing_is_lost() -> None:
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], GREEDY)
    engine.step()
    engine.pause("x")
    assert engine.has_unfinished()
    assert not engine.has_work()
    forwards = engine.metrics().counters.steps
    engine.step()
    assert engine.metrics().counters.steps == forwards
    engine.resume("x")
    assert engine.has_work()
    engine.run()
    assert engine.replies["x"].outputs == answer_alone([1, 2, 3], GREEDY, seed=0).outputs


def test_the_place_of_a_paused_request_is_free() -> None:
    engine = make_engine(max_num_seqs=2)
    for number in range(4):
        engine.add_request(str(number), [1 + number], GREEDY, stream=True)
    engine.step()
    assert set(engine.tokens) == {"0", "1"}
    engine.pause("0")
    engine.pause("1")
    engine.step()
    assert set(engine.tokens) == {"0", "1", "2", "3"}
    engine.resume("0")  # no place: it waits, before all who came later
    assert [sequence.group.request_id for sequence in engine.scheduler.waiting] == ["0"]
    engine.abort("3")
    engine.step()
    assert len(engine.tokens["0"]) == 2
    engine.resume("1")
    engine.run()
    assert engine.replies["0"].metrics.preemptions == 1


@pytest.mark.parametrize("when", ["growing", "admitted", "logits"])
def test_paused_requests_give_up_their_blocks_first(when: str) -> None:
    engine = make_engine(num_blocks=8, max_model_len=512, enable_prefix_caching=False)
    patient = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    engine.add_request("first", [1] * 100, patient)
    engine.add_request("paused", [2] * 100, GREEDY)
    engine.add_request("also paused", [2] * 100, GREEDY)
    for _ in range(3):
        engine.step()
    engine.pause("paused")
    engine.pause("also paused")
    if when == "growing":
        engine.add_request("long", [3] * 60, SamplingParams(max_tokens=200, ignore_eos=True))
        for _ in range(80):
            engine.step()
    elif when == "admitted":
        engine.add_request("long", [3] * 200, GREEDY)
        for _ in range(4):
            engine.step()
    else:
        engine.alone.logits([3] * 300)
    engine.scheduler.check_integrity()
    assert [sequence.num_computed_tokens > 0 for sequence in engine.scheduler.paused] == [when == "growing", False]
    engine.resume("paused")
    engine.resume("also paused")
    engine.run()
    assert engine.replies["first"].metrics.preemptions == 0
    for name, prompt, params in (("first", [1] * 100, patient), ("paused", [2] * 100, GREEDY)):
        assert engine.replies[name].outputs == answer_alone(prompt, params, seed=0).outputs


def test_a_paused_request_can_be_aborted() -> None:
    engine = make_engine()
    engine.add_request("x", [1] * 100, SamplingParams(n=3, max_tokens=50, ignore_eos=True))
    engine.step()
    engine.pause("x")
    engine.abort("x")
    assert not engine.has_unfinished()
    assert engine.scheduler.cache.pool.num_used == 0


def leak(self: Scheduler, sequence: Sequence) -> None:
    """Forgets the blocks of a paused sequence."""
    self._preempted.append(sequence)
    sequence.num_computed_tokens = 0
    sequence.num_registered_blocks = 0
    sequence.block_tables = []


def stay(self: Queues, sequence: Sequence) -> None:
    """Leaves the place of a paused sequence taken."""
    for queue in (self.running, self.waiting, self.paused):
        if sequence in queue:
            queue.remove(sequence)


@pytest.mark.parametrize(("owner", "method", "mutant"), [(Scheduler, "_preempt", leak), (Queues, "leave", stay)])
def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, mutant: Any) -> None:
    monkeypatch.setattr(owner, method, mutant)
    with pytest.raises(CacheIntegrityError):
        [run_random_schedule(seed) for seed in range(30)]


# Reset


def test_a_reset_fails_every_request_once_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request("done", [9], SamplingParams(max_tokens=1))
    engine.add_request("stream", [1] * 100, SamplingParams(max_tokens=30, ignore_eos=True, n=2), stream=True)
    engine.add_request("whole", [2] * 100, GREEDY)
    for _ in range(4):
        engine.step()
    process = OutputProcessor.process

    def broken(self: OutputProcessor, samples: Any, token_ids: Any, rows: Any, *rest: Any) -> None:
        process(self, samples[:1], token_ids[:1], rows[:1], *rest)
        raise ZeroDivisionError

    monkeypatch.setattr(OutputProcessor, "process", broken)
    told = len(engine.tokens["stream"])
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.undo()
    engine._checked(engine.reset(ZeroDivisionError("a defect")))
    assert not engine.has_unfinished()
    error = engine.replies["whole"].error
    assert isinstance(error, EngineError)
    assert "a defect" in error.message
    assert [engine.replies[name].error for name in ("done", "stream", "whole")] == [None, error, error]
    assert len(engine.tokens["stream"]) == told + 2  # what the step had told before it failed, and the end
    assert engine.tokens["stream"][-1].request_output is engine.replies["stream"]
    assert engine.metrics().counters.requests_failed == 2
    assert engine.scheduler.cache.pool.num_free == 64
    engine.add_request("after", [1] * 100, GREEDY)
    engine.run()
    assert engine.replies["after"].outputs == answer_alone([1] * 100, GREEDY, seed=0).outputs


def test_what_was_replied_before_the_defect_stands() -> None:
    engine = make_engine()
    engine.add_request("x", [1], SamplingParams(max_tokens=1))
    engine.scheduler.cache.pool.allocate()  # a leak, which is noticed when all are done
    with pytest.raises(CacheIntegrityError):
        engine.step()
    output = engine.reset(ZeroDivisionError())
    assert [reply.error for reply in output.finished] == [None]
    assert engine.metrics().unfinished_requests == 0
    engine.scheduler.check_idle()


def test_a_reset_forgets_which_rows_hold_which_tables() -> None:
    """Stamps begin anew with the cache manager, and would else name tables of before."""
    engine = make_engine()
    for _ in range(3):
        for number in range(3):
            engine.add_request(str(number), [5 + number] * 130, GREEDY)
        for _ in range(6):
            engine.step()
        engine.reset(ZeroDivisionError())
    engine.replies.clear()
    engine.add_request("x", [9] * 130, GREEDY)
    engine.run()
    assert engine.replies["x"].outputs == answer_alone([9] * 130, GREEDY, seed=0).outputs
