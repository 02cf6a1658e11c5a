"""What the scheduler promises to those who wait and to those who run, with a mutant for each promise."""

from __future__ import annotations

import random

import pytest

from pellucid.core.config import SchedulerConfig, num_blocks_for
from pellucid.core.errors import QueueFullError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.kvcache.prefix_cache import MIN_PARTIAL_TOKENS
from tests.support.mutants import mutant
from tests.support.sequences import make_group

_fills = iter(range(1, 10**9))


def make_scheduler(num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, **options: float) -> Scheduler:
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, **options)  # type: ignore[arg-type]
    return Scheduler(config, CacheManager(num_blocks))


def add(scheduler: Scheduler, num_tokens: int, *, max_tokens: int = 1000, n: int = 1, priority: int = 0) -> Sequence:
    """Queue a request whose prompt no other one shares; its first sequence."""
    params = SamplingParams(max_tokens=max_tokens, n=n)
    group = make_group([next(_fills)] * num_tokens, params, priority=priority)
    scheduler.add(group)
    return group.sequences[0]


def step(scheduler: Scheduler, now: float = 0.0) -> Plan:
    plan = scheduler.schedule(now)
    scheduler.postprocess(plan, [7] * len(plan.samples))
    scheduler.check_integrity()
    return plan


# Those who run


def check_no_gaps(seed: int) -> int:
    """Every sequence that is at its last token has the next one chosen in every step, unless it is preempted; returns
    how often a prompt was cut while others decoded."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice([2, 4, 8])
    scheduler = make_scheduler(rng.choice([12, 40]), max_num_seqs, rng.choice([max_num_seqs, 11, 60]))
    num_cut = 0
    for number in range(120):
        if number < 60 and rng.random() < 0.3:
            n = rng.choice([1, 1, 2])
            add(scheduler, rng.randrange(1, 500), max_tokens=rng.randrange(1, 80), n=n, priority=rng.randrange(2))
        if rng.random() < 0.05:
            scheduler.preempt_last()
        decoding = [sequence for sequence in scheduler.running if sequence.num_output_tokens]
        decoding = [sequence for sequence in decoding if sequence.num_tokens - sequence.num_computed_tokens == 1]
        plan = step(scheduler)
        assert plan.num_tokens <= scheduler.config.max_num_batched_tokens, "over the budget"
        for sequence in decoding:
            assert sequence in plan.samples or sequence in plan.preempted, f"{sequence} had no token"
        num_cut += bool(decoding) and len(plan.samples) < len(plan.sequences)
    return num_cut


def test_a_running_sequence_has_its_token_in_every_step() -> None:
    assert sum(check_no_gaps(seed) for seed in range(40)) > 500


def test_mutant_greedy_prompt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that takes what is left of the budget, and leaves nothing to those after it."""
    greedy = mutant(Scheduler.schedule, "budget - (len(running) - index - 1)", "budget")
    monkeypatch.setattr(Scheduler, "schedule", greedy)
    with pytest.raises(AssertionError, match="over the budget"):
        test_a_running_sequence_has_its_token_in_every_step()


# Those who wait


def steps_until_admitted(scheduler: Scheduler, sequence: Sequence, limit: int) -> int:
    """Under a stream of later, smaller requests, one a step."""
    for number in range(limit):
        if sequence.group.first_scheduled_time is not None:
            return number
        add(scheduler, 20, max_tokens=30)
        step(scheduler)
    raise AssertionError(f"{sequence} has waited for {limit} steps")


@pytest.mark.parametrize("length", [20, 300, 640])
def test_a_large_prompt_is_not_passed_over_for_ever(length: int) -> None:
    """At worst it is admitted when all that ran before it have ended."""
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=32)
    for _ in range(4):
        add(scheduler, 20, max_tokens=30)
    step(scheduler)
    large = add(scheduler, length, max_tokens=1)
    assert steps_until_admitted(scheduler, large, limit=100) <= 4 + 30


def test_mutant_skipped_turn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who takes turns with the prompts before it."""
    skips = mutant(Scheduler.schedule, "in enumerate(running):", "in enumerate(running[: 1 + plan.num_tokens]):")
    monkeypatch.setattr(Scheduler, "schedule", skips)
    with pytest.raises(AssertionError, match="had no token"):
        test_a_running_sequence_has_its_token_in_every_step()


def test_mutant_last_come_first_served_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_admit", mutant(Scheduler._admit, "self.waiting[0]", "self.waiting[-1]"))
    with pytest.raises(AssertionError, match="has waited for 100 steps"):
        test_a_large_prompt_is_not_passed_over_for_ever(640)


def test_everybody_is_admitted_in_order_of_arrival() -> None:
    rng = random.Random(0)
    scheduler = make_scheduler(num_blocks=12, max_num_seqs=5, max_num_batched_tokens=40)
    added: list[Sequence] = []
    admitted: list[Sequence] = []
    while len(added) < 200:
        added += [add(scheduler, rng.randrange(1, 700), max_tokens=rng.randrange(1, 40))]
        for _ in range(rng.randrange(20)):
            admitted += step(scheduler).admitted
    while scheduler.has_unfinished():
        admitted += step(scheduler).admitted
    assert admitted == added


def test_the_preempted_come_back_first() -> None:
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=2, max_num_batched_tokens=64)
    first, second = (add(scheduler, 30, max_tokens=50) for _ in range(2))
    step(scheduler)
    late = [add(scheduler, 30, max_tokens=5) for _ in range(3)]
    scheduler.preempt_last()
    assert scheduler.waiting == [second, *late]
    step(scheduler)
    assert scheduler.running == [first, second]


@pytest.mark.parametrize("num_output_tokens", [1, 20, 64, 90])
def test_a_preempted_sequence_computes_again_only_a_few_tokens_of_its_last_block(num_output_tokens: int) -> None:
    scheduler = make_scheduler(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=512)
    sequence = add(scheduler, 300, max_tokens=400)
    num_computed = 0
    while sequence.num_output_tokens < num_output_tokens:
        num_computed += step(scheduler).num_tokens
    assert num_computed == sequence.num_computed_tokens
    scheduler.preempt_last()
    num_partial = num_computed % 64
    assert step(scheduler).num_tokens == 1 + (num_partial if num_partial < MIN_PARTIAL_TOKENS else 0)


def test_mutant_forgotten_blocks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def forgetful(self: Scheduler, sequence: Sequence) -> None:
        preempt(self, sequence)
        self.cache.reset_prefix_cache()

    monkeypatch.setattr(Scheduler, "_preempt", forgetful)
    with pytest.raises(AssertionError):
        test_a_preempted_sequence_computes_again_only_a_few_tokens_of_its_last_block(20)


def test_the_longest_wait_counts_until_first_scheduled() -> None:
    """One that was preempted has been promised an answer: it is not refused however long it waits then."""
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=2, max_num_batched_tokens=64, max_queue_seconds=5)
    first, second = (add(scheduler, 30, max_tokens=50) for _ in range(2))
    step(scheduler, now=4.0)
    scheduler.preempt_last()
    urgent = add(scheduler, 30, max_tokens=50, priority=-1)
    late = add(scheduler, 30, n=2)
    assert step(scheduler, now=5.0).expired == []
    assert scheduler.running == [urgent, first]
    plan = step(scheduler, now=60.0)
    assert plan.expired == late.group.sequences
    assert isinstance(late.error, QueueFullError)
    assert "waited 60.0 s to be scheduled; the limit is 5 s" in late.error.message
    assert second.status is SequenceStatus.WAITING
    while scheduler.has_unfinished():
        step(scheduler, now=1000.0)
    assert second.finish_reason == "length"


# Room


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("max_len", [64, 65, 200])
def test_the_smallest_pool_serves_everybody(n: int, max_len: int) -> None:
    """Room for one sequence of full length: forks and growth run out of it again and again, and all end well."""
    scheduler = make_scheduler(num_blocks_for(max_len), max_num_seqs=4, max_num_batched_tokens=30)
    groups: list[SequenceGroup] = []
    for length in (1, max_len - 1, max_len // 2, 63):
        groups.append(add(scheduler, length, max_tokens=max_len - length, n=n).group)
    for _ in range(5000):
        if not scheduler.has_unfinished():
            break
        step(scheduler)
    scheduler.check_idle()
    for group in groups:
        assert [sequence.num_tokens for sequence in group.sequences] == [max_len] * n
    assert n == 1 or max_len < 200 or sum(group.num_preemptions for group in groups) > 0


@pytest.mark.parametrize("max_len", [50, 128, 130])
def test_room_for_so_many_of_full_length_lets_so_many_run(max_len: int) -> None:
    """Nobody keeps a block free for tokens that it will never have."""
    scheduler = make_scheduler(4 * num_blocks_for(max_len), max_num_seqs=4, max_num_batched_tokens=500)
    for _ in range(4):
        add(scheduler, max_len - 5, max_tokens=5)
    assert len(step(scheduler).samples) == 4


def test_a_group_leaves_room_for_its_forks() -> None:
    """Its continuations grow apart: each needs blocks of its own beyond the prompt's."""
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=8, max_num_batched_tokens=500)
    add(scheduler, 100, max_tokens=60, n=6)
    add(scheduler, 200, max_tokens=10)
    preempted = []
    while scheduler.has_unfinished():
        preempted += step(scheduler).preempted
    assert preempted == []


def test_nobody_gives_way_in_vain() -> None:
    """A better priority pushes others out only where that makes the room it needs."""
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=500)
    equal = add(scheduler, 400, max_tokens=20, priority=0)
    worse = add(scheduler, 30, max_tokens=30, priority=1)
    step(scheduler)
    urgent = add(scheduler, 250, max_tokens=20, priority=0)
    assert step(scheduler).preempted == []
    assert scheduler.running == [equal, worse]
    while urgent.status is SequenceStatus.WAITING:
        step(scheduler)
    assert equal.is_finished
    assert urgent in scheduler.running
