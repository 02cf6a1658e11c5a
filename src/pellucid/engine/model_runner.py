"""Runs a step on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import SampledTokens, SamplingBatch
from pellucid.core.metrics import StepTimes
from pellucid.core.sequence import Sequence
from pellucid.decoding.sampler import raw_logprobs
from pellucid.engine.capture import CaptureBook
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.scheduler import Plan


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
        times: StepTimes,
        clock: Callable[[], float],
    ) -> None:
        self._captures = captures
        self._layer_contrast = layer_contrast
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

    def execute(self, plan: Plan) -> SampledTokens | None:
        """Compute what is scheduled; choose the next token of each of the plan's logits rows, None without any.

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
        sampling = self._input_builder.build_sampling(samples, draft_offsets) if samples else None
        built = clock()
        times.build += built - start
        logits = self._backend.forward(batch).logits
        if self._layer_contrast:
            self._layer_contrast.apply(logits)
        computed = clock()
        times.forward += computed - built
        sampled = None if sampling is None else self._sample(logits, samples, draft_offsets, sampling)
        if sampled is not None and sampled.mirostat_mu is not None:
            for sequence, mirostat_mu in zip(samples, sampled.mirostat_mu.tolist(), strict=True):
                sequence.mirostat_mu = mirostat_mu
        times.sample += clock() - computed
        if is_captured:
            self._captures.commit(batch)
        return sampled

    def _sample(
        self,
        logits: NDArray[np.float32],
        samples: list[Sequence],
        draft_offsets: list[int],
        sampling: SamplingBatch,
    ) -> SampledTokens:
        barred = [
            row
            for row, sequence in enumerate(samples)
            if (minimum := sequence.group.sampling_params.min_tokens)
            and sequence.num_output_tokens + (draft_offsets[row] if draft_offsets else 0) < minimum
        ]
        if not barred:
            return self._backend.sample(logits, sampling)
        allowed = logits.copy()
        for row in barred:
            allowed[row, list(samples[row].group.stop_token_ids)] = -np.inf
        chosen = self._backend.sample(allowed, sampling)
        if (sampling.rows["num_logprobs"] < 0).all():
            return chosen
        return _with_raw_logprobs(chosen, self._backend.sample(logits, sampling), logits, sampling)


def _with_raw_logprobs(
    chosen: SampledTokens, raw: SampledTokens, logits: NDArray[np.float32], sampling: SamplingBatch
) -> SampledTokens:
    """`chosen` with the log-probabilities that the model itself gives, barred tokens included."""
    logprobs = chosen.logprobs.copy()
    for row in np.flatnonzero(sampling.rows["num_logprobs"] >= 0):
        logprobs[row] = raw_logprobs(logits[row], chosen.token_ids[row : row + 1].astype(np.intp))[0]
    return replace(chosen, logprobs=logprobs, top_ids=raw.top_ids, top_logprobs=raw.top_logprobs)
