from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pellucid.kvcache.block_pool import BlockPool, CacheIntegrityError


def exercise(pool: BlockPool, num_operations: int, *, check_every: int) -> None:
    """Random operations, legal ones and misuse, against a model that every one of them is compared with."""
    rng = random.Random(0)
    ref_counts = [0] * pool.num_blocks
    held: list[int] = []  # one entry a reference
    cached: dict[int, None] = {}  # least recently used first
    num_used = 0
    for number in range(num_operations):
        operation = rng.randrange(6)
        block = rng.randrange(pool.num_blocks)
        if operation < 2 and held:  # release; references die as fast as they are made
            position = rng.randrange(len(held))
            held[position], held[-1] = held[-1], held[position]
            block = held.pop()
            keep = rng.random() < 0.7
            pool.release(block, keep=keep)
            ref_counts[block] -= 1
            if ref_counts[block] == 0:
                num_used -= 1
                if keep:
                    cached[block] = None
        elif operation == 2 and num_used + len(cached) < pool.num_blocks:
            block = pool.allocate()
            assert ref_counts[block] == 0
            assert block not in cached
            ref_counts[block] = 1
            num_used += 1
            held.append(block)
        elif operation == 3 and cached:
            block = pool.evict()
            assert block == next(iter(cached))
            del cached[block]
        elif operation == 4 and (ref_counts[block] or block in cached):
            pool.share(block)
            num_used += ref_counts[block] == 0
            cached.pop(block, None)
            ref_counts[block] += 1
            held.append(block)
        elif operation == 5 and ref_counts[block] == 0:
            with pytest.raises(CacheIntegrityError):
                pool.release(block, keep=True)
        assert pool.ref_count(block) == ref_counts[block]
        assert pool.is_cached(block) == (block in cached)
        assert (pool.num_used, pool.num_cached) == (num_used, len(cached))
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
        if number % check_every == 0:
            pool.check_integrity()
    for block in held:
        pool.release(block, keep=False)
    pool.check_integrity()
    assert pool.num_used == 0


def test_random_operations() -> None:
    exercise(BlockPool(8), 20_000, check_every=1)


def test_a_million_random_operations() -> None:
    exercise(BlockPool(500), 1_000_000, check_every=5_000)


class DoubleRelease(BlockPool):
    def release(self, block: int, *, keep: bool) -> None:
        if self._ref_counts[block]:
            super().release(block, keep=keep)
        else:
            self._free.append(block)


class LostBlock(BlockPool):
    def release(self, block: int, *, keep: bool) -> None:
        super().release(block, keep=keep)
        if self._free and self._free[-1] == block and block % 7 == 3:
            self._free.pop()


class EvictsTheMostRecent(BlockPool):
    def evict(self) -> int:
        block, _ = self._cached.popitem()
        self._free.append(block)
        return block


class SharesWithoutReviving(BlockPool):
    def share(self, block: int) -> None:
        self._ref_counts[block] += 1


class CountsOnce(BlockPool):
    def share(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            super().share(block)


@pytest.mark.parametrize("mutant", [DoubleRelease, LostBlock, EvictsTheMostRecent, SharesWithoutReviving, CountsOnce])
@pytest.mark.parametrize("check_every", [1, 10**9])
def test_mutant_pools_are_caught(mutant: type[BlockPool], check_every: int) -> None:
    """By the model alone too: the full check is not what finds them."""
    with pytest.raises((AssertionError, CacheIntegrityError, pytest.fail.Exception)):
        exercise(mutant(20), 20_000, check_every=check_every)


def test_least_recently_used_goes_first() -> None:
    pool = BlockPool(3)
    for _ in range(3):
        pool.allocate()
    for block in (2, 0, 1):
        pool.release(block, keep=True)
    pool.share(2)
    pool.release(2, keep=True)
    assert [pool.evict() for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.release(1, keep=False),
        lambda pool: pool.share(1),
        lambda pool: pool.evict(),
        lambda pool: (pool.allocate(), pool.allocate()),
        lambda pool: pool.release(-1, keep=False),
        lambda pool: pool.share(2),
        lambda pool: BlockPool(0),
    ],
)
def test_misuse_is_an_error_and_changes_nothing(misuse: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(2)
    pool.allocate()
    with pytest.raises(CacheIntegrityError):
        misuse(pool)
    pool.check_integrity()


@pytest.mark.parametrize(
    "mutate",
    [
        lambda pool: pool._free.append(0),
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._ref_counts.__setitem__(0, 0),
        lambda pool: pool._ref_counts.__setitem__(0, -1),
        lambda pool: pool._ref_counts.__setitem__(pool._free[0], 1),
        lambda pool: pool._cached.__setitem__(0, None),
        lambda pool: pool._cached.clear(),
    ],
)
def test_mutants_are_caught(mutate: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(4)
    pool.allocate()
    pool.release(pool.allocate(), keep=True)
    pool.check_integrity()
    mutate(pool)
    with pytest.raises(CacheIntegrityError):
        pool.check_integrity()
