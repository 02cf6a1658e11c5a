from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.tokenizer import byte_pair_encoding
from pellucid.tokenizer.byte_pair_encoding import BytePairEncoder, PairRank, merge_symbols


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

    def build(self) -> object:
        self.built += 1
        return lambda text: [-1] * len(text)


def encoder(library: Library) -> BytePairEncoder:
    return BytePairEncoder(str.split, lambda piece: [len(piece)], library.build)  # type: ignore[arg-type]


def test_hands_over_after_enough_text() -> None:
    library = Library()
    encode = encoder(library).encode
    assert encode("one three") == [3, 5]
    assert library.built == 0
    assert encode("a" * byte_pair_encoding.HAND_OVER_CHARACTERS) == [-1] * byte_pair_encoding.HAND_OVER_CHARACTERS
    assert encode("ab") == [-1, -1]
    assert library.built == 1


def test_goes_on_alone_where_the_library_cannot() -> None:
    alone = BytePairEncoder(str.split, lambda piece: [len(piece)], lambda: None)
    alone.prepare_bulk()
    assert alone.encode("one three one") == [3, 5, 3]


def test_forgets_pieces_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_MAX_CACHED_PIECES", 10)
    tested = encoder(Library())
    for number in range(100):
        tested.encode(str(number))
        assert len(tested._cache) <= 10
