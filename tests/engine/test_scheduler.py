"""The scheduler alone: plans in, made-up tokens out."""

from __future__ import annotations

import random

import pytest

from pellucid.core.config import SchedulerConfig
from pellucid.core.errors import QueueFullError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from tests.support.sequences import make_group


def make_scheduler(
    num_blocks: int = 30,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    windows: tuple[int | None, ...] = (None,),
) -> Scheduler:
    cache = CacheManager(num_blocks, windows=windows)
    return Scheduler(SchedulerConfig(max_num_seqs, max_num_batched_tokens), cache)


def group_of(num_tokens: int, *, max_tokens: int = 100, n: int = 1, priority: int = 0, fill: int = 1) -> SequenceGroup:
    return make_group([fill] * num_tokens, SamplingParams(max_tokens=max_tokens, n=n), priority=priority)


def advance(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    check_plan(scheduler, plan)
    scheduler.postprocess(plan, [7] * len(plan.samples))
    scheduler.check_integrity()
    return plan


def check_plan(scheduler: Scheduler, plan: Plan) -> None:
    config = scheduler.config
    counts = [sequence.num_scheduled_tokens for sequence in plan.sequences]
    assert plan.sequences == scheduler.running, "every running sequence advances in every step"
    assert all(count >= 1 for count in counts)
    assert sum(counts) == plan.num_tokens <= config.max_num_batched_tokens
    assert len(plan.samples) <= config.max_num_seqs
    for sequence in plan.sequences:
        end = sequence.num_computed_tokens + sequence.num_scheduled_tokens
        assert end <= min(sequence.num_tokens, 64 * len(sequence.block_tables[0]))
        assert (sequence in plan.samples) == (end == sequence.num_tokens)


@pytest.mark.parametrize("block", [0, 1, 2] + [pytest.param(block, marks=pytest.mark.slow) for block in range(3, 40)])
def test_thousands_of_random_schedules(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        windows = rng.choice([(None,), (None,), (None, 100, 100), (40,), (130, 1)])
        num_blocks = len(windows) * rng.choice([6, 10, 40])
        scheduler = make_scheduler(num_blocks, rng.choice([1, 3, 8]), rng.choice([8, 50, 500]), windows)
        groups: list[SequenceGroup] = []
        preemptions = 0
        for _ in range(10):
            n = rng.randint(1, min(3, scheduler.config.max_num_seqs))
            group = group_of(rng.randrange(1, 200), max_tokens=rng.randrange(1, 100), n=n, priority=rng.randrange(2))
            groups.append(group)
            scheduler.add(group)
            for _ in range(rng.randrange(8)):
                preemptions += len(advance(scheduler).preempted)
            if rng.random() < 0.2:
                scheduler.finish_group(rng.choice(groups), "abort")
                scheduler.check_integrity()
        steps = 0
        while scheduler.has_unfinished():
            steps += 1
            assert steps < 10_000, "no progress"
            preemptions += len(advance(scheduler).preempted)
        scheduler.check_idle()
        for group in groups:
            assert group.num_unfinished == 0
            for sequence in group.sequences:
                assert sequence.finish_reason in ("length", "abort")
                assert sequence.finish_reason == "abort" or sequence.num_tokens == sequence.max_length
        assert preemptions == sum(group.num_preemptions for group in groups)


def test_one_rule() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    chunked, short = group_of(150), group_of(10, fill=2)
    scheduler.add(chunked)
    scheduler.add(short)
    counts = []
    for _ in range(4):
        plan = scheduler.schedule()
        counts.append([sequence.num_scheduled_tokens for sequence in plan.sequences])
        scheduler.postprocess(plan, [7] * len(plan.samples))
    assert counts == [[64], [64], [22, 10], [1, 1]]


def test_the_long_leaves_one_token_for_each_that_follows() -> None:
    scheduler = make_scheduler(num_blocks=100, max_num_batched_tokens=16)
    followers = [group_of(3, fill=fill) for fill in (2, 3)]
    for group in followers:
        scheduler.add(group)
    advance(scheduler)
    scheduler.add(group_of(1000, priority=-1))
    plan = scheduler.schedule()
    assert [sequence.num_scheduled_tokens for sequence in plan.sequences] == [14, 1, 1]
    assert len(plan.samples) == 2


def test_first_come_first_served_within_a_priority() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    groups = [group_of(5, max_tokens=2, priority=priority, fill=1 + i) for i, priority in enumerate((1, 0, 1, 0))]
    for group in groups:
        scheduler.add(group)
    finished: list[Sequence] = []
    while scheduler.has_unfinished():
        finished += [sequence for sequence in advance(scheduler).samples if sequence.is_finished]
    assert finished == [groups[index].sequences[0] for index in (1, 3, 0, 2)]


def test_running_out_of_blocks_preempts_the_last() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=500)
    groups = [group_of(100, max_tokens=200, fill=1 + i) for i in range(2)]
    for group in groups:
        scheduler.add(group)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = advance(scheduler).preempted
    assert preempted == groups[1].sequences
    assert preempted[0].status is SequenceStatus.WAITING
    assert preempted[0].num_blocks == 0
    while scheduler.has_unfinished():
        advance(scheduler)
    assert groups[0].num_preemptions == 0


def test_admission_leaves_room_for_those_who_run() -> None:
    scheduler = make_scheduler(num_blocks=10, max_num_batched_tokens=500)
    scheduler.add(group_of(400, max_tokens=50))
    advance(scheduler)
    late = group_of(150, fill=2)
    scheduler.add(late)
    for _ in range(20):
        plan = advance(scheduler)
        assert not plan.preempted
    assert late.sequences[0].status is SequenceStatus.WAITING


def test_a_group_takes_all_its_places_at_once_and_forks_after_the_prompt() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=64)
    group, late = group_of(100, n=3), group_of(5, n=2, fill=2)
    scheduler.add(group)
    scheduler.add(late)
    assert advance(scheduler).samples == []
    plan = advance(scheduler)
    assert plan.samples == group.sequences
    assert plan.sequences == [group.sequences[0]]
    assert scheduler.running == group.sequences
    assert late.sequences[0].status is SequenceStatus.WAITING
    tables = [sequence.block_tables for sequence in group.sequences]
    assert tables[0] == tables[1] == tables[2]
    plan = advance(scheduler)
    assert len(plan.copies) == 2
    assert len({sequence.block_tables[0][1] for sequence in group.sequences}) == 3


def test_a_failed_step_leaves_nothing_findable() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=500)
    group = group_of(200)
    scheduler.add(group)
    scheduler.schedule()
    scheduler.finish_group(group, "error")
    scheduler.check_idle()
    assert scheduler.cache.pool.num_cached == 0


def test_finishing_twice_changes_nothing() -> None:
    scheduler = make_scheduler()
    group = group_of(5)
    scheduler.add(group)
    assert scheduler.finish_group(group, "abort") == group.sequences
    assert scheduler.finish_group(group, "error") == []
    assert group.sequences[0].finish_reason == "abort"
    assert group.num_unfinished == 0


def test_queue_limit() -> None:
    scheduler = Scheduler(SchedulerConfig(4, 64, max_waiting=1), CacheManager(4))
    scheduler.add(group_of(1))
    with pytest.raises(QueueFullError):
        scheduler.add(group_of(1))


@pytest.mark.parametrize("damage", ["order", "status", "slots", "blocks"])
def test_mutants_are_caught(damage: str) -> None:
    scheduler = make_scheduler()
    for fill in (1, 2):
        scheduler.add(group_of(5, fill=fill))
    advance(scheduler)
    if damage == "order":
        scheduler.running.reverse()
    elif damage == "status":
        scheduler.running[0].status = SequenceStatus.WAITING
    elif damage == "slots":
        scheduler._queues.num_slots += 1
    else:
        scheduler.running.pop()
        scheduler._queues.num_slots -= 1
    with pytest.raises(CacheIntegrityError):
        scheduler.check_integrity()
    with pytest.raises(CacheIntegrityError):
        scheduler.check_idle()
