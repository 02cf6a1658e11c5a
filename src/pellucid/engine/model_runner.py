"""Runs a step on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import NOTHING_ALLOWED, SampledTokens, SamplingBatch
from pellucid.core.errors import PellucidError
from pellucid.core.metrics import StepTimes
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.engine.capture import CaptureBook
from pellucid.engine.constraints import ConstraintBook, Row, nothing_left
from pellucid.engine.custom_processors import ProcessorBook
from pellucid.engine.guidance import Guidance
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.logprobs import GIVEN, score_given
from pellucid.engine.scheduler import Plan
from pellucid.engine.speculative.verdicts import DraftOdds


@dataclass(slots=True)
class StepResult:
    """What a step has come to.

    Attributes:
        sampled: a choice for each of the plan's logits rows; None without any.
        prompt_scores: one row for each token of a prompt whose log-probability is now known; None without any.
        prompts: whose tokens those are, and how many of each.
        odds: of the draft tokens, where they were asked for.
        failures: the requests that cannot go on, each by its own fault; what was chosen for them counts for nothing.
    """

    sampled: SampledTokens | None = None
    prompt_scores: SampledTokens | None = None
    prompts: list[tuple[SequenceGroup, int]] = field(default_factory=list)
    odds: DraftOdds | None = None
    failures: dict[SequenceGroup, PellucidError] = field(default_factory=dict)


class ModelRunner:
    """One forward call and one sampling call a step, both on arrays that are reused.

    `times` is where the seconds of building, forward and sampling, on `clock`, are added up.
    """

    def __init__(
        self,
        backend: Backend,
        input_builder: InputBuilder,
        captures: CaptureBook,
        layer_contrast: LayerContrast,
        constraints: ConstraintBook,
        processors: ProcessorBook,
        guidance: Guidance,
        hidden_states: HiddenStates,
        times: StepTimes,
        clock: Callable[[], float],
    ) -> None:
        self._captures = captures
        self._layer_contrast = layer_contrast
        self._constraints = constraints
        self._processors = processors
        self._guidance = guidance
        self._hidden_states = hidden_states
        self._times = times
        self._backend = backend
        self._input_builder = input_builder
        self._clock = clock

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy KV blocks, in order; `copies` are (source, destination) pairs.

        Raises:
            BackendError: the backend failed.
        """
        if copies:
            self._backend.copy_blocks(np.array(copies, np.int32))

    def execute(self, plan: Plan, *, with_odds: bool = False) -> StepResult:
        """Compute what is scheduled; choose the next token of each of the plan's logits rows. `with_odds` also tells
        how probable draft tokens were.

        Raises:
            BackendError: the backend failed, or gave logits that are not finite.
            CapacityError: there is no memory for what a request captures.
        """
        times, clock = self._times, self._clock
        start = clock()
        samples, draft_offsets = plan.logits_rows()
        batch = self._input_builder.build(plan.sequences, samples)
        if self._captures:
            batch = self._captures.attach(batch, plan.sequences)
        is_captured = batch.capture is not None
        if self._layer_contrast:
            batch = self._layer_contrast.attach(batch, samples)
        if self._hidden_states:
            batch = self._hidden_states.attach(batch, plan.sequences)
        chosen = samples
        if self._guidance:
            chosen, draft_offsets = self._guidance.attach(samples, draft_offsets)
        sampling = self._input_builder.build_sampling(chosen, draft_offsets) if samples else None
        if self._constraints:
            self._constraints.begin(_rows(chosen, draft_offsets))
        built = clock()
        times.build += built - start
        logits = self._backend.forward(batch).logits
        result = StepResult()
        masks = self._constraints.join(result.failures) if self._constraints else []
        if self._layer_contrast:
            self._layer_contrast.apply(logits, dict(zip(chosen, masks, strict=False)))
        choices = logits[: len(samples)]
        if self._guidance:
            choices = self._guidance.apply(choices)
        computed = clock()
        times.forward += computed - built
        if sampling is not None:
            if any(mask is not None for mask in masks):
                sampling = replace(sampling, masks=masks)
            if with_odds and plan.drafted:
                result.odds = DraftOdds(chosen, draft_offsets)
            result.sampled = self._sample(choices, chosen, draft_offsets, sampling, result)
            if result.failures and plan.drafted:  # perhaps after a guess that is wrong
                raise next(iter(result.failures.values()))
            if result.sampled.mirostat_mu is not None:
                for sequence, mirostat_mu in zip(chosen, result.sampled.mirostat_mu.tolist(), strict=True):
                    sequence.mirostat_mu = mirostat_mu
            if self._guidance:
                result.sampled = self._guidance.expand(result.sampled)
        if len(logits) > len(samples):
            self._score_prompts(logits[len(samples) :], plan.sequences, result)
        times.sample += clock() - computed
        if is_captured:
            self._captures.commit(batch)
        if self._hidden_states:
            self._hidden_states.commit()
        return result

    def _sample(
        self,
        logits: NDArray[np.float32],
        samples: list[Sequence],
        draft_offsets: list[int],
        sampling: SamplingBatch,
        result: StepResult,
    ) -> SampledTokens:
        if self._processors:
            sampled = self._sample_processed(logits, _rows(samples, draft_offsets), sampling, result)
        else:
            sampled = self._choose(logits, sampling, result)
            if sampling.masks is None and sampling.tokens is None:
                return sampled
        if NOTHING_ALLOWED in sampled.token_ids.tolist():  # quicker to search than an array
            rows = zip(_rows(samples, draft_offsets), sampled.token_ids != NOTHING_ALLOWED, strict=True)
            self._fail_without_choice(list(rows), result)
        return sampled

    @staticmethod
    def _fail_without_choice(rows: list[tuple[Row, np.bool_]], result: StepResult) -> None:
        """Fail the requests with a row that has no token to choose; a search only where none of its rows has, since it
        may go on from the others."""
        searching = {row[0].group for row, has_choice in rows if has_choice and row[0].group.is_lockstep}
        for (sequence, token_ids), has_choice in rows:
            if not has_choice and sequence.group not in searching:
                result.failures.setdefault(sequence.group, nothing_left(sequence, token_ids))

    def _choose(self, logits: NDArray[np.float32], sampling: SamplingBatch, result: StepResult) -> SampledTokens:
        if result.odds is not None:
            result.odds.take(logits, sampling)
        return self._backend.sample(logits, sampling)

    def _sample_processed(
        self,
        logits: NDArray[np.float32],
        rows: list[Row],
        sampling: SamplingBatch,
        result: StepResult,
    ) -> SampledTokens:
        """Sample once processors have changed their rows of `logits`; log-probabilities stay the model's own, unless
        processed ones are wanted."""
        processed = [row for row, (sequence, _) in enumerate(rows) if sequence.group in self._processors]
        records = sampling.rows[processed]
        wants_raw = (records["num_logprobs"] >= 0) & (records["processed_logprobs"] == 0)
        raw = [row for row, wanted in zip(processed, wants_raw, strict=True) if wanted]
        raw_logits = logits[raw]
        for row in processed:
            sequence, token_ids = rows[row]
            if sequence.group not in result.failures:
                try:
                    self._processors.apply(sequence.group, token_ids, logits[row])
                    if logits[row].max() == -np.inf:
                        raise nothing_left(sequence, token_ids)
                except PellucidError as error:
                    result.failures[sequence.group] = error
                    logits[row] = 0
        sampled = self._choose(logits, sampling, result)
        if raw:
            chosen = np.maximum(sampled.token_ids[raw], 0)  # of a row that has none, nothing counts
            scores = score_given(self._backend, raw_logits, chosen, sampling.rows[raw])
            width = scores.top_ids.shape[1]
            sampled.logprobs[raw] = scores.logprobs
            sampled.top_ids[raw, :width] = scores.top_ids
            sampled.top_logprobs[raw, :width] = scores.top_logprobs
        return sampled

    def _score_prompts(self, logits: NDArray[np.float32], sequences: list[Sequence], result: StepResult) -> None:
        """Take the log-probabilities of those tokens of prompts that come after the rows of `logits`."""
        token_ids: list[int] = []
        records: list[NDArray[np.void]] = []
        for sequence in sequences:
            group, positions = sequence.group, sequence.scheduled_prompt_positions
            if positions:
                rows = np.repeat(GIVEN, len(positions))
                rows["seed"] = group.seed
                rows["position"] = np.arange(positions.start + 1, positions.stop + 1)
                rows["num_logprobs"] = group.sampling_params.num_prompt_logprobs
                records.append(rows)
                token_ids += group.prompt_token_ids[positions.start + 1 : positions.stop + 1]
                result.prompts.append((group, len(positions)))
        ids = np.array(token_ids, np.int32)
        result.prompt_scores = score_given(self._backend, logits, ids, np.concatenate(records))


def _rows(samples: list[Sequence], draft_offsets: list[int]) -> list[Row]:
    if not draft_offsets:
        return [(sequence, sequence.token_ids) for sequence in samples]
    return [
        (sequence, sequence.token_ids + sequence.draft_token_ids[:offset] if offset else sequence.token_ids)
        for sequence, offset in zip(samples, draft_offsets, strict=True)
    ]
