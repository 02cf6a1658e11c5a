"""Choosing tokens: the numpy oracle of the native sampler, which gives the same tokens (docs/decoding.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import SampledTokens, SamplingBatch
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.decoding import logits_processors as transforms
from pellucid.decoding import rng, truncation
from pellucid.decoding.logits_processors import Logits


def sample(logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
    """Choose one token a row. A row's answer depends on that row alone.

    Args:
        logits: float32 [num_rows, vocab_size], finite or -inf; left unchanged.
        sampling: one entry a row.

    Raises:
        BackendError: a row holds NaN or +inf, or nothing but -inf.
        InvalidRequestError: a sampling parameter is out of range.
    """
    check_parameters(sampling)
    if logits.ndim != 2 or logits.shape[0] != sampling.num_rows:
        raise BackendError(f"logits have shape {logits.shape}, but there are {sampling.num_rows} rows to sample")
    num_rows, vocab_size = logits.shape
    if not 1 <= vocab_size <= transforms.MAX_VOCAB_SIZE:
        raise BackendError(f"vocabulary of {vocab_size} tokens; 1 to {transforms.MAX_VOCAB_SIZE} can be sampled")

    rows = sampling.rows
    width = min(int(rows["num_logprobs"].max(initial=0)), vocab_size)
    token_ids = np.empty(num_rows, dtype=np.int32)
    logprobs = np.full(num_rows, np.nan, dtype=np.float32)
    top_ids = np.full((num_rows, width), -1, dtype=np.int32)
    top_logprobs = np.full((num_rows, width), np.nan, dtype=np.float32)
    for row in range(num_rows):
        raw = logits[row]
        check_logits(raw, row)
        token = _choose(raw, sampling, row)
        token_ids[row] = token
        if rows["num_logprobs"][row] >= 0:
            logprobs[row] = raw_logprobs(raw, np.array([token]))[0]
            ids = transforms.descending(raw)[: rows["num_logprobs"][row]]
            top_ids[row, : ids.size] = ids
            top_logprobs[row, : ids.size] = raw_logprobs(raw, ids)
    return SampledTokens(token_ids, logprobs, top_ids, top_logprobs)


def process(logits: Logits, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Logits:
    """Logits after every transform; temperature is above 0. Removed tokens are -inf."""
    logits = transforms.temperature(logits, temperature)
    logits = truncation.top_k(logits, top_k)
    logits = truncation.top_p(logits, top_p)
    return truncation.min_p(logits, min_p)


def draw(logits: Logits, bits: int) -> int:
    """The token that 64 random bits choose: with `target` = floor(bits * total weight / 2**64), the first id whose
    cumulative weight, by rising id, exceeds it."""
    cumulative = np.cumsum(transforms.weights(logits))
    target = bits * int(cumulative[-1]) >> 64
    return int(np.searchsorted(cumulative, target, side="right"))


def raw_logprobs(logits: Logits, ids: NDArray[np.intp]) -> NDArray[np.float32]:
    """Natural log of softmax(`logits`) at `ids`: float32 [len(ids)], computed in float64."""
    below_max = logits[ids].astype(np.float64) - float(logits.max())
    return (below_max - transforms.log_total(logits)).astype(np.float32)


def check_logits(logits: Logits, row: int) -> None:
    """Raises:
    BackendError: a logit is NaN or +inf, or all are -inf.
    """
    bad = np.flatnonzero(~(logits < np.inf))
    if bad.size:
        value = "NaN" if np.isnan(logits[bad[0]]) else "+inf"
        raise BackendError(f"logits of row {row} cannot be sampled: token {bad[0]} has {value}")
    if logits.max() == -np.inf:
        raise BackendError(f"logits of row {row} cannot be sampled: every token has -inf")


def check_parameters(sampling: SamplingBatch) -> None:
    """Raises:
    InvalidRequestError: a value is out of its range.
    """
    rows = sampling.rows
    for name, (valid, wanted) in _RANGES.items():
        outside = ~valid(rows[name])
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise InvalidRequestError(f"{name} of row {row} is {rows[name][row]}; it must be {wanted}", param=name)


_RANGES: dict[str, tuple[Callable[[NDArray[Any]], NDArray[np.bool_]], str]] = {
    "temperature": (lambda value: np.isfinite(value) & (value >= 0), "0 (greedy) or above"),
    "top_k": (lambda value: value >= 0, "0 (keep all) or above"),
    "top_p": (lambda value: (value > 0) & (value <= 1), "above 0 and at most 1"),
    "min_p": (lambda value: (value >= 0) & (value <= 1), "from 0 to 1"),
    "num_logprobs": (lambda value: value >= -1, "-1 (none) or above"),
}


def _choose(raw: Logits, sampling: SamplingBatch, row: int) -> int:
    record = sampling.rows[row]
    if record["temperature"] == 0:
        return int(np.argmax(raw))
    logits = process(
        raw,
        temperature=float(record["temperature"]),
        top_k=int(record["top_k"]),
        top_p=float(record["top_p"]),
        min_p=float(record["min_p"]),
    )
    return draw(logits, rng.draw_bits(*(int(record[name]) for name in ("seed", "sequence_index", "position"))))
