"""Runs what was planned, and takes in what comes of it."""

from __future__ import annotations

from collections.abc import Callable

from pellucid.core.batch import SampledTokens
from pellucid.core.errors import BackendError, CapacityError, PellucidError
from pellucid.core.metrics import EngineCounters
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.core.trace import TraceSink
from pellucid.engine.model_runner import ModelRunner, StepResult
from pellucid.engine.output_processor import OutputProcessor, StepOutput
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.engine.search.base import SampledRow
from pellucid.engine.search.book import SearchBook
from pellucid.engine.speculative.speculation import Speculation, accepted_rows
from pellucid.engine.speculative.verdicts import DraftOdds


class StepRunner:
    """Hands a plan to the model runner, and what was chosen to the scheduler, the searches and the output processor.

    `counters` is where tokens are counted; `trace` is told of verdicts on guesses.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        scheduler: Scheduler,
        searches: SearchBook,
        output_processor: OutputProcessor,
        speculation: Speculation | None,
        counters: EngineCounters,
        trace: TraceSink | None,
        clock: Callable[[], float],
    ) -> None:
        self._model_runner = model_runner
        self._scheduler = scheduler
        self._searches = searches
        self._output_processor = output_processor
        self._speculation = speculation
        self._counters = counters
        self._trace = trace
        self._clock = clock

    def run(self, plan: Plan, output: StepOutput) -> None:
        """Compute `plan` and add what there is to tell. Never raises for what a request or the backend did."""
        if not plan.sequences:
            return
        try:
            self._model_runner.copy_blocks(plan.copies)
            plan.copies = []
            result = self._model_runner.execute(plan, with_odds=self._trace is not None)
        except Exception as error:
            self._recover(plan, error, output)
            return
        sampled = result.sampled
        if result.failures:
            plan, sampled = self._without_failed(plan, result, output)
        self._counters.computed_tokens += plan.num_tokens
        searched = None
        if plan.searches and sampled is not None:
            searched, sampled = self._searches.take_rows(plan, sampled)
        self._counters.output_tokens += len(plan.samples)
        token_ids: list[int] = [] if sampled is None else sampled.token_ids.tolist()
        self._output_processor.process_prompts(result)
        if plan.drafted and sampled is not None:
            self._take_in_drafted(plan, token_ids, sampled, output, result.odds)
        else:
            self._scheduler.postprocess(plan, token_ids)
            if sampled is not None:
                rows = range(len(token_ids))
                self._output_processor.process(plan.samples, token_ids, rows, sampled, self._clock(), output)
        if self._speculation is not None:
            self._speculation.learn(plan, token_ids)
            self._scheduler.drop_drafts(plan)
        if plan.pooled:
            self._output_processor.finish_pooled(plan.pooled, output)
        if searched is not None:
            self._search_on(searched, output)

    def _search_on(self, searched: dict[SequenceGroup, list[SampledRow]], output: StepOutput) -> None:
        """Let the searches of lockstep groups take in their rows."""
        now = self._clock()
        for group, rows in searched.items():
            if not self._searches.settles_tokens(group):
                output.num_begun += not group.step_times
                self._counters.output_tokens += len(rows)
        settled, over = self._searches.advance(searched, now)
        self._counters.output_tokens += len(settled)
        for answer, row in settled:
            self._output_processor.settle(answer, row, now, output)
        for group, error in over.items():
            if group in self._searches:  # else a stop string has just ended it
                self._scheduler.finish_group(group, "stop" if error is None else "error", error=error)
                self._output_processor.finish_early(group, [], output)

    def _take_in_drafted(
        self, plan: Plan, token_ids: list[int], sampled: SampledTokens, output: StepOutput, odds: DraftOdds | None
    ) -> None:
        """Take in what was chosen as if it were by as many steps as the longest run of accepted draft tokens."""
        positions = [sequence.num_tokens for sequence in plan.drafted]
        now, counters = self._clock(), self._counters
        sequences, _ = plan.logits_rows()
        counters.draft_tokens += len(sequences) - len(plan.samples)
        for number, rows in enumerate(accepted_rows(plan, token_ids)):
            samples, chosen = [sequences[row] for row in rows], [token_ids[row] for row in rows]
            if number == 0:
                self._scheduler.postprocess(plan, chosen)
            else:
                self._scheduler.accept_drafts(samples, chosen)
                counters.accepted_tokens += len(rows)
                counters.output_tokens += len(rows)
            self._output_processor.process(samples, chosen, rows, sampled, now, output)
        if self._trace is not None and odds is not None:
            for sequence, position in zip(plan.drafted, positions, strict=True):
                row = sequences.index(sequence)
                chosen = token_ids[row : row + 1 + len(sequence.draft_token_ids)]
                self._trace.emit(odds.verdict(sequence, position, chosen))

    def _without_failed(self, plan: Plan, result: StepResult, output: StepOutput) -> tuple[Plan, SampledTokens | None]:
        """End the requests that failed by their own fault; what is left of the step, which has no drafts, without
        them."""
        failures = result.failures
        for group, error in failures.items():
            ended = self._scheduler.finish_group(group, "error", error=error)
            self._output_processor.finish_early(group, ended, output)
        rows = [row for row, sequence in enumerate(plan.samples) if sequence.group not in failures]
        left = Plan(
            [sequence for sequence in plan.sequences if sequence.group not in failures],
            [plan.samples[row] for row in rows],
            pooled=plan.pooled,
            searches=[group for group in plan.searches if group not in failures],
            num_tokens=plan.num_tokens,
        )
        return left, None if result.sampled is None else result.sampled.of_rows(rows)

    def _recover(self, plan: Plan, error: Exception, output: StepOutput) -> None:
        """A step failed. Whoever fails alone too fails for good; the others, whose bits do not depend on it, go on."""
        if plan.drafted:  # perhaps it was a guess that could not be computed
            self._scheduler.cancel_drafts(plan)
            self.run(plan, output)
            return
        parts = _parts(plan)
        if len(parts) > 1 and not plan.copies:
            for alone in parts:
                if not alone.sequences[0].is_finished:
                    self.run(alone, output)
            return
        failure = _failure(error)
        for sequence in plan.sequences:
            ended = self._scheduler.finish_group(sequence.group, "error", error=failure)
            if ended:
                self._output_processor.finish_early(sequence.group, ended, output)


def _failure(error: Exception) -> PellucidError:
    """What a request is told that failed with `error`."""
    if isinstance(error, PellucidError):
        return error
    failure: PellucidError
    if isinstance(error, MemoryError):
        failure = CapacityError("there was no memory for a step of this request: ask for less, or try again later")
    else:
        failure = BackendError(f"the step failed: {error!r}")
    failure.__cause__ = error
    return failure


def _parts(plan: Plan) -> list[Plan]:
    """What of `plan` can be computed without the rest: each sequence, or lockstep group."""
    parts: dict[Sequence | SequenceGroup, Plan] = {}
    for sequence in plan.sequences:
        group = sequence.group
        part = parts.setdefault(group if group.is_lockstep else sequence, Plan())
        part.sequences.append(sequence)
        part.num_tokens += sequence.num_scheduled_tokens
        part.samples += [
            sample for sample in plan.samples if sample is sequence or (sample.group is group and not group.is_forked)
        ]
        part.pooled += [pooled for pooled in plan.pooled if pooled is sequence]
        part.searches = [search for search in plan.searches if search is group]
    return list(parts.values())
