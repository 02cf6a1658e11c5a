"""Additions to logits and penalties on what the text already holds, in the order they are applied (docs/decoding.md).

Each is a pure function from float32 logits [vocab_size] to float32 logits [vocab_size], in float32 with every operation
rounded alone. A logit of -inf stays so, a finite one stays finite: what overflows is held at the largest float32.
Token ids that are not in the vocabulary are passed over.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding import elementary
from pellucid.decoding.distribution import Logits

TokenIds = NDArray[np.int32]

_LARGEST = float(np.finfo(np.float32).max)


def logit_bias(logits: Logits, ids: TokenIds, values: NDArray[np.float32]) -> Logits:
    """Add `values` [n] to the logits of `ids` [n], each id once."""
    known = (ids >= 0) & (ids < logits.size)
    if not known.any():
        return logits
    ids, values = ids[known], values[known]
    with np.errstate(over="ignore"):
        return _replaced(logits, ids, logits[ids] + values)


def repetition_penalty(logits: Logits, tokens: TokenIds, penalty: float) -> Logits:
    """Of each token among `tokens`, prompt and output, divide a logit above 0 by `penalty` and multiply any other; 1
    changes nothing (Keskar et al., 2019)."""
    if penalty == 1.0:
        return logits
    ids = np.unique(_in_vocabulary(tokens, logits))
    factor = np.float32(penalty)
    seen = logits[ids]
    with np.errstate(over="ignore"):
        return _replaced(logits, ids, np.where(seen > 0, seen / factor, seen * factor))


def frequency_and_presence_penalty(logits: Logits, output: TokenIds, frequency: float, presence: float) -> Logits:
    """Of each token that `output` holds `count` times, subtract `frequency` * count and then `presence`; 0 changes
    nothing (OpenAI's API, 2020)."""
    if frequency == 0.0 and presence == 0.0:
        return logits
    ids, counts = np.unique(_in_vocabulary(output, logits), return_counts=True)
    with np.errstate(over="ignore", invalid="ignore"):  # -inf less an infinity: _replaced keeps the -inf
        by_count = np.float32(frequency) * counts.astype(np.float32)
        return _replaced(logits, ids, logits[ids] - by_count - np.float32(presence))


def dry(
    logits: Logits,
    tokens: TokenIds,
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    last_n: int,
    breakers: TokenIds,
) -> Logits:
    """Don't Repeat Yourself: penalize a token in proportion to how long a repetition it would go on with; a multiplier
    of 0 changes nothing (p-e-w, 2024, as in llama.cpp).

    In the last `last_n` tokens (-1: all) of prompt and output, a token t that is not a breaker and once followed the
    last n tokens of the text, n >= `allowed_length` at most the number of tokens after the last breaker, loses
    `multiplier` * `base` ** (n - `allowed_length`) for the largest such n: in float64, rounded to float32.
    """
    window = tokens if last_n < 0 else tokens[max(0, tokens.size - last_n) :]
    if multiplier == 0.0 or window.size < 2:
        return logits
    broken = np.flatnonzero(np.isin(window, breakers))
    limit = window.size - 1 - int(broken[-1]) if broken.size else window.size
    lengths = np.minimum(_suffix_matches(window)[:-1], limit)
    longest = np.full(logits.size, -1, dtype=np.int64)
    followers = window[1:]
    valid = (followers >= 0) & (followers < logits.size) & ~np.isin(followers, breakers)
    np.maximum.at(longest, followers[valid], lengths[valid])
    ids = np.flatnonzero(longest >= allowed_length)
    wide_multiplier, wide_base = float(np.float32(multiplier)), float(np.float32(base))
    penalties = [wide_multiplier * elementary.power(wide_base, float(longest[t] - allowed_length)) for t in ids]
    with np.errstate(over="ignore"):
        return _replaced(logits, ids, logits[ids] - np.minimum(penalties, _LARGEST).astype(np.float32))


def _suffix_matches(tokens: TokenIds) -> NDArray[np.int64]:
    """For each position, how many tokens up to it equal the last ones of `tokens` [n]; n at the end.

    The Z-algorithm (Gusfield, 1997) from the end, linear in n.
    """
    reverse = tokens[::-1].tolist()
    size = len(reverse)
    matches = [0] * size
    matches[0] = size
    begin = end = 0  # of the match found so far that reaches furthest
    for i in range(1, size):
        length = min(end - i, matches[i - begin]) if i < end else 0
        while i + length < size and reverse[length] == reverse[i + length]:
            length += 1
        matches[i] = length
        if i + length > end:
            begin, end = i, i + length
    return np.array(matches[::-1], dtype=np.int64)


def _in_vocabulary(tokens: TokenIds, logits: Logits) -> TokenIds:
    return tokens[(tokens >= 0) & (tokens < logits.size)]


def _replaced(logits: Logits, ids: NDArray[np.integer], values: NDArray[np.float32]) -> Logits:
    """`logits` with `values` at `ids`, held finite where they were."""
    changed = logits.copy()
    changed[ids] = np.where(logits[ids] > -np.inf, np.clip(values, -_LARGEST, _LARGEST), -np.inf)
    return changed
