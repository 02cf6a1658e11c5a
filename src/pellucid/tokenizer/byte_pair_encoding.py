"""Byte pair encoding (Sennrich et al., 2016): the merge loop, and an encoder that stays quick from the first word on.

Building the merge table of the `tokenizers` library takes longer than a whole first answer may (0.1 s for 49,000
tokens, over 1 s for 262,000), while a prompt needs few of its entries. So an encoder starts with the loop below, on
plain dictionaries, and hands over to the library once it has seen enough text for the table to pay. Both give the same
ids; a test compares them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

PairRank = Callable[[str, str], float | None]

HAND_OVER_CHARACTERS = 1 << 17
_MAX_CACHED_PIECE = 64
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
        encode_piece: ids of one piece.
        build_bulk: builds the library's encoder of whole texts; None where it cannot give the same ids.
    """

    def __init__(
        self,
        split: Callable[[str], Iterable[str]],
        encode_piece: Callable[[str], list[int]],
        build_bulk: Callable[[], Callable[[str], list[int]] | None],
    ) -> None:
        self._split = split
        self._encode_piece = encode_piece
        self._build_bulk = build_bulk
        self._bulk: Callable[[str], list[int]] | None = None
        self._bulk_tried = False
        self._lock = threading.Lock()
        self._characters = 0
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which holds no added token."""
        if not self._bulk_tried:
            self._characters += len(text)
            if self._characters > HAND_OVER_CHARACTERS:
                self.prepare_bulk()
        if self._bulk is not None:
            return self._bulk(text)
        ids: list[int] = []
        cache = self._cache
        for piece in self._split(text):
            found = cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
                if len(piece) <= _MAX_CACHED_PIECE:
                    if len(cache) >= _MAX_CACHED_PIECES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids

    def prepare_bulk(self) -> None:
        """Builds the library's encoder now, if there is one; `encode` does so itself after enough text."""
        with self._lock:
            if not self._bulk_tried:
                self._bulk = self._build_bulk()
                self._bulk_tried = True
                self._cache.clear()
