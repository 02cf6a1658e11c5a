from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.tokenizer import byte_pair_encoding
from pellucid.tokenizer.byte_pair_encoding import BytePairEncoder, EncodePiece, PairRank, merge_symbols


def merged_by_definition(symbols: list[str], pair_rank: PairRank) -> list[str]:
    """The definition: again and again, the best pair of the whole text."""
    symbols = symbols.copy()
    while True:
        ranked = [(rank, i) for i, pair in enumerate(pairwise(symbols)) if (rank := pair_rank(*pair)) is not None]
        if not ranked:
            return symbols
        _, index = min(ranked)
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]


merge_tables = st.dictionaries(st.text("ab", min_size=2, max_size=5), st.integers(0, 6))


@given(st.text("abc", max_size=40), merge_tables)
def test_merges_as_defined(text: str, ranks: dict[str, int]) -> None:
    def pair_rank(left: str, right: str) -> int | None:
        return ranks.get(left + right)

    assert merge_symbols(list(text), pair_rank) == merged_by_definition(list(text), pair_rank)


def test_definition_catches_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "heappop", lambda queue: queue.pop())
    ranks = {"ab": 1, "bc": 0}

    def pair_rank(left: str, right: str) -> int | None:
        return ranks.get(left + right)

    texts = ["abc", "bcab", "aabc"]
    assert any(merge_symbols(list(t), pair_rank) != merged_by_definition(list(t), pair_rank) for t in texts)


def test_takes_time_in_proportion_to_its_text() -> None:
    calls = 0

    def pair_rank(left: str, right: str) -> int | None:
        nonlocal calls
        calls += 1
        return len(left) + len(right) if len(left) + len(right) <= 16 else None

    assert "".join(merge_symbols(["a"] * 50_000, pair_rank)) == "a" * 50_000
    assert calls < 4 * 50_000


class Library:
    """Stands for the library's encoder, and counts how often it is built."""

    def __init__(self) -> None:
        self.built = 0

    def build(self) -> EncodePiece:
        self.built += 1
        return lambda piece: [-len(piece)]


def encoder(library: Library) -> BytePairEncoder:
    return BytePairEncoder(str.split, lambda piece: [len(piece)], library.build)


def test_long_pieces_go_to_the_library_once_there_are_enough() -> None:
    library = Library()
    encode = encoder(library).encode
    long = "a" * (byte_pair_encoding.LONG_PIECE + 1)
    assert encode(f"one {long} three") == [3, len(long), 5]
    assert encode("one " * byte_pair_encoding.HAND_OVER_CHARACTERS)[-1] == 3
    assert library.built == 0
    very_long = "a" * byte_pair_encoding.HAND_OVER_CHARACTERS
    assert encode(f"one {very_long} {long} three") == [3, -len(very_long), -len(long), 5]
    assert encode(long) == [-len(long)]
    assert library.built == 1


def test_goes_on_alone_where_the_library_cannot() -> None:
    alone = BytePairEncoder(str.split, lambda piece: [len(piece)], lambda: None)
    alone.prepare_library()
    long = "a" * (byte_pair_encoding.HAND_OVER_CHARACTERS + 1)
    assert alone.encode(f"one {long} one") == [3, len(long), 3]


def test_each_word_is_merged_once() -> None:
    merged: list[str] = []

    def encode_piece(piece: str) -> list[int]:
        merged.append(piece)
        return [len(piece)]

    tested = BytePairEncoder(str.split, encode_piece, lambda: None)
    assert tested.encode("one two one") == tested.encode("one one two") == [3, 3, 3]
    assert merged == ["one", "two"]


def test_forgets_words_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_MAX_CACHED_PIECES", 10)
    tested = encoder(Library())
    for number in range(100):
        tested.encode(str(number))
        assert len(tested._cache) <= 10
