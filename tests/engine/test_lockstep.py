"""Lockstep groups: whatever the schedule, their live sequences are computed to the end together."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike

import pytest

from pellucid.core.config import BLOCK_SIZE, SchedulerConfig, num_blocks_for
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.lockstep import LockstepGroups
from pellucid.engine.queues import Queues
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.kvcache.prefix_cache import chain_digest, encode_tokens, root_digest
from tests.support.mutants import mutant
from tests.support.sequences import make_group


class Searched:
    """A scheduler and what random searches make of its lockstep groups.

    Attributes:
        steps: of each group, how often its search was asked.
    """

    def __init__(self, seed: int, *, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs, max_num_batched_tokens),
            CacheManager(num_blocks, enable_prefix_caching=self.random.random() < 0.7),
        )
        self.steps: dict[SequenceGroup, int] = {}
        self.preemptions = 0

    def add(self, length: int, num_lockstep: int | None, *, max_tokens: int = 40, priority: int = 0) -> SequenceGroup:
        prompt = [self.random.randrange(50) for _ in range(length)]
        params = SamplingParams(max_tokens=max_tokens)
        group = make_group(prompt, params, num_lockstep=num_lockstep, priority=priority)
        if num_lockstep is not None:
            self.steps[group] = 0
        self.scheduler.add(group)
        return group

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        budget = self.scheduler.config.max_num_batched_tokens
        assert plan.num_tokens == sum(sequence.num_scheduled_tokens for sequence in plan.sequences) <= budget
        searched = [sequence for group in plan.searches for sequence in group.live]
        assert [sequence for sequence in plan.samples if sequence.group.is_lockstep] == sorted(
            searched, key=lambda sequence: sequence.order
        )
        plan.samples = [sequence for sequence in plan.samples if not sequence.group.is_lockstep]
        self.scheduler.postprocess(plan, [7] * len(plan.samples))
        for group in plan.searches:
            self.search(group)
        self.scheduler.check_integrity()
        self.preemptions += len(plan.preempted)
        return plan

    def search(self, group: SequenceGroup) -> None:
        self.steps[group] += 1
        if len(group.live[0].token_ids) >= group.live[0].max_length - 1 or self.random.random() < 0.02:
            self.scheduler.finish_group(group, "stop")
            return
        before = [list(sequence.token_ids) for sequence in group.live]
        count = self.random.randint(1, len(group.sequences))
        chosen = [(self.random.randrange(len(before)), self.random.randrange(50)) for _ in range(count)]
        self.scheduler.advance(group, chosen)
        assert [sequence.token_ids for sequence in group.live] == [[*before[parent], token] for parent, token in chosen]

    def run(self, steps: int = 5000) -> None:
        for _ in range(steps):
            if not self.scheduler.has_unfinished():
                break
            assert self.step().sequences, "a step that computes nothing"
        self.scheduler.check_idle()


def digests(sequence: Sequence) -> list[bytes]:
    """Of its full blocks, chained."""
    chain = [root_digest(sequence.group.cache_salt)]
    for begin in range(0, sequence.num_tokens - BLOCK_SIZE + 1, BLOCK_SIZE):
        chain.append(chain_digest(chain[-1], encode_tokens(sequence.token_ids[begin : begin + BLOCK_SIZE])))
    return chain[1:]


def random_run(seed: int) -> Searched:
    """Lockstep groups among others, with chunks, preemptions, pauses and aborts."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice([4, 6, 9])
    budget = rng.choice([max_num_seqs, 11, 60, 300])
    searched = Searched(
        seed, num_blocks=rng.choice([12, 16, 40]), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )
    groups: list[SequenceGroup] = []
    paused: list[SequenceGroup] = []
    for _ in range(100):
        if rng.random() < 0.25 and len(groups) < 30:
            lockstep = rng.choice([None, 1, 2, 3, 4])
            groups.append(searched.add(rng.randrange(1, 140), lockstep, priority=rng.randrange(2)))
        if rng.random() < 0.06:
            searched.scheduler.preempt_last()
        if groups and rng.random() < 0.06:
            paused.append(rng.choice(groups))
            searched.scheduler.pause(paused[-1])
        if paused and rng.random() < 0.1:
            searched.scheduler.resume(paused.pop())
        if groups and rng.random() < 0.04:
            searched.scheduler.finish_group(rng.choice(groups), "abort")
        searched.scheduler.check_integrity()
        searched.step()
    for group in paused:
        searched.scheduler.resume(group)
    searched.run()
    return searched


def random_runs(seeds: ListLike[int] = range(30)) -> list[Searched]:
    return [random_run(seed) for seed in seeds]


def test_random_schedules() -> None:
    runs = random_runs()
    assert sum(run.preemptions for run in runs) > 100
    assert sum(sum(run.steps.values()) for run in runs) > 1000


@pytest.mark.parametrize("num_lockstep", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_the_smallest_pool_that_holds_a_group_serves_it(num_lockstep: int, length: int) -> None:
    """However its sequences fork: also after preemptions, what they share is shared again."""
    for seed in range(5):
        searched = Searched(seed, num_blocks=1000, max_num_seqs=4, max_num_batched_tokens=30)
        group = make_group([3] * length, SamplingParams(max_tokens=140), num_lockstep=num_lockstep)
        num_blocks = searched.scheduler.cache.max_blocks_of_group(group, 30)
        assert num_blocks <= num_lockstep * num_blocks_for(length + 140)
        searched = Searched(seed, num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=30)
        searched.steps[group] = 0
        searched.scheduler.add(group)
        searched.add(20, None)
        while searched.scheduler.has_unfinished():
            searched.step()
            if searched.random.random() < 0.05:
                searched.scheduler.preempt_last()


def test_a_group_keeps_its_places_from_the_start() -> None:
    searched = Searched(0, num_blocks=40, max_num_seqs=5, max_num_batched_tokens=200)
    searched.add(100, 4)
    others = [searched.add(10, None).sequences[0] for _ in range(2)]
    searched.step()
    assert [sequence.status for sequence in others] == [SequenceStatus.RUNNING, SequenceStatus.WAITING]


def test_a_preempted_group_computes_what_it_shares_once() -> None:
    scheduler = Scheduler(SchedulerConfig(4, 512), CacheManager(40, enable_prefix_caching=False))
    group = make_group([3] * 200, num_lockstep=3)
    scheduler.add(group)
    for tokens in ([1, 2, 3], [4, 5, 6]):
        plan = scheduler.schedule()
        plan.samples = []
        scheduler.postprocess(plan, [])
        scheduler.advance(group, [(min(index, len(group.live) - 1), token) for index, token in enumerate(tokens)])
    scheduler.preempt_last()
    scheduler.check_integrity()
    assert scheduler.waiting == [group.lead]
    assert group.lead.token_ids == [3] * 193
    plan = scheduler.schedule()
    assert (plan.sequences, plan.num_tokens, plan.searches) == ([group.lead], 192, [])
    scheduler.postprocess(plan, [])
    plan = scheduler.schedule()
    assert (plan.sequences, plan.num_tokens, plan.searches) == (group.sequences, 3 * 10, [group])
    assert [sequence.token_ids[200:] for sequence in group.live] == [[1, 4], [2, 5], [3, 6]]
    assert sum(sequence.num_blocks for sequence in group.live) - scheduler.cache.pool.num_used == 2 * 3


def go_apart_and_be_preempted() -> SequenceGroup:
    """A group whose sequences differ in their first block, computed again with a prefix cache that has lost it all."""
    scheduler = Scheduler(SchedulerConfig(3, 512), CacheManager(40))
    group = make_group([3] * 60, num_lockstep=3)
    scheduler.add(group)
    for step in range(12):
        if step == 10:
            scheduler.preempt_last()
            scheduler.cache.reset_prefix_cache()
        plan = scheduler.schedule()
        assert plan.searches == [group]
        plan.samples = []
        scheduler.postprocess(plan, [])
        scheduler.advance(group, [(min(index, len(group.live) - 1), index) for index in range(3)])
        scheduler.check_integrity()
    return group


def test_what_goes_apart_is_found_by_its_own_digests() -> None:
    group = go_apart_and_be_preempted()
    assert [sequence.block_digests for sequence in group.live] == [digests(sequence) for sequence in group.live]
    assert len({tuple(sequence.block_tables[0]) for sequence in group.live}) == 3


def test_mutant_digests_of_another_sequence_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_let_lead_stand_for_all"
    changed = mutant(getattr(LockstepGroups, name), "del lead.block_digests[num_shared // BLOCK_SIZE :]", "pass")
    monkeypatch.setattr(LockstepGroups, name, changed)
    with pytest.raises((AssertionError, CacheIntegrityError)):
        test_what_goes_apart_is_found_by_its_own_digests()


def test_the_last_tokens_wait_for_each_other() -> None:
    """Two of a group with prompts of their own: the shorter one is held until the longer one is computed."""
    searched = Searched(0, num_blocks=40, max_num_seqs=2, max_num_batched_tokens=16)
    group = make_group([1] * 100, SamplingParams(max_tokens=10), num_lockstep=2)
    group.sequences[1].token_ids = [2]
    group.live = group.sequences[:]
    searched.steps[group] = 0
    searched.scheduler.add(group)
    for _ in range(6):
        plan = searched.step()
        assert plan.sequences == group.sequences[:1]
        assert not plan.searches
    plan = searched.step()
    assert plan.searches == [group]
    assert plan.sequences == group.sequences


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        (LockstepGroups, "unfork", "self._queues.stand_back(sequence, keep_partial=True)", "pass"),
        (LockstepGroups, "unfork", "self._let_lead_stand_for_all(group)", "pass"),
        (LockstepGroups, "advance", "self._queues.stand_back(sequence, keep_partial=False)", "pass"),
        (LockstepGroups, "fork", "self._queues.fork(lead, sequence)", "pass"),
        (Queues, "stand_back", "self.free(sequence, keep_partial=keep_partial)", "pass"),
        (Queues, "slots", "len(group.sequences) if sequence is group.lead else 0", "1"),
        (Scheduler, "_preempt_last_running", "first_of(self.running[-1])", "self.running[-1]"),
    ],
)
def test_mutants_are_caught(owner: type, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(getattr(owner, name), old, new)
    monkeypatch.setattr(owner, name, staticmethod(changed) if name == "slots" else changed)
    with pytest.raises((CacheIntegrityError, AssertionError, ValueError, IndexError)):
        random_runs(range(8))


def test_mutant_that_holds_nobody_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that is computed to the end before the others of its group are."""
    monkeypatch.setattr(
        LockstepGroups, "hold_back", mutant(LockstepGroups.hold_back, "num_held = 1\n", "num_held = 0\n")
    )
    with pytest.raises(CacheIntegrityError, match="computed to the end without the others"):
        test_the_last_tokens_wait_for_each_other()
