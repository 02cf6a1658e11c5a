"""What holds of a lockstep group in every step: its live sequences are computed to the end together, or none is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager

if TYPE_CHECKING:
    from pellucid.engine.scheduler import Plan


def hold_back(plan: Plan, cache: CacheManager) -> None:
    """Leave out of `plan` the last token of each sequence of a lockstep group whose others do not all reach theirs, and
    whoever was preempted for another of its group. The groups that do are its `searches`."""
    for group in dict.fromkeys(sequence.group for sequence in plan.sequences if sequence.group.is_lockstep):
        if group.is_forked and all(map(_reaches_its_end, group.live)):
            plan.searches.append(group)
            continue
        for sequence in group.live:
            num_held = 0
            if sequence.status is not SequenceStatus.RUNNING:
                num_held = sequence.num_scheduled_tokens
            elif _reaches_its_end(sequence):
                num_held = 1
                cache.give_back(sequence, sequence.num_scheduled_tokens - 1)
            sequence.num_scheduled_tokens -= num_held
            plan.num_tokens -= num_held
    plan.sequences = [sequence for sequence in plan.sequences if sequence.num_scheduled_tokens]
    plan.samples = [
        sequence for sequence in plan.samples if not sequence.group.is_lockstep or sequence.group in plan.searches
    ]


def first_of(sequence: Sequence) -> Sequence:
    """Who is preempted where `sequence` is to be: it, or the lead of its lockstep group for all of them."""
    return sequence.group.lead if sequence.group.is_lockstep else sequence


def check_lockstep(group: SequenceGroup) -> None:
    """Check a lockstep group between two steps.

    Raises:
        CacheIntegrityError: its live sequences are not in one queue, one of them was computed to the end without the
            others, or one that does not go on holds blocks.
    """
    queued = [sequence for sequence in group.sequences if sequence.status is not SequenceStatus.PENDING]
    expected = sorted(group.live, key=lambda sequence: sequence.index) if group.is_forked else [group.lead]
    if queued != expected or len({sequence.status for sequence in queued}) > 1:
        raise CacheIntegrityError(f"{queued} are in queues, where {expected} should be in one")
    if (group.lead_token_ids is None) != group.is_forked:
        raise CacheIntegrityError(f"{group.lead} does not know for whom it computes")
    for sequence in group.sequences:
        if sequence.num_blocks and sequence not in queued:
            raise CacheIntegrityError(f"{sequence} holds blocks and is in no queue")
        if sequence in queued and sequence.num_computed_tokens >= sequence.num_tokens:
            raise CacheIntegrityError(f"{sequence} was computed to the end without the others of its group")


def _reaches_its_end(sequence: Sequence) -> bool:
    """Whether a running sequence is computed to the end in this step."""
    num_computed = sequence.num_computed_tokens + sequence.num_scheduled_tokens
    return sequence.status is SequenceStatus.RUNNING and num_computed == sequence.num_tokens
