"""Which tokens may be chosen at all (docs/decoding.md).

A mask is uint32 [ceil(vocab_size / 32)], token t at bit t % 32 of word t // 32, set where t may be chosen: llguidance's
layout. Bits beyond the vocabulary mean nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding.distribution import Logits, keep_only

TokenMask = NDArray[np.uint32]
TokenIds = NDArray[np.int32]


def apply_mask(logits: Logits, mask: TokenMask) -> Logits:
    """The logit of each token that may not be chosen becomes -inf. All may be -inf then."""
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little", count=logits.size)
    return keep_only(logits, bits.astype(np.bool_))


def without(logits: Logits, ids: TokenIds) -> Logits:
    """The logits of `ids`, those of them that are in the vocabulary, become -inf. All may be -inf then."""
    if not ids.size:
        return logits
    keep = np.ones(logits.size, dtype=np.bool_)
    keep[ids[(ids >= 0) & (ids < logits.size)]] = False
    return keep_only(logits, keep)


def repeated_ngrams(tokens: TokenIds, size: int) -> TokenIds:
    """The tokens that would make the last `size` tokens of the text the same as `size` consecutive tokens of `tokens`;
    none for a size of 0 (Paulus et al., 2017). Ascending ids."""
    if size == 0 or tokens.size < size:
        return np.empty(0, dtype=np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    suffix = tokens[tokens.size - (size - 1) :]
    return np.unique(windows[(windows[:, :-1] == suffix).all(axis=1), -1])
