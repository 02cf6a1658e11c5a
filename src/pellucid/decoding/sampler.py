"""Choosing tokens: the numpy oracle of the native sampler, which gives the same tokens (docs/decoding.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import NOTHING_ALLOWED, SampledTokens, SamplingBatch
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.core.validation import INT32_MAX
from pellucid.decoding import distribution, mirostat, pipeline
from pellucid.decoding.distribution import Logits
from pellucid.decoding.pipeline import RowSampling

_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def sample(logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
    """Choose one token a row. A row's answer depends on that row alone.

    Args:
        logits: float32 [num_rows, vocab_size], finite or -inf; left unchanged.
        sampling: one entry a row.

    Raises:
        BackendError: a row holds NaN or +inf, or nothing but -inf.
        InvalidRequestError: a sampling parameter is out of range.
    """
    if logits.ndim != 2 or logits.shape[0] != sampling.num_rows:
        raise BackendError(f"logits have shape {logits.shape}, but there are {sampling.num_rows} rows to sample")
    num_rows, vocab_size = logits.shape
    if not 1 <= vocab_size <= distribution.MAX_VOCAB_SIZE:
        raise BackendError(f"vocabulary of {vocab_size} tokens; 1 to {distribution.MAX_VOCAB_SIZE} can be sampled")
    check_parameters(sampling, vocab_size)

    width = min(int(sampling.rows["num_logprobs"].max(initial=0)), vocab_size)
    token_ids = np.full(num_rows, NOTHING_ALLOWED, dtype=np.int32)
    logprobs = np.full(num_rows, np.nan, dtype=np.float32)
    top_ids = np.full((num_rows, width), -1, dtype=np.int32)
    top_logprobs = np.full((num_rows, width), np.nan, dtype=np.float32)
    mirostat_mu = sampling.rows["mirostat_mu"].copy()
    for k in range(num_rows):
        raw, row = logits[k], RowSampling.of(sampling, k)
        check_logits(raw, k)
        allowed = pipeline.constrain(raw, row)
        if allowed.max() == -np.inf:
            continue
        final = pipeline.warp(allowed, row)
        token = token_ids[k] = int(np.argmax(final)) if row["temperature"] == 0 else draw(final, row.draw_bits())
        if row["mirostat"] and row["temperature"] != 0:
            observed = mirostat.surprise(final, token)
            mirostat_mu[k] = mirostat.next_mu(row["mirostat_mu"], observed, row["mirostat_tau"], row["mirostat_eta"])
        if row["num_logprobs"] >= 0:
            reported = final if row["processed_logprobs"] else raw
            logprobs[k] = log_probabilities(reported, np.array([token]))[0]
            ids = distribution.descending(reported)[: row["num_logprobs"]]
            if row["processed_logprobs"]:
                ids = ids[reported[ids] > -np.inf]
            top_ids[k, : ids.size] = ids
            top_logprobs[k, : ids.size] = log_probabilities(reported, ids)
    uses_mirostat = bool(sampling.rows["mirostat"].any())
    return SampledTokens(token_ids, logprobs, top_ids, top_logprobs, mirostat_mu if uses_mirostat else None)


def draw(logits: Logits, bits: int) -> int:
    """The token that 64 random bits choose: with `target` = floor(bits * total weight / 2**64), the first id whose
    cumulative weight, by rising id, exceeds it."""
    cumulative = np.cumsum(distribution.weights(logits))
    target = bits * int(cumulative[-1]) >> 64
    return int(np.searchsorted(cumulative, target, side="right"))


def log_probabilities(logits: Logits, ids: NDArray[np.intp]) -> NDArray[np.float32]:
    """Natural log of softmax(`logits`) at `ids`: float32 [len(ids)], computed in float64."""
    below_max = logits[ids].astype(np.float64) - float(logits.max())
    return (below_max - distribution.log_total(logits)).astype(np.float32)


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


def check_parameters(sampling: SamplingBatch, vocab_size: int) -> None:
    """Raises:
    InvalidRequestError: a value is out of its range.
    BackendError: a mask is not of the vocabulary's size.
    """
    rows = sampling.rows
    for name, (valid, wanted) in _RANGES.items():
        outside = ~valid(rows[name])
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise InvalidRequestError(f"{name} of row {row} is {rows[name][row]}; it must be {wanted}", param=name)
    for row, mask in enumerate(sampling.masks or ()):
        if mask is not None and mask.size != -(-vocab_size // 32):
            raise BackendError(f"the mask of row {row} has {mask.size} words for a vocabulary of {vocab_size} tokens")


def _between(low: float, high: float) -> Callable[[NDArray[Any]], NDArray[np.bool_]]:
    return lambda value: (value >= low) & (value <= high)


def _above(low: float, high: float = _LARGEST_FLOAT) -> Callable[[NDArray[Any]], NDArray[np.bool_]]:
    return lambda value: (value > low) & (value <= high)


_RANGES: dict[str, tuple[Callable[[NDArray[Any]], NDArray[np.bool_]], str]] = {
    "temperature": (_between(0, _LARGEST_FLOAT), "0 (greedy) or above"),
    "dynatemp_range": (_between(0, _LARGEST_FLOAT), "0 or above"),
    "dynatemp_exponent": (_between(0, _LARGEST_FLOAT), "0 or above"),
    "top_n_sigma": (_between(0, _LARGEST_FLOAT), "0 (keep all) or above"),
    "top_k": (_between(0, INT32_MAX), "0 (keep all) or above"),
    "top_p": (_above(0, 1), "above 0 and at most 1"),
    "min_p": (_between(0, 1), "from 0 to 1"),
    "typical_p": (_above(0, 1), "above 0 and at most 1"),
    "epsilon_cutoff": (_between(0, 1), "from 0 to 1"),
    "eta_cutoff": (_between(0, 1), "from 0 to 1"),
    "xtc_probability": (_between(0, 1), "from 0 to 1"),
    "xtc_threshold": (_between(0, 1), "from 0 to 1"),
    "mirostat": (_between(0, 2), "0 (off), 1 or 2"),
    "mirostat_tau": (_between(0, _LARGEST_FLOAT), "0 or above"),
    "mirostat_eta": (_between(0, _LARGEST_FLOAT), "0 or above"),
    "mirostat_mu": (np.isfinite, "finite"),
    "repetition_penalty": (_above(0), "above 0"),
    "presence_penalty": (np.isfinite, "finite"),
    "frequency_penalty": (np.isfinite, "finite"),
    "dry_multiplier": (_between(0, _LARGEST_FLOAT), "0 (off) or above"),
    "dry_base": (_between(1, _LARGEST_FLOAT), "1 or above"),
    "dry_allowed_length": (_between(1, INT32_MAX), "1 or above"),
    "dry_penalty_last_n": (_between(-1, INT32_MAX), "-1 (all) or above"),
    "no_repeat_ngram_size": (_between(0, INT32_MAX), "0 (off) or above"),
    "num_prompt_tokens": (_between(0, INT32_MAX), "0 or above"),
    "num_logprobs": (_between(-1, INT32_MAX), "-1 (none) or above"),
    "processed_logprobs": (_between(0, 1), "0 or 1"),
}
