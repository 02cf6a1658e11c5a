"""The searches of the requests that have one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pellucid.core.batch import NOTHING_ALLOWED, SAMPLING_DTYPE, SampledTokens
from pellucid.core.errors import PellucidError
from pellucid.core.sequence import Sequence, SequenceGroup, SequenceStatus
from pellucid.engine.constraints import nothing_left
from pellucid.engine.guidance import Guidance
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.scheduler import Plan, Scheduler, ending_of
from pellucid.engine.search.base import GroupSearch, Hypothesis, SampledRow, TokenSearch
from pellucid.engine.search.contrastive import ContrastiveSearch
from pellucid.engine.search.guided import GuidedSearch


@dataclass(slots=True)
class _Entry:
    """A search under way.

    Attributes:
        answer: of a search that settles one token after another: what it has settled, as a sequence that is never
            computed.
        is_begun: whether it was asked before.
    """

    search: GroupSearch | TokenSearch
    answer: Sequence | None = None
    is_begun: bool = False


class SearchBook:
    """What the searches of lockstep groups are given in a step, and what they make of it.

    Attributes:
        guidance: what of a step guided searches need besides its rows.
    """

    def __init__(self, scheduler: Scheduler, hidden_states: HiddenStates) -> None:
        self.guidance = Guidance()
        self._hidden_states = hidden_states
        self._scheduler = scheduler
        self._entries: dict[SequenceGroup, _Entry] = {}

    def open(self, group: SequenceGroup, search: GroupSearch | TokenSearch) -> None:
        """Let `search` decide for a group that was queued and not scheduled yet."""
        entry = self._entries[group] = _Entry(search)
        record = np.frombuffer(group.sampling_record, SAMPLING_DTYPE).copy()
        record["num_logprobs"] = search.num_logprobs
        record["processed_logprobs"] = search.processed_logprobs
        group.sampling_record = record.tobytes()
        if isinstance(search, ContrastiveSearch):
            self._hidden_states.open(group, search)
        if isinstance(search, GuidedSearch):
            self.guidance.open(group)
        if isinstance(search, TokenSearch):
            first = group.sequences[0]
            entry.answer = Sequence(group, 0, first.max_length - search.num_ahead)
            entry.answer.status = SequenceStatus.FINISHED  # in no queue, now and later
            entry.answer.token_times = group.step_times

    def close(self, group: SequenceGroup) -> None:
        """A request ended: `group.sequences` are its answers from here on, and hold nothing."""
        entry = self._entries.pop(group)
        self._hidden_states.close(group)
        self.guidance.close(group)
        first = group.sequences[0]
        if entry.answer is not None:
            group.sequences = [entry.answer]
            if not entry.answer.is_finished:
                entry.answer.finish_reason, entry.answer.error = first.finish_reason, first.error
        else:
            assert not isinstance(entry.search, TokenSearch)
            group.sequences = [
                _answer(group, index, hypothesis, first) for index, hypothesis in enumerate(entry.search.answers())
            ]

    def __contains__(self, group: SequenceGroup) -> bool:
        """Whether a request has a search that was not closed yet."""
        return group in self._entries

    def settles_tokens(self, group: SequenceGroup) -> bool:
        """Whether the answer of `group` is told token by token."""
        return self._entries[group].answer is not None

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

    def advance(
        self, rows_of: dict[SequenceGroup, list[SampledRow]], now: float
    ) -> tuple[list[tuple[Sequence, SampledRow]], dict[SequenceGroup, PellucidError | None]]:
        """Ask each search how to go on, after the scheduler took in the step.

        Returns:
            The answers that have one more token, each with the row it was chosen from; and the groups to be ended after
            that, since their search is over, with the error where it found no way on.
        """
        settled: list[tuple[Sequence, SampledRow]] = []
        over: dict[SequenceGroup, PellucidError | None] = {}
        for group, rows in rows_of.items():
            entry = self._entries[group]
            group.num_decode_tokens += len(rows) if entry.is_begun else 0
            entry.is_begun = True
            continuations = entry.search.advance(rows)
            if isinstance(entry.search, TokenSearch):
                row = entry.search.settled
                if row is not None and entry.answer is not None:
                    settled.append((entry.answer, row))
                    if _settle(entry.answer, row.token_id):
                        continue
            else:
                group.step_times.append(now)
            if continuations:
                self._scheduler.advance(group, continuations)
            elif any(row.token_id == NOTHING_ALLOWED for row in rows) and not self._has_all(entry):
                over[group] = nothing_left(rows[0].sequence, rows[0].sequence.token_ids)
            else:
                over[group] = None
        return settled, over

    @staticmethod
    def _has_all(entry: _Entry) -> bool:
        """Whether a search that is over has its answers: else it found no way on."""
        if isinstance(entry.search, TokenSearch):
            return False
        return all(hypothesis.finish_reason is not None for hypothesis in entry.search.answers())


def _settle(answer: Sequence, token_id: int) -> bool:
    """Whether `answer` ends with its next token."""
    answer.token_ids.append(token_id)
    ending = ending_of(answer)
    if ending is not None:
        answer.finish_reason, answer.stop_reason = ending
    return ending is not None


def _answer(group: SequenceGroup, index: int, hypothesis: Hypothesis, ended: Sequence) -> Sequence:
    """`hypothesis` as a sequence of `group`; one that has not ended ends as `ended`, one of the group's, did."""
    sequence = Sequence(group, index, ended.max_length)
    sequence.token_ids += hypothesis.token_ids
    sequence.status = SequenceStatus.FINISHED
    sequence.finish_reason = hypothesis.finish_reason or ended.finish_reason
    sequence.stop_reason = hypothesis.stop_reason
    sequence.error = ended.error
    sequence.token_times = group.step_times[: len(hypothesis.token_ids)]
    sequence.logprobs = hypothesis.logprobs
    sequence.cumulative_logprob = hypothesis.cumulative_logprob
    return sequence


def _row(sequence: Sequence, sampled: SampledTokens, row: int) -> SampledRow:
    top_ids, top_logprobs = sampled.top_ids[row], sampled.top_logprobs[row]
    known = top_ids >= 0
    return SampledRow(
        sequence, int(sampled.token_ids[row]), float(sampled.logprobs[row]), top_ids[known], top_logprobs[known]
    )
