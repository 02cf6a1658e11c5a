"""What requests and the engine count, held against what the backend was asked to compute."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.errors import QueueFullError
from pellucid.core.metrics import EngineMetrics
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import SequenceGroup
from pellucid.core.trace import StepDone
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.queues import Queues
from pellucid.engine.scheduler import Scheduler
from tests.support.counting import count_steps
from tests.support.engines import CheckedEngine, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


class CountingBackend(FakeBackend):
    """Attributes:
    num_tokens: tokens of the forward calls that did not fail.
    num_refused: requests that found the queue full.
    """

    num_tokens = 0
    num_refused = 0

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        num_tokens = batch.num_tokens
        output = super().forward(batch)
        self.num_tokens += num_tokens
        return output


def run_random_schedule(seed: int) -> tuple[CheckedEngine, CountingBackend]:
    """Prefix hits, chunks, preemptions, forks, aborts, failures, full queues."""
    rng = random.Random(seed)
    backend = CountingBackend()
    backend.fail_on = rng.choice([None, VOCAB_SIZE - 1])
    backend.fail_forwards = {rng.randrange(40) for _ in range(3)}
    engine = make_engine(
        backend=backend, num_blocks=rng.choice([9, 14]), max_model_len=500, max_num_batched_tokens=64, max_waiting=4
    )
    for number in range(25):
        prompt = [7] * rng.choice([0, 64, 130]) + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 70))]
        params = SamplingParams(max_tokens=rng.choice([1, 3, 60]), n=rng.choice([1, 1, 3]), seed=number)
        try:
            engine.add_request(str(number), prompt, params, priority=rng.choice([0, 1]))
        except QueueFullError:
            backend.num_refused += 1
        for _ in range(rng.randrange(6)):
            engine.step()
        if engine._groups and rng.random() < 0.2:
            engine.abort(rng.choice(list(engine._groups)))
        if rng.random() < 0.1:
            engine.scheduler.preempt_last()
    engine.run()
    return engine, backend


def check_counts(engine: CheckedEngine, backend: CountingBackend) -> EngineMetrics:
    replies = list(engine.replies.values())
    for reply in replies:
        one = reply.metrics
        assert one.prefill_tokens >= 0
        assert one.output_tokens == sum(map(len, one.token_times))
        assert len(one.inter_token_latencies) == one.decode_tokens
    metrics = engine.metrics()
    counters = metrics.counters
    assert metrics.prefill_tokens == sum(reply.metrics.prefill_tokens for reply in replies)
    assert metrics.decode_tokens == sum(reply.metrics.decode_tokens for reply in replies)
    assert metrics.prefill_tokens + metrics.decode_tokens == counters.computed_tokens == backend.num_tokens
    assert counters.output_tokens == sum(reply.metrics.output_tokens for reply in replies)
    assert counters.cached_tokens == sum(reply.metrics.cached_tokens for reply in replies)
    assert counters.preemptions == sum(reply.metrics.preemptions for reply in replies)
    assert metrics.unfinished_requests == metrics.running_sequences == metrics.waiting_sequences == 0
    assert counters.requests_failed == sum(reply.error is not None for reply in replies)
    assert counters.requests_refused == backend.num_refused
    assert counters.requests_received == len(replies) + counters.requests_refused
    return metrics


def test_counts_are_those_of_what_was_computed() -> None:
    totals = [check_counts(*run_random_schedule(seed)) for seed in range(12)]
    for field in ("requests_aborted", "requests_refused", "requests_failed", "preemptions", "cached_tokens"):
        assert sum(getattr(metrics.counters, field) for metrics in totals) > 0, f"too tame: no {field}"


@pytest.mark.parametrize(("owner", "forgetful"), [(Queues, "free"), (Scheduler, "_fork"), (Scheduler, "_admit")])
def test_mutants_that_forget_to_count_are_caught(monkeypatch: pytest.MonkeyPatch, owner: type, forgetful: str) -> None:
    original: Any = getattr(owner, forgetful)

    def forget(self: Any, *args: Any, **options: Any) -> None:
        groups = {sequence.group for sequence in (*self.running, *self.waiting, *self.paused)}
        before: dict[SequenceGroup, int] = {group: group.num_computed_elsewhere for group in groups}
        original(self, *args, **options)
        for group, count in before.items():
            group.num_computed_elsewhere = count

    monkeypatch.setattr(owner, forgetful, forget)
    runs = [run_random_schedule(seed) for seed in range(12)]
    with pytest.raises(AssertionError):
        [check_counts(*run) for run in runs]


def test_inter_token_latencies() -> None:
    now = [0.0]
    engine = make_engine(max_num_batched_tokens=10, clock=lambda: now[0])
    engine.add_request("x", [1] * 25, SamplingParams(max_tokens=4, ignore_eos=True, n=2))
    for seconds in (1, 1, 1, 5, 0.5, 0.25):
        now[0] += seconds
        engine.step()
    metrics = engine.replies["x"].metrics
    assert metrics.token_times == [[3.0, 8.0, 8.5, 8.75]] * 2
    assert metrics.inter_token_latencies == [5.0, 0.5, 0.25] * 2
    assert (metrics.prefill_tokens, metrics.decode_tokens) == (25, 6)
    engine.add_request("aborted", [1] * 25, GREEDY)
    engine.step()
    engine.abort("aborted")
    aborted = engine.replies["aborted"].metrics
    assert (aborted.prefill_tokens, aborted.token_times, aborted.inter_token_latencies) == (10, [[]], [])


def test_latencies_sum_to_the_time_of_decoding() -> None:
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], GREEDY)
    engine.run()
    metrics = engine.replies["x"].metrics
    assert sum(metrics.inter_token_latencies) == pytest.approx(metrics.decode)
    assert len(metrics.inter_token_latencies) == 19


def test_gauges() -> None:
    engine = make_engine(max_num_seqs=2, num_blocks=10, max_model_len=640)
    assert (engine.metrics().occupancy, engine.metrics().prefix_cache_hit_rate) == (0, 0)
    for number in range(3):
        engine.add_request(str(number), [7] * 129, GREEDY)
    engine.step()
    engine.step()
    metrics = engine.metrics()
    assert (metrics.running_sequences, metrics.waiting_sequences, metrics.unfinished_requests) == (2, 1, 3)
    assert (metrics.free_blocks + metrics.cached_blocks, metrics.used_blocks) == (10 - metrics.used_blocks, 4)
    assert metrics.kv_cache_usage == 0.4
    engine.run()
    metrics = engine.metrics()
    assert metrics.prefix_cache_hit_rate == (0 + 128 + 128) / (3 * 129)
    assert 0.5 < metrics.occupancy < 1
    assert metrics.counters.requests_finished == 3


def test_the_phases_are_the_whole_of_a_step() -> None:
    """Each reading of the clock moves it by one."""
    readings = iter(range(10**6))
    events: list[StepDone] = []

    class Sink:
        def emit(self, event: Any) -> None:
            if isinstance(event, StepDone):
                events.append(event)

    engine = make_engine(clock=lambda: float(next(readings)), trace=Sink())
    engine.add_request("x", [1] * 200, GREEDY)
    engine.run()
    times = engine.metrics().step_times
    assert all(event.times.schedule == event.times.build == event.times.forward == 1 for event in events)
    assert [event.times.sample for event in events] == [1] * len(events)
    for phase in ("total", "schedule", "build", "forward", "sample", "postprocess"):
        assert getattr(times, phase) == sum(getattr(event.times, phase) for event in events)
    assert all(event.times.postprocess > 0 for event in events)


def test_a_failed_step_counts_its_time_and_not_its_tokens() -> None:
    backend = CountingBackend()
    backend.fail_forwards = {2}
    readings = iter(range(10**6))
    engine = make_engine(backend=backend, clock=lambda: float(next(readings)))
    for name in "ab":
        engine.add_request(name, [1], GREEDY)
    engine.run()
    check_counts(engine, backend)
    assert engine.metrics().counters.steps == 20
    assert engine.metrics().step_times.postprocess > 0


def test_counting_costs_a_step_the_same_whatever_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: dict[int, int] = {}
    count = LLMEngine._count

    def counted(self: LLMEngine, plan: Any, output: Any) -> None:
        if len(plan.sequences) == plan.num_tokens > 0:
            costs[len(plan.sequences)] = count_steps(lambda: count(self, plan, output))
        else:
            count(self, plan, output)

    monkeypatch.setattr(LLMEngine, "_count", counted)
    engine = make_engine()
    for number in range(8):
        engine.add_request(str(number), [1 + number], GREEDY)
        engine.step()
        engine.step()
    engine.run()
    assert set(costs) == set(range(1, 9))
    assert all(cost == other for (_, cost), (_, other) in pairwise(costs.items()))
    assert max(costs.values()) < 25
