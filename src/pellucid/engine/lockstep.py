"""Lockstep groups in the schedule: their live sequences are computed to the end together, or none is."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

from pellucid.core.config import BLOCK_SIZE
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.queues import Queues
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager, num_shared_tokens

if TYPE_CHECKING:
    from pellucid.engine.scheduler import Plan


class LockstepGroups:
    """The lockstep groups of a scheduler that have not ended. False while there are none, which is all it costs others.

    One whose sequences begin with prompts of their own, or that had to give way, is forked where its lead has computed
    the whole blocks that all have in common; until then the lead stands for all.
    """

    def __init__(self, queues: Queues, cache: CacheManager) -> None:
        self._queues = queues
        self._cache = cache
        self._groups: dict[SequenceGroup, None] = {}  # in order of arrival

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, group: SequenceGroup) -> None:
        """Take in a group that is in no queue yet; its lead is to wait for all."""
        self._groups[group] = None
        self._let_lead_stand_for_all(group)

    def remove(self, group: SequenceGroup) -> None:
        """Forget a group that ended. No effect on one of the others."""
        self._groups.pop(group, None)

    def unfork(self, group: SequenceGroup) -> None:
        """Take the blocks of a group but for its lead, which stands for all from here on, alone where it is."""
        if group.is_forked:
            lead = group.lead
            for sequence in sorted(group.live, key=lambda sequence: -sequence.index):
                if sequence is not lead:
                    self._queues.stand_back(sequence, keep_partial=True)
            self._let_lead_stand_for_all(group)

    def fork(self) -> None:
        """Let the sequences of groups go their own way where the lead has computed what they share: each from there, or
        from further on where the prefix cache knows more of it."""
        for group in self._groups:
            lead = group.lead
            if group.lead_token_ids is None or lead.status is not SequenceStatus.RUNNING:
                continue
            if lead.num_computed_tokens < len(lead.token_ids) - 1:
                continue
            restore_lead(group)
            group.is_forked = True
            for sequence in group.live:
                if sequence is not lead:
                    self._queues.fork(lead, sequence)
            for sequence in group.live:
                tables = self._cache.match(sequence)
                if len(tables[0]) * BLOCK_SIZE > sequence.num_computed_tokens:
                    self._queues.free(sequence, keep_partial=False)
                    self._cache.adopt(sequence, tables)
                    group.num_computed_elsewhere -= sequence.num_computed_tokens
            if group.num_preemptions == 0:  # its sequences began with prompts of their own
                group.num_cached_tokens = group.live[0].num_computed_tokens

    def hold_back(self, plan: Plan) -> None:
        """Leave out of `plan` the last token of each sequence of a group whose others do not all reach theirs, and
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
                    self._cache.give_back(sequence, sequence.num_scheduled_tokens - 1)
                sequence.num_scheduled_tokens -= num_held
                plan.num_tokens -= num_held
        plan.sequences = [sequence for sequence in plan.sequences if sequence.num_scheduled_tokens]
        plan.samples = [
            sequence for sequence in plan.samples if not sequence.group.is_lockstep or sequence.group in plan.searches
        ]

    def advance(self, group: SequenceGroup, continuations: ListLike[tuple[int, int]]) -> None:
        """As `Scheduler.advance`."""
        parents = group.live
        wanted = {parent for parent, _ in continuations}
        for index, sequence in enumerate(parents):
            if index not in wanted:
                self._queues.stand_back(sequence, keep_partial=False)
        idle = [sequence for sequence in group.sequences if sequence.status is SequenceStatus.PENDING]
        group.live = []
        for parent, _ in continuations:
            sequence = parents[parent]
            if parent in wanted:
                wanted.remove(parent)  # the first goes on in its place
            else:
                sequence = idle.pop(0)
                sequence.token_ids = list(parents[parent].token_ids)
                sequence.num_buffered_tokens = 0
                self._queues.fork(parents[parent], sequence)
            group.live.append(sequence)
        for sequence, (_, token_id) in zip(group.live, continuations, strict=True):
            sequence.token_ids.append(token_id)

    def check_integrity(self) -> None:
        """Check the groups between two steps.

        Raises:
            CacheIntegrityError: the live sequences of one are not in one queue, one of them was computed to the end
                without the others, or one that does not go on holds blocks.
        """
        for group in self._groups:
            _check(group)

    def _let_lead_stand_for_all(self, group: SequenceGroup) -> None:
        """Only the lead is in a queue, with the tokens that all have in common and one more, which is held back."""
        if len(group.live) > 1:
            lead, num_shared = group.lead, num_shared_tokens(group.live)
            group.is_forked = False
            group.lead_token_ids = lead.token_ids
            lead.token_ids = lead.token_ids[: num_shared + 1]
            del lead.block_digests[num_shared // BLOCK_SIZE :]


def first_of(sequence: Sequence) -> Sequence:
    """Who is preempted where `sequence` is to be: it, or the lead of its lockstep group for all of them."""
    return sequence.group.lead if sequence.group.is_lockstep else sequence


def restore_lead(group: SequenceGroup) -> None:
    """Give the lead of a group that stands for all its own tokens again. No effect where it has them."""
    if group.lead_token_ids is not None:
        group.lead.token_ids, group.lead_token_ids = group.lead_token_ids, None


def _check(group: SequenceGroup) -> None:
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
