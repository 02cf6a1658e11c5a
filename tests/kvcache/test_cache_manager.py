from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import pytest

from pellucid.core.sequence import Sequence
from pellucid.kvcache import prefix_cache
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from tests.support.mutants import mutant
from tests.support.sequences import make_sequence

WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 70, 70), (100,), (None, None, 130, 2), (64, 65), (None, 1)]


def prefixes(token_ids: list[int]) -> list[int]:
    """A number for each position that stands for all tokens up to it."""
    return list(accumulate(token_ids, lambda prefix, token: hash((prefix, token)), initial=0))[1:]


class Memory:
    """What is written in every KV slot: the prefix that the slot's keys and values depend on."""

    def __init__(self, cache: CacheManager) -> None:
        self.cache = cache
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # KV group, prefix

    def compute(self, sequence: Sequence, num_tokens: int) -> bool:
        if not self.cache.allocate(sequence, num_tokens):
            return False
        self.copy()
        begin = sequence.num_computed_tokens
        expected = prefixes(sequence.token_ids)
        self.check(sequence)
        for group, table in enumerate(sequence.block_tables):
            for position in range(begin, begin + num_tokens):
                self.slots[table[position // 64], position % 64] = group, expected[position]
        sequence.num_computed_tokens += num_tokens
        self.cache.commit(sequence)
        return True

    def copy(self) -> None:
        for source, destination in self.cache.take_copies():
            for offset in range(64):
                if (source, offset) in self.slots:
                    self.slots[destination, offset] = self.slots[source, offset]

    def restore(self, sequence: Sequence) -> bool:
        """Fill the full blocks of `sequence` as if their content had been kept elsewhere."""
        self.copy()  # as between two steps, when none are due
        num_blocks = sequence.num_tokens // 64
        places = self.cache.reserve(sequence, num_blocks)
        if places is None:
            return False
        expected = prefixes(sequence.token_ids)
        tables = zip(sequence.block_tables, sequence.first_blocks, strict=True)
        indices = [(group, index) for group, (_, first) in enumerate(tables) for index in range(first, num_blocks)]
        for place, (group, index) in zip(places, indices, strict=True):
            for offset in range(64 if place >= 0 else 0):
                self.slots[place, offset] = group, expected[64 * index + offset]
        sequence.num_computed_tokens = 64 * num_blocks
        self.cache.commit(sequence)
        return True

    def check(self, sequence: Sequence) -> None:
        """That the next token finds all it sees."""
        computed = sequence.num_computed_tokens
        expected = prefixes(sequence.token_ids[:computed])
        for group, (table, window) in enumerate(zip(sequence.block_tables, self.cache.windows, strict=False)):
            for position in range(0 if window is None else max(0, computed - window + 1), computed):
                found = self.slots[table[position // 64], position % 64]
                assert found == (group, expected[position]), f"{sequence} reads another's keys at {position}"


def begin(cache: CacheManager, token_ids: list[int], salt: bytes = b"") -> Sequence:
    sequence = make_sequence(token_ids, salt=salt)
    cache.adopt(sequence, cache.match(sequence))
    return sequence


def exercise(seed: int, num_operations: int = 100) -> int:
    """Random operations over sequences that begin alike; returns how many tokens were found in the cache."""
    rng = random.Random(seed)
    windows = WINDOWS[seed % len(WINDOWS)]
    num_blocks = len(windows) * rng.choice([6, 12, 30])
    cache = CacheManager(num_blocks, windows=windows, enable_prefix_caching=rng.random() < 0.9)
    memory = Memory(cache)
    live: list[Sequence] = []
    hits = 0
    for _ in range(num_operations):
        operation = rng.choice(["begin", "restore", "compute", "compute", "compute", "append", "fork", "trim", "free"])
        sequence = rng.choice(live) if live else None
        if operation in ("begin", "restore") and len(live) < 6:
            token_ids = [1] * rng.choice([0, 64, 100, 128, 300]) + [
                rng.randrange(3) for _ in range(rng.randrange(1, 90))
            ]
            salt = rng.choice([b"", b"", b"salt"])
            if operation == "begin":
                sequence = begin(cache, token_ids, salt=salt)
                if rng.random() < 0.8:
                    cache.adopt_partial(sequence)
                hits += sequence.num_computed_tokens
                live.append(sequence)
            elif memory.restore(sequence := make_sequence(token_ids, salt=salt)):
                live.append(sequence)
        elif sequence is None:
            continue
        elif operation == "compute" and sequence.num_tokens > sequence.num_computed_tokens:
            memory.compute(sequence, rng.randint(1, sequence.num_tokens - sequence.num_computed_tokens))
        elif operation == "append":
            sequence.token_ids += [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        elif operation == "fork" and len(live) < 6:
            child = make_sequence(sequence.token_ids, salt=sequence.group.cache_salt)
            cache.fork(sequence, child)
            live.append(child)
        elif operation == "trim":
            keep = rng.randint(0, sequence.num_computed_tokens)
            if not cache.can_trim(sequence, keep):
                with pytest.raises(CacheIntegrityError, match="given back"):
                    cache.trim(sequence, keep)
                keep = 0
            cache.trim(sequence, keep)
            if rng.random() < 0.5:  # what a verifier refused is not only forgotten but replaced
                del sequence.token_ids[max(1, keep) :]
        elif operation == "free":
            cache.free(sequence, keep_partial=rng.random() < 0.8)
            live.remove(sequence)
        cache.check_integrity(live)
        due = {destination for _, destination in cache.copies}  # made before the next forward
        for sequence in live:
            if due.isdisjoint(block for table in sequence.block_tables for block in table):
                memory.check(sequence)
    for sequence in live:
        cache.free(sequence)
    cache.check_integrity([])
    assert cache.pool.num_used == 0
    return hits


@pytest.mark.parametrize("seed", range(100))
def test_no_sequence_ever_reads_anothers_keys(seed: int) -> None:
    exercise(seed)


def test_the_operations_reach_the_cache() -> None:
    assert sum(exercise(seed) for seed in range(20)) > 2000


def exercise_all() -> None:
    for seed in range(150):
        exercise(seed)


@pytest.mark.parametrize("broken", ["digest", "copy", "forget", "salt", "reserve a shared block", "fill too little"])
def test_mutants_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "digest":  # a hash of the block alone, with nothing compared
        monkeypatch.setattr("pellucid.kvcache.cache_manager.chain_digest", lambda parent, tokens: tokens)
        monkeypatch.setattr(
            prefix_cache.PrefixCache, "find", lambda self, group, key: self._block_of.get((group, key.digest))
        )
    elif broken == "copy":
        monkeypatch.setattr(CacheManager, "take_copies", lambda self: [])
    elif broken == "forget":
        monkeypatch.setattr(CacheManager, "_release", lambda self, block: self.pool.release(block, keep=True))
    elif broken == "reserve a shared block":
        monkeypatch.setattr(CacheManager, "reserve", mutant(CacheManager.reserve, "self._share(tables)", "pass"))
    elif broken == "fill too little":
        changed = mutant(CacheManager.reserve, "-1 if table[index] >= 0 else self._take()", "self._take() * 0 - 1")
        monkeypatch.setattr(CacheManager, "reserve", changed)
    else:
        monkeypatch.setattr(prefix_cache.PrefixCache, "forget", lambda self, block: None)
    with pytest.raises((AssertionError, CacheIntegrityError, KeyError)):
        exercise_all()


def test_match_takes_whole_blocks_and_leaves_the_last_token() -> None:
    cache = CacheManager(10)
    memory = Memory(cache)
    first = begin(cache, [5] * 200)
    memory.compute(first, 200)
    for length, expected in ((200, 3), (193, 3), (192, 2), (128, 1), (65, 1), (64, 0), (1, 0)):
        assert cache.match(make_sequence([5] * length)) == [first.block_tables[0][:expected]]
    assert cache.match(make_sequence([5] * 100 + [6] * 100)) == [first.block_tables[0][:1]]
    assert cache.match(make_sequence([6] + [5] * 199)) == [[]]
    assert cache.match(make_sequence([5] * 200, salt=b"other")) == [[]]


def test_what_is_freed_is_found_until_its_room_is_needed() -> None:
    cache = CacheManager(4)
    memory = Memory(cache)
    first = begin(cache, [5] * 200)
    memory.compute(first, 200)
    cache.free(first)
    assert (cache.pool.num_free, cache.pool.num_cached, cache.pool.num_used) == (1, 3, 0)
    other = begin(cache, [6] * 100)
    memory.compute(other, 100)
    again = make_sequence([5] * 200)
    assert len(cache.match(again)[0]) == 2  # the end of the prefix went first
    cache.check_integrity([other])


def test_allocate_is_all_or_nothing() -> None:
    cache = CacheManager(3)
    sequence = begin(cache, [5] * 300)
    assert not cache.allocate(sequence, 200)
    assert sequence.num_blocks == 0
    assert cache.allocate(sequence, 192)
    assert not cache.allocate(sequence, 193)
    assert sequence.num_blocks == 3


@pytest.mark.parametrize("windows", [(None,), (None, 70, 2)])
def test_reserve_takes_only_what_is_missing_all_or_nothing(windows: tuple[int | None, ...]) -> None:
    cache = CacheManager(8 * len(windows), windows=windows)
    memory = Memory(cache)
    held, freed = begin(cache, [5] * 70), begin(cache, [5] * 140)
    memory.compute(held, 70)
    memory.compute(freed, 140)
    cache.free(freed)
    before = cache.num_available
    other = make_sequence([5] * 320)
    places = cache.reserve(other, 5)
    assert places is not None
    assert places[:5] == [-1, -1, *(block for block in other.block_tables[0][2:])]
    assert [table.count(-1) for table in other.block_tables] == [0, 3, 4][: len(windows)]
    assert cache.num_available == before - 4 - 3 * (len(windows) > 1)  # the cached one among them
    other.num_computed_tokens = 320
    cache.check_integrity([held, other])
    cache.free(other)  # filled with nothing, and not committed
    assert cache.num_available == before
    assert [len(table) for table in cache.match(other)] == [2] * len(windows)
    rest = make_sequence([6] * 64 * 9)
    assert cache.allocate(rest, 64 * (before - 3) // len(windows))
    stamp = other.table_stamp
    assert cache.reserve(other, 5) is None
    assert (other.num_blocks, other.table_stamp) == (0, stamp)
    cache.check_integrity([held, rest])


def test_equal_blocks_computed_twice_are_kept_once() -> None:
    cache = CacheManager(8)
    memory = Memory(cache)
    left, right = begin(cache, [5] * 100), begin(cache, [5] * 100)
    memory.compute(left, 100)
    memory.compute(right, 100)
    assert left.block_tables[0][0] == right.block_tables[0][0]
    assert left.block_tables[0][1] != right.block_tables[0][1]
    cache.check_integrity([left, right])
    assert cache.pool.num_used == 3


def test_fork_copies_only_the_last_block_and_only_when_written() -> None:
    cache = CacheManager(8)
    memory = Memory(cache)
    parent = begin(cache, [5] * 100)
    memory.compute(parent, 100)
    child = make_sequence(parent.token_ids)
    cache.fork(parent, child)
    assert cache.pool.num_used == 2
    child.token_ids.append(6)
    parent.token_ids.append(7)
    assert cache.allocate(child, 1)
    assert cache.copies == [(parent.block_tables[0][1], child.block_tables[0][1])]
    assert cache.allocate(parent, 1)
    assert len(cache.take_copies()) == 1
    assert cache.take_copies() == []
    assert child.block_tables[0][0] == parent.block_tables[0][0]


def test_mutant_fork_that_leaves_its_parent_writing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheManager, "fork", mutant(CacheManager.fork, "parent.num_writable_tokens = 0", "pass"))
    cache = CacheManager(8)
    parent = begin(cache, [5] * 100)
    Memory(cache).compute(parent, 100)
    child = make_sequence(parent.token_ids)
    cache.fork(parent, child)
    with pytest.raises(CacheIntegrityError, match="which others read"):
        cache.check_integrity([parent, child])


def test_reset_prefix_cache() -> None:
    cache = CacheManager(8)
    memory = Memory(cache)
    first, second = begin(cache, [5] * 100), begin(cache, [6] * 100)
    memory.compute(first, 100)
    memory.compute(second, 100)
    cache.free(first)
    cache.reset_prefix_cache()
    cache.check_integrity([second])
    assert cache.match(make_sequence([5] * 100)) == [[]]
    assert cache.match(make_sequence([6] * 100)) == [second.block_tables[0][:1]]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda cache, sequence: cache.adopt(sequence, [[]]),
        lambda cache, sequence: cache.reserve(sequence, 1),
        lambda cache, sequence: cache.fork(make_sequence([1]), sequence),
        lambda cache, sequence: cache.trim(sequence, 101),
        lambda cache, sequence: cache.trim(sequence, -1),
    ],
)
def test_misuse_is_an_error(misuse: Callable[[CacheManager, Sequence], object]) -> None:
    cache = CacheManager(8)
    sequence = begin(cache, [5] * 100)
    Memory(cache).compute(sequence, 100)
    with pytest.raises(CacheIntegrityError):
        misuse(cache, sequence)
    cache.check_integrity([sequence])


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache, sequence: sequence.block_tables[0].pop(),
        lambda cache, sequence: sequence.block_tables[0].append(sequence.block_tables[0][0]),
        lambda cache, sequence: sequence.block_tables[0].__setitem__(0, 7),
        lambda cache, sequence: setattr(sequence, "num_computed_tokens", 500),
        lambda cache, sequence: setattr(sequence, "num_writable_tokens", 500),
        lambda cache, sequence: (
            cache._prefix_cache.forget(sequence.block_tables[0][0])
            or cache.pool.release(sequence.block_tables[0].pop(0), keep=True)
        ),
    ],
)
def test_damage_is_found(damage: Callable[[CacheManager, Sequence], object]) -> None:
    cache = CacheManager(8)
    sequence = begin(cache, [5] * 100)
    Memory(cache).compute(sequence, 100)
    cache.check_integrity([sequence])
    damage(cache, sequence)
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity([sequence])
