"""Blocks that a window has left behind: given back in time, not too early, and found again."""

from __future__ import annotations

import random

import pytest

from pellucid.core.kv_windows import first_visible_block, max_blocks_of_sequence
from pellucid.core.sequence import Sequence
from pellucid.kvcache import cache_manager
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from tests.kvcache.test_cache_manager import Memory, begin, exercise_all
from tests.support.sequences import make_sequence

GEMMA = (None, 512, 512, 512, 512, 512)
"""The windows of the KV groups of Gemma 3 270m."""


def compute(cache: CacheManager, sequence: Sequence, num_tokens: int, chunk: int = 512) -> None:
    """Compute up to `num_tokens` in all, without a memory of what was written."""
    while sequence.num_computed_tokens < num_tokens:
        count = min(chunk, num_tokens - sequence.num_computed_tokens)
        assert cache.allocate(sequence, count)
        sequence.num_computed_tokens += count
        cache.commit(sequence)
        cache.check_integrity([sequence])


def check_used_blocks() -> None:
    """4096 tokens of Gemma 3 270m: 64 blocks of the full-attention group, and 9 of each other while decoding."""
    cache = CacheManager(400, windows=GEMMA)
    sequence = make_sequence(range(4096))
    compute(cache, sequence, 4095)
    assert cache.allocate(sequence, 1)
    assert cache.pool.num_used == sequence.num_blocks == 64 + 5 * 8
    for position in range(4033, 4096):
        assert 8 <= 64 - first_visible_block(position, 512) <= 9
    cache.free(sequence)
    assert cache.pool.num_used == 0


def test_a_long_sequence_holds_what_its_windows_show() -> None:
    check_used_blocks()


def test_mutant_that_never_gives_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheManager, "_release_behind_windows", lambda self, sequence: None)
    with pytest.raises(AssertionError, match="384"):
        check_used_blocks()


def test_mutant_that_gives_back_a_block_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(position: int, window: int | None) -> int:
        return min(position // 64, first_visible_block(position, window) + (window is not None))

    monkeypatch.setattr(cache_manager, "first_visible_block", too_early)
    with pytest.raises((AssertionError, CacheIntegrityError, KeyError)):
        exercise_all()


@pytest.mark.parametrize("windows", [(None, 70), (100, 100), (None, 64, 1), GEMMA])
def test_no_sequence_holds_more_than_the_bound(windows: tuple[int | None, ...]) -> None:
    """So a pool of that many blocks is enough for a sequence alone, whatever its chunks."""
    rng = random.Random(3)
    for _ in range(10):
        num_tokens, chunk = rng.randint(1, 1500), rng.choice([1, 40, 64, 300, 512])
        cache = CacheManager(max_blocks_of_sequence(windows, num_tokens, chunk), windows=windows)
        sequence = make_sequence(range(num_tokens))
        while sequence.num_computed_tokens < num_tokens:
            compute(cache, sequence, min(num_tokens, sequence.num_computed_tokens + rng.randint(1, chunk)), chunk)
        cache.free(sequence)


@pytest.mark.parametrize("seed", range(40))
def test_a_sequence_takes_no_more_than_was_counted(seed: int) -> None:
    """With blocks shared or not; until its tokens are computed, and a block's worth of new ones."""
    rng = random.Random(seed)
    windows = rng.choice([(None,), (None, 70), (100,), (None, 64, 1), GEMMA])
    cache = CacheManager(1000, windows=windows)
    other = begin(cache, [5] * rng.randint(1, 900))
    compute(cache, other, other.num_tokens)
    if rng.random() < 0.3:
        cache.free(other, keep_partial=True)
    budget = rng.choice([30, 64, 200, 512])
    sequence = make_sequence([5] * rng.randrange(1, 800) + [6] * rng.randrange(1, 800))
    tables = cache.match(sequence)
    counted, available = cache.num_blocks_to_admit(sequence, tables, budget), cache.num_available
    cache.adopt(sequence, tables)
    cache.adopt_partial(sequence)
    sequence.token_ids += [7] * 64
    least = cache.num_available
    recount = rng.randrange(sequence.num_tokens)
    while sequence.num_computed_tokens < sequence.num_tokens:
        count = min(rng.randint(1, budget), sequence.num_tokens - sequence.num_computed_tokens)
        assert cache.allocate(sequence, count)
        least = min(least, cache.num_available)
        sequence.num_computed_tokens += count
        cache.commit(sequence)
        if sequence.num_computed_tokens >= recount and sequence.num_computed_tokens < sequence.num_tokens - 64:
            assert available - least <= counted
            del sequence.token_ids[-64:]
            counted, available = cache.num_blocks_to_come(sequence, budget), cache.num_available
            sequence.token_ids += [7] * 64
            least = available
            recount = 10**9
    assert available - least <= counted


def test_a_prefix_needs_only_what_its_windows_show() -> None:
    """A prompt of 1000 tokens is found though most of the blocks of its sliding layers were given to others."""
    cache = CacheManager(60, windows=(None, 128))
    memory = Memory(cache)
    first = begin(cache, [5] * 1000)
    for _ in range(10):
        memory.compute(first, 100)
    cache.free(first)
    other = begin(cache, [6] * 1400)
    for _ in range(13):  # evicts what was given back first: the blocks behind the window
        memory.compute(other, 100)
    again = begin(cache, [5] * 1000)
    assert again.num_computed_tokens == 15 * 64
    assert again.block_tables[1].count(-1) == again.first_blocks[1] == 13
    memory.check(again)
    cache.check_integrity([other, again])


def test_what_a_window_left_behind_is_found_by_a_shorter_prompt() -> None:
    cache = CacheManager(60, windows=(None, 128))
    memory = Memory(cache)
    first = begin(cache, [5] * 1000)
    for _ in range(10):
        memory.compute(first, 100)
    short = begin(cache, [5] * 300)
    assert short.num_computed_tokens == 4 * 64
    memory.check(short)
    cache.check_integrity([first, short])


def test_refused_draft_tokens_go_back_whatever_their_number() -> None:
    """A trim to where the last `allocate` began is always possible, further back only while the blocks are there."""
    rng = random.Random(5)
    cache = CacheManager(200, windows=(None, 65, 2))
    memory = Memory(cache)
    sequence = begin(cache, [5] * 2000)
    while sequence.num_computed_tokens < 1500:
        computed, drafted = sequence.num_computed_tokens, rng.randint(1, 200)
        assert memory.compute(sequence, drafted)
        cache.trim(sequence, computed + rng.randint(0, drafted))
        cache.check_integrity([sequence])
        memory.check(sequence)
    assert not cache.can_trim(sequence, 100)
    tables = [list(table) for table in sequence.block_tables]
    with pytest.raises(CacheIntegrityError, match="given back blocks that token 100 must see"):
        cache.trim(sequence, 100)
    assert sequence.block_tables == tables
    cache.trim(sequence, 0)
    assert cache.pool.num_used == 0
    assert memory.compute(sequence, 100)


def test_a_fork_keeps_what_its_parent_gives_back() -> None:
    cache = CacheManager(60, windows=(None, 70))
    memory = Memory(cache)
    parent = begin(cache, [5] * 300)
    memory.compute(parent, 200)
    child = make_sequence(parent.token_ids)
    cache.fork(parent, child)
    memory.compute(parent, 100)
    assert parent.first_blocks == [0, 2]
    assert child.first_blocks == [0, 0]
    memory.check(child)
    cache.check_integrity([parent, child])
    assert cache.allocate(child, 1)
    assert child.first_blocks == [0, 2]


@pytest.mark.parametrize("damage", ["early", "gap", "group", "registered", "length"])
def test_damage_is_found(damage: str) -> None:
    cache = CacheManager(60, windows=(None, 70))
    sequence = begin(cache, [5] * 400)
    memory = Memory(cache)
    memory.compute(sequence, 200)
    memory.compute(sequence, 200)
    cache.check_integrity([sequence])
    full, sliding = sequence.block_tables
    if damage == "early":
        cache.pool.release(sliding[5], keep=True)
        sliding[2:6] = [-1] * 4
        sequence.first_blocks[1] = 6
    elif damage == "gap":
        cache.pool.release(sliding[3], keep=True)
        sliding[3] = -1
    elif damage == "group":
        full[3], sliding[3] = sliding[3], full[3]
        other = make_sequence(sequence.token_ids)
        cache.fork(sequence, other)
        full[3], sliding[3] = sliding[3], full[3]
        with pytest.raises(CacheIntegrityError, match="in tables of groups"):
            cache.check_integrity([sequence, other])
    elif damage == "registered":
        full[3], sliding[3] = sliding[3], full[3]
    else:
        full.append(cache.pool.allocate())
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity([sequence])
