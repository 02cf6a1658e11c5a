"""The tokens that no repetition reaches across, for DRY."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from pellucid.tokenizer.tokenizer import Tokenizer

MAX_REMEMBERED = 16
"""Sets of strings whose tokens are kept: most requests have the same ones."""


class SequenceBreakers:
    """From strings to the tokens whose text holds one of them, as llama.cpp takes them. The vocabulary is read when the
    first are asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = min(vocab_size, tokenizer.vocab_size)  # a model may have more rows than there are tokens
        self._text = b""
        self._ends = np.empty(0, np.int64)  # of each token in `_text`
        self._remembered: OrderedDict[tuple[str, ...], NDArray[np.int32]] = OrderedDict()

    def token_ids(self, strings: tuple[str, ...]) -> NDArray[np.int32]:
        """Ids int32 [n], ascending, of the tokens that hold one of `strings`. Read-only."""
        found = self._remembered.get(strings)
        if found is None:
            holders = {token for string in strings for token in self._holders(string.encode("utf-8", "surrogatepass"))}
            found = self._remembered[strings] = np.array(sorted(holders), np.int32)
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        else:
            self._remembered.move_to_end(strings)
        return found

    def _holders(self, string: bytes) -> list[int]:
        if not self._text:
            tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(self._num_tokens)]
            self._text = b"".join(tokens)
            self._ends = np.cumsum([len(token) for token in tokens])
        holders = []
        place = self._text.find(string)
        while place >= 0:
            token = int(np.searchsorted(self._ends, place, side="right"))
            end = int(self._ends[token])
            if place + len(string) <= end:
                holders.append(token)
                place = self._text.find(string, end)
            else:  # from the end of one token to the beginning of the next
                place = self._text.find(string, place + 1)
        return holders
