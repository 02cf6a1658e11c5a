"""What the tests of the sampling oracle and of the native sampler share."""

from __future__ import annotations

from typing import Any

import numpy as np

from pellucid.core.batch import SamplingBatch


def make_batch(
    num_rows: int,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    sequence_index: Any = 0,
    position: Any = None,
    num_logprobs: Any = -1,
) -> SamplingBatch:
    """A batch from scalars or arrays; positions count from 0."""

    def column(value: Any, dtype: Any) -> Any:
        return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype=dtype), num_rows))

    return SamplingBatch(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        seed=column(seed, np.uint64),
        sequence_index=column(sequence_index, np.uint32),
        position=column(np.arange(num_rows) if position is None else position, np.uint32),
        num_logprobs=column(num_logprobs, np.int32),
    )


def chi_squared_bound(degrees_of_freedom: int) -> float:
    """Value that a chi-squared variable passes with a probability of 1e-4 (Wilson & Hilferty, 1931)."""
    variance = 2 / (9 * degrees_of_freedom)
    return degrees_of_freedom * (1 - variance + 3.719 * variance**0.5) ** 3
