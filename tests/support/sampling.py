"""What the tests of the sampling oracle and of the native sampler share."""

from __future__ import annotations

from typing import Any

import numpy as np

from pellucid.core.batch import SamplingBatch, sampling_record
from pellucid.core.sampling_params import SamplingParams
from pellucid.decoding import pipeline
from pellucid.decoding.distribution import Logits


def make_batch(num_rows: int, **columns: Any) -> SamplingBatch:
    """A batch from scalars or arrays, by the names of SAMPLING_DTYPE; positions count from 0 where none are given."""
    rows = np.repeat(sampling_record(SamplingParams(), seed=0, num_prompt_tokens=0), num_rows)
    rows["position"] = np.arange(num_rows)
    for name, value in columns.items():
        rows[name] = value
    return SamplingBatch(rows)


def warped(logits: Logits, **columns: Any) -> Logits:
    """The distribution that is drawn from, of a row [vocab_size] with nothing to constrain it."""
    return pipeline.warp(logits, pipeline.RowSampling.of(make_batch(1, **columns), 0))


def chi_squared_bound(degrees_of_freedom: int) -> float:
    """Value that a chi-squared variable passes with a probability of 1e-4 (Wilson & Hilferty, 1931)."""
    variance = 2 / (9 * degrees_of_freedom)
    return degrees_of_freedom * (1 - variance + 3.719 * variance**0.5) ** 3
