from __future__ import annotations

from collections.abc import Sequence
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


symbols = st.text("abc", max_size=60) | st.lists(st.sampled_from(["a", "b", "c", "aa", "<0x0A>"]), max_size=60)
windows = st.tuples(st.integers(2, 12), st.integers(0, 6))


def check_windows(text: Sequence[str], ranks: dict[str, int], sizes: tuple[int, int]) -> None:
    def pair_rank(left: str, right: str) -> int | None:
        return ranks.get(left + right)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(byte_pair_encoding, "WINDOW", sizes[0])
        patched.setattr(byte_pair_encoding, "MARGIN", sizes[1])
        assert merge_symbols(text, pair_rank) == merged_by_definition(list(text), pair_rank)


@given(symbols, merge_tables, windows)
def test_windows_change_nothing(text: Sequence[str], ranks: dict[str, int], sizes: tuple[int, int]) -> None:
    check_windows(text, ranks, sizes)


# What the first a becomes is decided at the other end.
FROM_THE_RIGHT = {"ab": 0, **{"a" * number + "ab": number for number in range(1, 30)}}


def test_a_window_begins_earlier_where_its_beginning_merges_with_what_is_before() -> None:
    check_windows("a" * 29 + "b", FROM_THE_RIGHT, (8, 2))
    assert merge_symbols("a" * 29 + "b", lambda left, right: FROM_THE_RIGHT.get(left + right)) == ["a" * 29 + "b"]


def test_a_window_that_began_anew_in_vain_stays_longer() -> None:
    """Whole powers of two merge first, then such as a few windows hold: windows that forget that they were too short
    would begin at the same places for ever."""
    ranks = {"a" * 2**power: power for power in range(1, 5)}
    ranks |= {"a" * (16 * number): 10 + number for number in range(2, 49)}
    for length in (500, 896, 897, 1500):
        for sizes in ((256, 8), (64, 4), (33, 2), (16, 4)):
            check_windows("a" * length, ranks, sizes)


def test_a_mutant_that_does_not_look_where_windows_meet_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_stay_apart", lambda *_: True)
    with pytest.raises(AssertionError):
        check_windows("a" * 29 + "b", FROM_THE_RIGHT, (8, 2))


def test_no_merge_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    merge = byte_pair_encoding._merge_at_once

    def noting(text: Sequence[str], pair_rank: PairRank) -> list[str]:
        lengths.append(len(text))
        return merge(text, pair_rank)

    def pair_rank(left: str, right: str) -> int | None:
        return len(left) + len(right) if len(left) + len(right) <= 16 else None

    monkeypatch.setattr(byte_pair_encoding, "_merge_at_once", noting)
    for text in ("a" * 50_000, "ab" * 25_000, "abcdefg" * 7000):
        lengths.clear()
        assert "".join(merge_symbols(text, pair_rank)) == text
        assert max(lengths) <= byte_pair_encoding.WINDOW
        assert sum(lengths) < 1.1 * len(text)


def test_of_equal_symbols_there_is_one() -> None:
    """So that to free a million of them takes no time."""
    found = merge_symbols("ab" * 10_000, lambda left, right: 0 if left + right == "ab" else None)
    assert found == ["ab"] * 10_000
    assert len({id(symbol) for symbol in found}) < byte_pair_encoding.WINDOW


def test_each_word_is_merged_once() -> None:
    merged: list[str] = []

    def encode_piece(piece: str) -> list[int]:
        merged.append(piece)
        return [len(piece)]

    tested = BytePairEncoder(str.split, encode_piece)
    assert tested.encode("one two one") == tested.encode("one one two") == [3, 3, 3]
    assert merged == ["one", "two"]


def test_forgets_words_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_MAX_CACHED_PIECES", 10)
    tested = BytePairEncoder(str.split, lambda piece: [len(piece)])
    for number in range(100):
        tested.encode(str(number))
        assert len(tested._cache) <= 10


def test_does_not_remember_long_pieces() -> None:
    tested = BytePairEncoder(str.split, lambda piece: [len(piece)])
    long = "a" * (byte_pair_encoding.LONG_PIECE + 1)
    assert tested.encode(f"one {long}") == [3, len(long)]
    assert list(tested._cache) == ["one"]
