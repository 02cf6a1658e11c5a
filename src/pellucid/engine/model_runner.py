"""Runs a step on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import SampledTokens, SamplingBatch
from pellucid.core.errors import PellucidError
from pellucid.core.metrics import StepTimes
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.logits_processors import descending
from pellucid.decoding.sampler import raw_logprobs
from pellucid.decoding.token_mask import TokenMask, apply_mask
from pellucid.engine.capture import CaptureBook
from pellucid.engine.constraints import ConstraintBook, Row, nothing_left
from pellucid.engine.custom_processors import ProcessorBook
from pellucid.engine.guidance import Guidance
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.scheduler import Plan
from pellucid.engine.search.hidden_states import HiddenStates
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
        rows: list[Row] = []
        if self._constraints or self._processors:
            rows = _rows(chosen, draft_offsets)
            self._constraints.begin(rows)
        built = clock()
        times.build += built - start
        logits = self._backend.forward(batch).logits
        if self._layer_contrast:
            self._layer_contrast.apply(logits)
        choices = logits[: len(samples)]
        if self._guidance:
            choices = self._guidance.apply(choices)
        computed = clock()
        times.forward += computed - built
        result = StepResult()
        if sampling is not None:
            if with_odds and plan.drafted:
                result.odds = DraftOdds(chosen, draft_offsets)
            result.sampled = self._sample(choices, rows, sampling, result)
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
        rows: list[Row],
        sampling: SamplingBatch,
        result: StepResult,
    ) -> SampledTokens:
        failures = result.failures
        masks = self._constraints.join(failures)
        if any(mask is not None for mask in masks):
            sampling = replace(sampling, masks=masks)
        processed = [row for row, (sequence, _) in enumerate(rows) if sequence.group in self._processors]
        if not processed:
            return self._choose(logits, sampling, result)
        told_raw = [row for row in processed if not sampling.rows["processed_logprobs"][row]]
        raw = logits[told_raw]
        logits = logits.copy()
        for row in processed:
            self._process(logits[row], rows[row], masks[row], failures)
        sampled = self._choose(logits, sampling, result)
        scores = _scores(raw, sampled.token_ids[told_raw], sampling.rows["num_logprobs"][told_raw])
        width = scores.top_ids.shape[1]
        sampled.logprobs[told_raw] = scores.logprobs
        sampled.top_ids[told_raw, :width] = scores.top_ids
        sampled.top_logprobs[told_raw, :width] = scores.top_logprobs
        return sampled

    def _choose(self, logits: NDArray[np.float32], sampling: SamplingBatch, result: StepResult) -> SampledTokens:
        if result.odds is not None:
            result.odds.take(logits, sampling)
        return self._backend.sample(logits, sampling)

    def _process(
        self,
        logits: NDArray[np.float32],
        row: Row,
        mask: TokenMask | None,
        failures: dict[SequenceGroup, PellucidError],
    ) -> None:
        """Let the processors of a request change its row of logits."""
        sequence, token_ids = row
        if sequence.group in failures:
            return
        try:
            self._processors.apply(sequence.group, token_ids, logits)
            if (logits if mask is None else apply_mask(logits, mask)).max() == -np.inf:
                raise nothing_left(sequence, token_ids)
        except PellucidError as error:
            failures[sequence.group] = error
            logits[:] = 0

    def _score_prompts(self, logits: NDArray[np.float32], sequences: list[Sequence], result: StepResult) -> None:
        """Take the log-probabilities of those tokens of prompts that come after the rows of `logits`."""
        token_ids: list[int] = []
        counts: list[int] = []
        for sequence in sequences:
            group, positions = sequence.group, sequence.scheduled_prompt_positions
            if positions:
                token_ids += group.prompt_token_ids[positions.start + 1 : positions.stop + 1]
                counts += [group.sampling_params.num_prompt_logprobs] * len(positions)
                result.prompts.append((group, len(positions)))
        result.prompt_scores = _scores(logits, np.array(token_ids, np.int32), np.array(counts, np.int32))


def _rows(samples: list[Sequence], draft_offsets: list[int]) -> list[Row]:
    if not draft_offsets:
        return [(sequence, sequence.token_ids) for sequence in samples]
    return [
        (sequence, sequence.token_ids + sequence.draft_token_ids[:offset] if offset else sequence.token_ids)
        for sequence, offset in zip(samples, draft_offsets, strict=True)
    ]


def _scores(
    logits: NDArray[np.float32], token_ids: NDArray[np.int32], num_logprobs: NDArray[np.int32]
) -> SampledTokens:
    """Log-probabilities of given tokens, one a row, and of the alternatives, in the model's own distribution."""
    num_rows, width = len(token_ids), max(0, int(num_logprobs.max(initial=0)))
    scores = SampledTokens(
        token_ids,
        np.full(num_rows, np.nan, np.float32),
        np.full((num_rows, width), -1, np.int32),
        np.full((num_rows, width), np.nan, np.float32),
    )
    for row, count in enumerate(num_logprobs.tolist()):
        if count >= 0:
            scores.logprobs[row] = raw_logprobs(logits[row], token_ids[row : row + 1].astype(np.intp))[0]
            ids = descending(logits[row])[:count]
            scores.top_ids[row, : len(ids)] = ids
            scores.top_logprobs[row, : len(ids)] = raw_logprobs(logits[row], ids)
    return scores
