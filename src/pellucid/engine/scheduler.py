"""What to compute next. Plain data in, a plan out; knows nothing of backends, text or clocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from pellucid.core.config import BLOCK_SIZE, SchedulerConfig
from pellucid.core.errors import PellucidError, QueueFullError
from pellucid.core.outputs import FinishReason
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.lockstep import LockstepGroups, first_of, restore_lead
from pellucid.engine.queues import Queues
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager

MAX_DRAFT_TOKENS_OF_STEP = 128
"""Most draft tokens that a step computes: each has a row of logits, which takes memory."""
MAX_PROMPT_LOGITS = 128
"""Most tokens of prompts whose log-probabilities are wanted that a step computes, beyond one of each sequence: their
logits take memory."""


def ending_of(sequence: Sequence) -> tuple[FinishReason, int | None] | None:
    """Why a sequence ends with its last token, and the stop token that ended it; None if it goes on."""
    group, token_id = sequence.group, sequence.token_ids[-1]
    if token_id in group.stop_token_ids and sequence.num_output_tokens > group.sampling_params.min_tokens:
        return "stop", None if token_id in group.eos_token_ids else token_id
    return ("length", None) if len(sequence.token_ids) >= sequence.max_length else None


def _priority(sequence: Sequence) -> int:
    return sequence.group.priority


@dataclass(slots=True)
class Plan:
    """One step.

    Attributes:
        sequences: who computes; each its next `num_scheduled_tokens` tokens.
        num_tokens: how many tokens that makes.
        samples: whose next token is chosen: those of `sequences` that this step computes to the end, in that order,
            but for `pooled`.
            The first sequence of a group that is yet to fork stands there with all its siblings.
        drafted: those of `samples` of which draft tokens are computed too.
        pooled: those of `sequences` that this step computes to the end and that generate nothing.
        copies: (source, destination) KV blocks to copy first, in order.
        admitted: whose group is computed for the first time.
        preempted: who had to give way since the last step.
        expired: whose group waited too long and is ended, refused.
        searches: lockstep groups whose live sequences this step computes to the end. They are among `samples`, and what
            comes next is for their search to say, with `Scheduler.advance`.
    """

    sequences: list[Sequence] = field(default_factory=list)
    samples: list[Sequence] = field(default_factory=list)
    drafted: list[Sequence] = field(default_factory=list)
    pooled: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    searches: list[SequenceGroup] = field(default_factory=list)
    num_tokens: int = 0

    def logits_rows(self) -> tuple[list[Sequence], list[int]]:
        """Whose each row of logits is, and how many of its draft tokens go before it: a row for each of `samples`, and
        after it one for each of its draft tokens. No numbers where nothing is drafted."""
        if not self.drafted:
            return self.samples, []
        sequences: list[Sequence] = []
        offsets: list[int] = []
        for sequence in self.samples:
            num_rows = 1 + len(sequence.draft_token_ids)
            sequences += [sequence] * num_rows
            offsets += range(num_rows)
        return sequences, offsets


class Scheduler:
    """Continuous batching under one rule.

    Each step computes min(budget, num_tokens + num_draft_tokens - num_computed_tokens) tokens of every running
    sequence, in order of (priority, arrival), where the budget of each leaves one token for every sequence after it.
    Prefill, chunked prefill, decode, speculative verification and recompute after preemption are all this rule, and
    none of them can starve another. Draft tokens come last: they take what budget and blocks the others left.

    `running`, `waiting` and `paused` are always in that order. When blocks run out, paused sequences give theirs, the
    last one first, and then the last running sequence is preempted: its blocks go back (the full ones stay findable)
    and it waits to be computed again. A waiting sequence is admitted only when the blocks for all its tokens are there
    beside what those running still need, or when nothing runs; one of strictly better priority pushes out the last of
    the running, where that helps.

    The live sequences of a lockstep group are admitted, paused and preempted together, and their last tokens are
    computed in one step: where not all of them reach the end, the others hold theirs back.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheManager) -> None:
        self.config = config
        self.cache = cache
        self._queues = Queues(cache)
        self.waiting, self.running, self.paused = self._queues.waiting, self._queues.running, self._queues.paused
        self._lockstep = LockstepGroups(self._queues, cache)
        self._preempted: list[Sequence] = []

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting or self.paused)

    def has_work(self) -> bool:
        """Whether there is something to compute: unfinished sequences that are not paused."""
        return bool(self.running or self.waiting)

    def add(self, group: SequenceGroup) -> None:
        """Queue a request.

        Raises:
            QueueFullError: the waiting queue is at its limit.
        """
        self.check_queue()
        if group.is_lockstep:
            self._lockstep.add(group)
        self._queues.wait(first_of(group.sequences[0]))

    def check_queue(self, num_coming: int = 0) -> None:
        """Whether one more request may wait, `num_coming` others being on their way.

        Raises:
            QueueFullError: the waiting queue is at its limit.
        """
        limit, num_waiting = self.config.max_waiting, len(self.waiting) + num_coming
        if limit is not None and num_waiting >= limit:
            raise QueueFullError(f"{num_waiting} requests are waiting, which is the limit; try again later")

    def schedule(self, now: float = 0.0) -> Plan:
        """Decide the next step at `now` (seconds on the clock of `arrival_time`) and take the blocks it needs."""
        plan = Plan()
        if self.waiting:
            self._expire(now, plan)
            self._admit(now, plan)
        if self._lockstep:
            self._lockstep.fork()
        budget = self.config.max_num_batched_tokens
        prompt_logits = MAX_PROMPT_LOGITS
        running, sequences, samples = self.running, plan.sequences, plan.samples
        for index, sequence in enumerate(running):  # whose end is cut off where blocks run out
            num_new = num_remaining = len(sequence.token_ids) - sequence.num_computed_tokens
            if num_new > 1:
                num_new = min(num_new, budget - (len(running) - index - 1))
                if sequence.group.wants_prompt_logits:
                    num_new = min(num_new, max(1, prompt_logits))
                    prompt_logits -= num_new
            has_blocks = sequence.num_computed_tokens + num_new <= sequence.num_writable_tokens
            if not has_blocks and not self._allocate(sequence, num_new):
                break
            sequence.num_scheduled_tokens = num_new
            budget -= num_new
            sequences.append(sequence)
            if num_new == num_remaining:
                if sequence.group.is_forked:
                    samples.append(sequence)
                elif sequence.group.pooling_params is not None:
                    plan.pooled.append(sequence)
                else:
                    samples.extend(sequence.group.sequences)
        plan.num_tokens = self.config.max_num_batched_tokens - budget
        if self._lockstep:
            self._lockstep.hold_back(plan)
        plan.copies = self.cache.take_copies()
        plan.preempted, self._preempted = self._preempted, []
        return plan

    def schedule_drafts(self, plan: Plan, sequences: list[Sequence], guesses: list[list[int]]) -> None:
        """Let `plan` compute the guesses for `sequences`, all of them in `plan.samples`, as far as budget and free
        blocks go. Nobody gives way for a guess."""
        budget = min(self.config.max_num_batched_tokens - plan.num_tokens, MAX_DRAFT_TOKENS_OF_STEP)
        for sequence, guess in zip(sequences, guesses, strict=True):
            num_drafts = min(len(guess), budget)
            num_new = sequence.num_scheduled_tokens + num_drafts
            end = sequence.num_computed_tokens + num_new
            if end > sequence.num_writable_tokens and not self.cache.allocate(sequence, num_new):
                num_drafts -= end - sequence.num_writable_tokens
            if num_drafts > 0:
                sequence.draft_token_ids = guess[:num_drafts]
                sequence.num_scheduled_tokens += num_drafts
                budget -= num_drafts
                plan.num_tokens += num_drafts
                plan.drafted.append(sequence)

    def cancel_drafts(self, plan: Plan) -> None:
        """Let `plan` compute no draft token after all."""
        for sequence in plan.drafted:
            num_drafts = len(sequence.draft_token_ids)
            plan.num_tokens -= num_drafts
            sequence.num_scheduled_tokens -= num_drafts
        self.drop_drafts(plan)

    def drop_drafts(self, plan: Plan) -> None:
        """Forget the draft tokens, and give back the blocks that only those needed that were wrong."""
        for sequence in plan.drafted:
            sequence.draft_token_ids = []
            if not sequence.is_finished:
                self.cache.give_back(sequence, sequence.num_scheduled_tokens)
        plan.drafted = []

    def postprocess(self, plan: Plan, token_ids: list[int]) -> None:
        """Take in a step that was computed.

        Args:
            plan: what was scheduled.
            token_ids: the token chosen for each of `plan.samples` after its last token.
        """
        for sequence in plan.drafted:  # whose draft tokens count once they are accepted
            sequence.num_scheduled_tokens -= len(sequence.draft_token_ids)
            sequence.group.num_draft_tokens += len(sequence.draft_token_ids)
        for sequence in plan.sequences:
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
            if sequence.num_computed_tokens // BLOCK_SIZE > sequence.num_registered_blocks:
                self.cache.commit(sequence)
        self._append(plan.samples, token_ids)

    def accept_drafts(self, sequences: list[Sequence], token_ids: list[int]) -> None:
        """Take in, after `postprocess`, a draft token of each of `sequences` that was the one chosen, and the token
        chosen after it."""
        for sequence in sequences:
            sequence.group.num_accepted_tokens += 1
            sequence.num_computed_tokens += 1
            if sequence.num_computed_tokens // BLOCK_SIZE > sequence.num_registered_blocks:
                self.cache.commit(sequence)
        self._append(sequences, token_ids)

    def _append(self, sequences: list[Sequence], token_ids: list[int]) -> None:
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            group = sequence.group
            if not group.is_forked:
                self._fork(group)
            sequence.token_ids.append(token_id)
            if token_id in group.stop_token_ids or len(sequence.token_ids) >= sequence.max_length:
                ending = ending_of(sequence)
                if ending is not None:
                    self.finish(sequence, ending[0], stop_reason=ending[1])

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: PellucidError | None = None,
    ) -> None:
        """End a sequence between two steps, whatever its state, and give back its blocks. No effect on ended ones."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        self._queues.leave(sequence)
        self._queues.free(sequence, keep_partial=reason != "error")  # after a failed step copies may be missing
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.error = error
        sequence.num_scheduled_tokens = 0
        sequence.group.num_unfinished -= 1
        if sequence.group.num_unfinished == 0:
            self._lockstep.remove(sequence.group)

    def finish_group(
        self, group: SequenceGroup, reason: FinishReason, *, error: PellucidError | None = None
    ) -> list[Sequence]:
        """End every sequence of a request that has not ended yet; return those, by index."""
        unfinished = [sequence for sequence in group.sequences if not sequence.is_finished]
        restore_lead(group)
        for sequence in reversed(unfinished):  # the first last: it holds the places of those yet to fork
            self.finish(sequence, reason, error=error)
        return unfinished

    def advance(self, group: SequenceGroup, continuations: ListLike[tuple[int, int]]) -> None:
        """Go on with a lockstep group whose last tokens were computed.

        Args:
            continuations: at least one, and no more than the group has sequences: (index into `group.live` of the one
                to go on from, its next token). They are `group.live` from here on, in this order; one that nothing goes
                on from gives its blocks back, and one that several go on from is forked.
        """
        self._lockstep.advance(group, continuations)

    def pause(self, group: SequenceGroup) -> None:
        """Between two steps: compute nothing more of a request until `resume`. Its places are free for others."""
        for sequence in group.sequences:
            if sequence.status in (SequenceStatus.RUNNING, SequenceStatus.WAITING):
                self._queues.leave(sequence)
                self._queues.pause(sequence)

    def resume(self, group: SequenceGroup) -> None:
        """Go on with a paused request: at once where it has its blocks still and there is a place, else as it waits."""
        for sequence in group.sequences:
            if sequence.status is SequenceStatus.PAUSED:
                self._queues.leave(sequence)
                is_begun = any(member.num_computed_tokens for member in group.live or (sequence,))
                if is_begun and self._has_place(sequence):
                    self._queues.run(sequence)
                else:
                    if is_begun:
                        self._preempt(sequence)
                    self._queues.wait(sequence)

    def preempt_last(self) -> Sequence | None:
        """Take the blocks of the last paused sequence that has any, or else of the last running one, which then waits;
        None if there is no such sequence."""
        if (paused := self._reclaim()) is not None or not self.running:
            return paused
        return self._preempt_last_running()

    def check_idle(self) -> None:
        """With nothing to do, nothing may be held. O(1).

        Raises:
            CacheIntegrityError: a block or a place in the batch has leaked.
        """
        if self.has_unfinished() or self._queues.num_slots or self.cache.pool.num_used:
            raise CacheIntegrityError(
                f"idle with {len(self.running)} running, {len(self.waiting)} waiting, {len(self.paused)} paused, "
                f"{self._queues.num_slots} places and {self.cache.pool.num_used} blocks held"
            )

    def check_integrity(self) -> None:
        """Check queues and cache against each other, in full.

        Raises:
            CacheIntegrityError: a queue is out of order or counts wrong, or the block books do not balance.
        """
        self._queues.check_integrity(self.config.max_num_seqs)
        self._lockstep.check_integrity()
        self.cache.check_integrity([*self.running, *self.paused])

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a sequence that is to be computed again; of a lockstep group's lead, those of all."""
        self._queues.free(sequence, keep_partial=True)
        if sequence.group.is_lockstep:
            self._lockstep.unfork(sequence.group)
        sequence.group.num_preemptions += 1
        self._preempted.append(sequence)

    def _preempt_last_running(self) -> Sequence:
        sequence = first_of(self.running[-1])
        self._queues.leave(sequence)
        self._preempt(sequence)
        self._queues.wait(sequence)
        return sequence

    def _reclaim(self) -> Sequence | None:
        """Take the blocks of the last paused sequence that has any; None if none has."""
        for sequence in reversed(self.paused):
            if sequence.num_computed_tokens:
                sequence = first_of(sequence)
                self._preempt(sequence)
                return sequence
        return None

    def _expire(self, now: float, plan: Plan) -> None:
        limit = self.config.max_queue_seconds
        if limit is None:
            return
        for sequence in [waiting for waiting in self.waiting if waiting.group.first_scheduled_time is None]:
            waited = now - sequence.group.arrival_time
            if waited > limit:
                error = QueueFullError(
                    f"waited {waited:.1f} s to be scheduled; the limit is {limit:g} s; try again later"
                )
                plan.expired += self.finish_group(sequence.group, "error", error=error)

    def _admit(self, now: float, plan: Plan) -> None:
        while self.waiting:
            head = self.waiting[0]
            if not self._has_budget(head):
                return
            tables = self._make_way(head)
            if tables is None:
                return
            self._queues.leave(head)
            self.cache.adopt(head, tables)
            self.cache.adopt_partial(head)
            head.group.num_computed_elsewhere -= head.num_computed_tokens
            if head.group.first_scheduled_time is None:
                head.group.first_scheduled_time = now
                head.group.num_cached_tokens = head.num_computed_tokens
                plan.admitted.append(head)
            self._queues.run(head)

    def _has_budget(self, head: Sequence) -> bool:
        """Whether a step's tokens reach `head` after those that go before it."""
        claimed = 0
        for sequence in self.running:
            claimed += sequence.num_tokens - sequence.num_computed_tokens if sequence.order < head.order else 1
        return claimed < self.config.max_num_batched_tokens

    def _make_way(self, head: Sequence) -> list[list[int]] | None:
        """What the prefix cache holds of `head`, once there is a place and room for it; None if there is not.

        Those who are paused give way, and those who run with a worse priority, unless it would be in vain.
        """
        num_kept = bisect_right(self.running, head.group.priority, key=_priority)
        if not self._has_place(head, num_kept):
            return None
        tables = self.cache.match(head)
        if not self._has_room(head, tables, num_kept):
            return None
        while not (self._has_place(head) and self._has_room(head, tables)):
            if not self._has_place(head) or self._reclaim() is None:
                if len(self.running) == num_kept:  # what the others shared with them was counted as given back
                    return None
                self._preempt_last_running()
            tables = self.cache.match(head)
        return tables

    def _has_place(self, sequence: Sequence, num_kept: int | None = None) -> bool:
        """Whether there is a place in the batch, were the first `num_kept` of the running (None: all) the only ones."""
        given_back = 0 if num_kept is None else sum(map(self._queues.slots, self.running[num_kept:]))
        return self._queues.num_slots - given_back + self._queues.slots(sequence) <= self.config.max_num_seqs

    def _has_room(self, head: Sequence, tables: list[list[int]], num_kept: int | None = None) -> bool:
        """Whether blocks for all of `head` are there beside what the running still need.

        With `num_kept`, whether there can be, were only the first so many of the running and none of the paused left:
        never too pessimistic, since a block that several hold counts as given back.
        """
        kept = self.running[:num_kept]
        if not kept:
            return True
        cache, budget = self.cache, self.config.max_num_batched_tokens
        needed = cache.num_blocks_to_admit(head, tables, budget)
        for sequence in kept:
            needed += cache.num_blocks_to_come(sequence, budget)
        available = cache.num_available
        if num_kept is not None:
            available += sum(sequence.num_blocks for sequence in (*self.running[num_kept:], *self.paused))
        return needed <= available

    def _allocate(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Blocks for the next tokens of a running sequence, at the cost of the last; False if it was the last."""
        while not self.cache.allocate(sequence, num_new_tokens):
            self.preempt_last()
            if sequence.status is not SequenceStatus.RUNNING:
                return False
        return True

    def _fork(self, group: SequenceGroup) -> None:
        """Let the siblings go on from where the first sequence has just computed the prompt, in its places."""
        first, *siblings = group.sequences
        for sibling in siblings:
            self._queues.fork(first, sibling)
        group.is_forked = True
