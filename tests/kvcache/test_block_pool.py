from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pellucid.kvcache.block_pool import BlockPool, CacheIntegrityError


def exercise(pool: BlockPool, num_operations: int, check_every: int) -> None:
    """Random legal operations, against a model of them kept in plain lists."""
    rng = random.Random(0)
    held: list[int] = []
    cached: list[int] = []
    for number in range(num_operations):
        operation = rng.randrange(4)
        if operation == 0 and pool.num_free:
            block = pool.allocate()
            assert block not in cached
            held.append(block)
        elif operation == 1 and held:
            position = rng.randrange(len(held))
            held[position], held[-1] = held[-1], held[position]
            block = held.pop()
            keep = rng.random() < 0.5
            last = pool.ref_count(block) == 1
            pool.release(block, keep=keep)
            if last and keep:
                cached.append(block)
        elif operation == 2 and cached and not pool.num_free:
            assert pool.evict() == cached.pop(0)
        elif operation == 3 and (held or cached):
            block = rng.choice(held if rng.random() < 0.5 and held else cached or held)
            pool.share(block)
            held.append(block)
            if block in cached:
                cached.remove(block)
        assert pool.num_cached == len(cached)
        if number % check_every == 0:
            pool.check_integrity()
            assert pool.num_used == len(set(held))
            assert all(pool.ref_count(block) == held.count(block) for block in set(held))
    for block in held:
        pool.release(block, keep=False)
    pool.check_integrity()
    assert pool.num_used == 0


def test_random_operations() -> None:
    exercise(BlockPool(50), 100_000, check_every=100)


@pytest.mark.slow
def test_a_million_random_operations() -> None:
    exercise(BlockPool(500), 1_000_000, check_every=50_000)


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
