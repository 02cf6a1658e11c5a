"""Guessing ahead, step by step: whose next tokens, how many of them, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pellucid.core.config import SpeculativeConfig
from pellucid.core.metrics import StepTimes
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.scheduler import MAX_DRAFT_TOKENS_OF_STEP, Plan, Scheduler
from pellucid.engine.speculative.adaptive import PROBE_SHARE, Acceptance, StepCost, choose_lengths, least_slope
from pellucid.engine.speculative.drafter import Drafter


def accepted_rows(plan: Plan, token_ids: list[int]) -> Iterator[list[int]]:
    """The rows of logits whose tokens count, in rounds as if each were a step: first the row of every sample, then
    those after a draft token that is what was chosen in its place. Whoever takes in a round may end sequences: they
    have no further row.

    Args:
        token_ids: the token chosen at each of the plan's logits rows.
    """
    sequences, offsets = plan.logits_rows()
    rows = [row for row, offset in enumerate(offsets) if offset == 0]
    while rows:
        yield rows
        rows = [row + 1 for row in rows if _is_right(sequences[row], offsets[row], token_ids[row])]


def _is_right(sequence: Sequence, offset: int, token_id: int) -> bool:
    drafts = sequence.draft_token_ids
    return offset < len(drafts) and drafts[offset] == token_id and not sequence.is_finished


def num_accepted(draft_token_ids: list[int], chosen_token_ids: list[int]) -> int:
    """How many of the draft tokens are what was chosen in their places, before the first that is not."""
    count = 0
    for draft, chosen in zip(draft_token_ids, chosen_token_ids, strict=False):
        if draft != chosen:
            break
        count += 1
    return count


class Speculation:
    """Lets steps compute guesses of a `Drafter`.

    With `adaptive`, only steps that compute the last token of every sequence and nothing else are drafted: their costs
    can be compared. A cheap drafter is asked in each of them, and guesses that do not pay are held against what is
    chosen without being computed. One that is not is tried out again from time to time.

    Args:
        times: where the engine adds up the seconds of its steps; those of guessing, on `clock`, are added to it.
    """

    def __init__(
        self, drafter: Drafter, config: SpeculativeConfig, times: StepTimes, clock: Callable[[], float]
    ) -> None:
        self._drafter = drafter
        self._most = config.num_draft_tokens
        self._adaptive = config.adaptive
        self._times = times
        self._clock = clock
        self._acceptance = Acceptance()
        self._step_cost = StepCost()
        self._draft_seconds = 0.0  # of a token of the longest guess
        self._debt = 0.0  # seconds of steps that are to pass before what does not pay is tried out again
        self._uncomputed: dict[Sequence, int] = {}  # guesses of this step that are only held against what is chosen
        self._measured: Plan | None = None  # the plan of this step, if it only decodes
        self._begun_at = 0.0

    def propose(self, plan: Plan, scheduler: Scheduler) -> None:
        """Let `plan`, which is about to be computed, compute guesses too."""
        start = self._clock()
        self._uncomputed.clear()
        self._measured = plan if plan.num_tokens == len(plan.samples) == len(plan.sequences) else None
        self._begun_at = self._computing()
        if not self._drafter.is_cheap:
            for sequence in plan.preempted:
                self._drafter.forget(sequence)
            if plan.copies:  # until they are made, blocks are not to be read or written
                return
        candidates: list[Sequence] = []
        limits: list[int] = []
        for sequence in plan.samples:
            limit = min(self._most, sequence.max_length - len(sequence.token_ids) - 1)
            group = sequence.group
            if limit > 0 and group.is_drafted and group.is_forked and sequence.num_scheduled_tokens == 1:
                candidates.append(sequence)
                limits.append(limit)
        if candidates and not self._adaptive:
            self._drafter.prepare(candidates)
            scheduler.schedule_drafts(plan, candidates, self._drafter.propose(candidates, limits))
        elif candidates and self._measured is not None:
            propose = self._hold_against if self._drafter.is_cheap else self._try_out
            propose(plan, scheduler, candidates, limits)
        self._times.draft += self._clock() - start

    def learn(self, plan: Plan, token_ids: list[int]) -> None:
        """After the step of `plan`, before its draft tokens are dropped: what was chosen at each of its logits rows."""
        if plan is self._measured:
            seconds = self._computing() - self._begun_at
            self._step_cost.learn(plan.num_tokens, seconds)
            self._debt -= seconds
        if not (plan.drafted or self._uncomputed):
            return
        row = 0
        for sequence in plan.samples:
            drafts = sequence.draft_token_ids
            if drafts:
                chosen = token_ids[row : row + 1 + len(drafts)]
                self._acceptance.learn(sequence, num_accepted(drafts, chosen), len(drafts))
                self._drafter.observe(sequence, drafts, chosen)
            elif (guess := self._uncomputed.get(sequence)) is not None:
                self._acceptance.learn(sequence, int(guess == token_ids[row]), 1)
            row += 1 + len(drafts)

    def forget(self, group: SequenceGroup) -> None:
        """A request has ended."""
        for sequence in group.sequences:
            self._acceptance.forget(sequence)
            self._drafter.forget(sequence)

    def _hold_against(self, plan: Plan, scheduler: Scheduler, candidates: list[Sequence], limits: list[int]) -> None:
        """Ask a cheap drafter. Of its guesses compute what pays, and only hold the others against what is chosen."""
        self._drafter.prepare(candidates)
        guesses = self._drafter.propose(candidates, limits)
        if not any(guesses):
            return
        lengths = self._lengths(plan, scheduler, candidates, list(map(len, guesses)))
        self._uncomputed = {
            sequence: guess[0]
            for sequence, guess, length in zip(candidates, guesses, lengths, strict=True)
            if guess and not length
        }
        guesses = [guess[:length] for guess, length in zip(guesses, lengths, strict=True)]
        scheduler.schedule_drafts(plan, candidates, guesses)

    def _try_out(self, plan: Plan, scheduler: Scheduler, candidates: list[Sequence], limits: list[int]) -> None:
        """Ask a drafter that takes its time for as many guesses as pay, or now and then for one of each sequence."""
        lengths = self._lengths(plan, scheduler, candidates, limits)
        if not any(lengths):
            if self._debt > 0 or not self._step_cost.knows(plan.num_tokens):
                return
            lengths = [1] * len(candidates)
        chosen = [(sequence, length) for sequence, length in zip(candidates, lengths, strict=True) if length]
        sequences, limits = [sequence for sequence, _ in chosen], [length for _, length in chosen]
        start = self._clock()
        self._drafter.prepare(sequences)
        prepared = self._clock()
        guesses = self._drafter.propose(sequences, limits)
        end = self._clock()
        seconds = self._step_cost.estimate(plan.num_tokens, plan.num_tokens + sum(limits))
        verifying = float(seconds[-1] - seconds[0])
        self._debt = (end - start + verifying) / PROBE_SHARE
        longest = max(map(len, guesses), default=0)
        if longest:
            taken = (end - prepared) / longest
            known = self._draft_seconds or taken
            self._draft_seconds = known + 0.2 * (min(taken, 2 * known) - known)
        scheduler.schedule_drafts(plan, sequences, guesses)

    def _lengths(self, plan: Plan, scheduler: Scheduler, candidates: list[Sequence], limits: list[int]) -> list[int]:
        """How many guesses of each candidate pay, of `limits` at most. None until it is known what the step takes
        without them, which is thus measured again from time to time."""
        room = min(scheduler.config.max_num_batched_tokens - plan.num_tokens, MAX_DRAFT_TOKENS_OF_STEP)
        if room <= 0 or not self._step_cost.knows(plan.num_tokens):
            return [0] * len(candidates)
        acceptance = [self._acceptance.estimate(sequence) for sequence in candidates]
        if max(acceptance) <= plan.num_tokens * least_slope(plan.num_tokens):
            return [0] * len(candidates)
        seconds = self._step_cost.estimate(plan.num_tokens, plan.num_tokens + min(room, sum(limits)))
        return choose_lengths(acceptance, limits, plan.num_tokens, seconds, self._draft_seconds)

    def _computing(self) -> float:
        times = self._times
        return times.build + times.forward + times.sample
