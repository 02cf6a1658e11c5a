"""Which tokens may be chosen at all: bit masks, and what puts tokens out of them (docs/decoding.md).

A mask is uint32 [ceil(vocab_size / 32)], token t at bit t % 32 of word t // 32, set where t may be chosen: llguidance's
layout. Bits beyond the vocabulary mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pellucid.decoding.logits_processors import Logits, keep_only

TokenMask = NDArray[np.uint32]
TokenIds = NDArray[np.int32]

_ALL = np.uint32(0xFFFFFFFF)


def mask_size(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


def everything(vocab_size: int) -> TokenMask:
    """A mask that lets every token be chosen."""
    return np.full(mask_size(vocab_size), _ALL)


def only(vocab_size: int, ids: Iterable[int]) -> TokenMask:
    """A mask that lets `ids` be chosen and nothing else."""
    mask = np.zeros(mask_size(vocab_size), dtype=np.uint32)
    words, bits = _places(ids)
    np.bitwise_or.at(mask, words, bits)
    return mask


def ban(mask: TokenMask, ids: Iterable[int]) -> None:
    """Put `ids` out of `mask`, in place."""
    words, bits = _places(ids)
    np.bitwise_and.at(mask, words, ~bits)


def apply_mask(logits: Logits, mask: TokenMask) -> Logits:
    """The logit of each token that may not be chosen becomes -inf. All may be -inf then."""
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little", count=logits.size)
    return keep_only(logits, bits.astype(np.bool_))


def repeated_ngrams(tokens: TokenIds, size: int) -> TokenIds:
    """The tokens that would make the last `size` tokens of the text the same as `size` consecutive tokens of `tokens`;
    none for a size of 0 (Paulus et al., 2017). Ascending ids."""
    if size == 0 or tokens.size < size:
        return np.empty(0, dtype=np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    suffix = tokens[tokens.size - (size - 1) :]
    return np.unique(windows[(windows[:, :-1] == suffix).all(axis=1), -1])


def bad_word_ends(tokens: Sequence[int], bad_words: Iterable[Sequence[int]]) -> list[int]:
    """The last token of each of `bad_words`, sequences of at least one token, whose others end `tokens`."""
    ends = []
    for word in bad_words:
        begin = len(tokens) - (len(word) - 1)
        if begin >= 0 and all(token == tokens[begin + i] for i, token in enumerate(word[:-1])):
            ends.append(word[-1])
    return ends


def _places(ids: Iterable[int]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Words of the tokens and their bits in them."""
    array = np.fromiter(ids, dtype=np.int64)
    return array >> 5, np.uint32(1) << (array & 31).astype(np.uint32)
