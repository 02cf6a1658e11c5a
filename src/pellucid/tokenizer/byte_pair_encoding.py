"""Byte pair encoding (Sennrich et al., 2016): the merge loop, and an encoder that remembers words.

Text comes in words that come again, so an encoder merges each word once. Long stretches without a break (a megabyte of
one letter, base64, Chinese in a vocabulary that breaks at spaces only) are merged window by window: in one go, sorting
and copying them would hold up every other thread, and take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

PairRank = Callable[[str, str], float | None]
EncodePiece = Callable[[str], list[int]]

LONG_PIECE = 64  # characters; shorter ones are remembered
WINDOW = 2048  # symbols
MARGIN = 64  # characters
_MAX_CACHED_PIECES = 1 << 16


def merge_symbols(symbols: Sequence[str], pair_rank: PairRank) -> list[str]:
    """Merges adjacent symbols, lowest rank first and leftmost of equals, until no pair has a rank.

    Of more than `WINDOW` symbols it merges one window after the other. What comes of a whole is what comes of its parts
    wherever each symbol and the next stay apart when these two are merged alone: the first merge across the place where
    they meet would take place there too, since what led to it lies within the two. So a window begins after a symbol of
    the window before, and where these two do not stay apart, it begins earlier and is longer. It stays longer until a
    window begins further on than any before, so that the text comes to its end.

    Args:
        symbols: what the text starts as; of a string, its characters.
        pair_rank: rank of the merge of two adjacent symbols, or None if they do not merge.
    """
    merged: list[str] = []
    same: dict[str, str] = {}  # one object for each: to free a million at the end would hold up every other thread
    begin, window, furthest = 0, WINDOW, 0
    while True:
        end = begin + window
        found = _merge_at_once(symbols[begin:end], pair_rank)
        if merged and not _stay_apart(symbols, begin, merged[-1], found[0], pair_rank):
            begin, window = _back(symbols, begin, merged.pop()), 2 * window
            continue
        if end >= len(symbols):
            return merged + found
        at_the_end = 0  # characters that what follows may change
        while len(found) > 1 and at_the_end < MARGIN:
            at_the_end += len(found.pop())
        merged += [same.setdefault(symbol, symbol) for symbol in found]
        begin = _forth(symbols, begin, found)
        window = WINDOW if begin > furthest else 2 * window
        furthest = max(furthest, begin)


def _stay_apart(symbols: Sequence[str], place: int, left: str, right: str, pair_rank: PairRank) -> bool:
    """Whether merging gives `left` and `right` again, which meet at `place`, where nothing else is there."""
    alone = symbols[_back(symbols, place, left) : _forth(symbols, place, [right])]
    return _merge_at_once(alone, pair_rank) == [left, right]


def _back(symbols: Sequence[str], place: int, merged: str) -> int:
    """Where the symbols begin that `merged`, which ends at `place`, was made of."""
    characters = 0
    while characters < len(merged):
        place -= 1
        characters += len(symbols[place])
    return place


def _forth(symbols: Sequence[str], place: int, merged: list[str]) -> int:
    """Where the symbols end that `merged`, which begins at `place`, was made of."""
    characters = sum(map(len, merged))
    if isinstance(symbols, str):
        return place + characters
    while characters > 0:
        characters -= len(symbols[place])
        place += 1
    return place


def _merge_at_once(text: Sequence[str], pair_rank: PairRank) -> list[str]:
    symbols = list(text)
    count = len(symbols)
    if count < 2:
        return symbols
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
    """

    def __init__(self, split: Callable[[str], Iterable[str]], encode_piece: EncodePiece) -> None:
        self._split = split
        self._encode_piece = encode_piece
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which holds no added token."""
        ids: list[int] = []
        cache = self._cache
        for piece in self._split(text):
            found = cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
                if len(piece) <= LONG_PIECE:
                    if len(cache) >= _MAX_CACHED_PIECES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids
