"""Byte pair encoding (Sennrich et al., 2016): the merge loop, and an encoder that stays quick from the first word on.

Text comes in words that come again, so an encoder merges each word once, in the loop below, on plain dictionaries, and
remembers it. The `tokenizers` library is for long stretches without a break (a megabyte of one letter, base64), which
it merges three to ten times faster. It is built only once there has been enough of them to pay: its merge table takes
0.05 s for 49,000 tokens and over 1 s for 262,000, more than a first answer may. Both give the same ids; a test compares
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.models import BPE

PairRank = Callable[[str, str], float | None]
EncodePiece = Callable[[str], list[int]]

LONG_PIECE = 64  # characters; shorter ones are remembered
HAND_OVER_CHARACTERS = 1 << 17  # in long pieces
_MAX_CACHED_PIECES = 1 << 16


def merge_symbols(symbols: list[str], pair_rank: PairRank) -> list[str]:
    """Merges adjacent symbols, lowest rank first and leftmost of equals, until no pair has a rank.

    Args:
        symbols: what the text starts as, one character each.
        pair_rank: rank of the merge of two adjacent symbols, or None if they do not merge.
    """
    count = len(symbols)
    if count < 2:
        return symbols
    symbols = symbols.copy()
    queue = []
    for index in range(count - 1):
        left, right = symbols[index], symbols[index + 1]
        rank = pair_rank(left, right)
        if rank is not None:
            queue.append((rank, index, left, right))
    heapify(queue)
    following = list(range(1, count + 1))
    preceding = list(range(-1, count - 1))
    while queue:
        _, index, left, right = heappop(queue)
        after = following[index]
        if symbols[index] != left or after == count or symbols[after] != right:
            continue  # one of the two has been merged since
        merged = symbols[index] = left + right
        symbols[after] = ""
        after = following[index] = following[after]
        if after < count:
            preceding[after] = index
            rank = pair_rank(merged, symbols[after])
            if rank is not None:
                heappush(queue, (rank, index, merged, symbols[after]))
        before = preceding[index]
        if before >= 0:
            rank = pair_rank(symbols[before], merged)
            if rank is not None:
                heappush(queue, (rank, before, symbols[before], merged))
    return [symbol for symbol in symbols if symbol]


class BytePairEncoder:
    """Text to ids.

    Args:
        split: text to the pieces that merges never cross.
        encode_piece: ids of one piece, by the merge loop.
        build_library: builds the library's encoder of one piece; None where it cannot give the same ids.
    """

    def __init__(
        self,
        split: Callable[[str], Iterable[str]],
        encode_piece: EncodePiece,
        build_library: Callable[[], EncodePiece | None],
    ) -> None:
        self._split = split
        self._encode_piece = encode_piece
        self._build_library = build_library
        self._library: EncodePiece | None = None
        self._library_tried = False
        self._lock = threading.Lock()
        self._long_characters = 0
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which holds no added token."""
        ids: list[int] = []
        cache = self._cache
        for piece in self._split(text):
            found = cache.get(piece)
            if found is None:
                if len(piece) > LONG_PIECE:
                    found = self._encode_long(piece)
                else:
                    found = self._encode_piece(piece)
                    if len(cache) >= _MAX_CACHED_PIECES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids

    def prepare_library(self) -> None:
        """Builds the library's encoder now, if there is one; `encode` does so itself after enough long pieces."""
        with self._lock:
            if not self._library_tried:
                self._library = self._build_library()
                self._library_tried = True

    def _encode_long(self, piece: str) -> list[int]:
        self._long_characters += len(piece)
        if self._long_characters > HAND_OVER_CHARACTERS and not self._library_tried:
            self.prepare_library()
        return self._encode_piece(piece) if self._library is None else self._library(piece)


def library_encoder(model: BPE) -> EncodePiece:
    """The library's encoder of one piece. It lets other threads run meanwhile."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer.encode_batch([piece], add_special_tokens=False)[0].ids
        return ids

    return encode
