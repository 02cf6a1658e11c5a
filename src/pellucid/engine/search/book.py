"""The searches of the requests that have one."""

from __future__ import annotations

from pellucid.core.batch import SampledTokens
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.engine.search.base import GroupSearch, Hypothesis, SampledRow


class SearchBook:
    """What the searches of lockstep groups are given in a step, and what they make of it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._searches: dict[SequenceGroup, GroupSearch] = {}

    def open(self, group: SequenceGroup, search: GroupSearch) -> None:
        """Let `search` decide for a group that is about to be queued."""
        self._searches[group] = search

    def close(self, group: SequenceGroup) -> None:
        """A request ended: `group.sequences` are its answers from here on, and hold nothing."""
        search = self._searches.pop(group)
        first = group.sequences[0]
        group.sequences = [
            _answer(group, index, hypothesis, first) for index, hypothesis in enumerate(search.answers())
        ]

    def take_rows(
        self, plan: Plan, sampled: SampledTokens
    ) -> tuple[dict[SequenceGroup, list[SampledRow]], SampledTokens]:
        """The rows of each search of `plan`, in the order of its live sequences; and the others, which are all that
        `plan.samples` has afterwards."""
        sequences, _ = plan.logits_rows()
        row_of: dict[Sequence, int] = {sequence: row for row, sequence in enumerate(sequences)}
        searched = {
            group: [_row(sequence, sampled, row_of[sequence]) for sequence in group.live] for group in plan.searches
        }
        others = [row for row, sequence in enumerate(sequences) if not sequence.group.is_lockstep]
        plan.samples = [sequence for sequence in plan.samples if not sequence.group.is_lockstep]
        return searched, sampled.of_rows(others)

    def advance(self, rows_of: dict[SequenceGroup, list[SampledRow]], now: float) -> list[SequenceGroup]:
        """Ask each search how to go on, after the scheduler took in the step; those that are over, whose groups were
        ended."""
        over = []
        for group, rows in rows_of.items():
            group.num_decode_tokens += len(rows) if group.step_times else 0
            group.step_times.append(now)
            continuations = self._searches[group].advance(rows)
            if continuations:
                self._scheduler.advance(group, continuations)
            else:
                self._scheduler.finish_group(group, "stop")
                over.append(group)
        return over


def _answer(group: SequenceGroup, index: int, hypothesis: Hypothesis, ended: Sequence) -> Sequence:
    """`hypothesis` as a sequence of `group`; one that has not ended ends as `ended`, one of the group's, did."""
    sequence = Sequence(group, index, ended.max_length)
    sequence.token_ids += hypothesis.token_ids
    sequence.status = SequenceStatus.FINISHED
    sequence.finish_reason = hypothesis.finish_reason or ended.finish_reason
    sequence.stop_reason = hypothesis.stop_reason
    sequence.error = ended.error
    sequence.logprobs = hypothesis.logprobs
    sequence.cumulative_logprob = hypothesis.cumulative_logprob
    return sequence


def _row(sequence: Sequence, sampled: SampledTokens, row: int) -> SampledRow:
    top_ids, top_logprobs = sampled.top_ids[row], sampled.top_logprobs[row]
    known = top_ids >= 0
    return SampledRow(
        sequence, int(sampled.token_ids[row]), float(sampled.logprobs[row]), top_ids[known], top_logprobs[known]
    )
