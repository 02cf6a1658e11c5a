from __future__ import annotations

import random

import pytest

from pellucid.core.kv_windows import first_visible_block
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.prefix_cache import BlockKey, PrefixCache, chain_digest, encode_tokens, root_digest

ROOT = root_digest(b"")


def block_of(token: int) -> bytes:
    return encode_tokens([token] * 64)


def test_digest_stands_for_the_whole_prefix() -> None:
    first = chain_digest(ROOT, block_of(1))
    other = chain_digest(ROOT, block_of(2))
    assert chain_digest(first, block_of(3)) != chain_digest(other, block_of(3))
    assert chain_digest(root_digest(b"alice"), block_of(1)) != first
    assert len(first) == 32


def test_find_register_forget() -> None:
    cache = PrefixCache()
    digest = chain_digest(ROOT, block_of(1))
    key = BlockKey(digest, ROOT, block_of(1))
    assert cache.find(0, key) is None
    assert cache.register(7, 0, key)
    assert cache.find(0, key) == 7
    assert cache.group_of(7) == 0
    assert not cache.register(8, 0, key)
    assert cache.find(1, key) is None
    assert cache.register(8, 1, key)
    assert (cache.find(0, key), cache.find(1, key)) == (7, 8)
    with pytest.raises(CacheIntegrityError):
        cache.register(7, 0, BlockKey(chain_digest(digest, block_of(2)), digest, block_of(2)))
    cache.forget(7)
    assert cache.find(0, key) is None
    assert cache.group_of(7) is None
    with pytest.raises(CacheIntegrityError):
        cache.forget(7)


def test_a_collision_is_no_hit() -> None:
    """Tokens and parent are compared, so a broken hash costs hits, never a wrong answer."""
    cache = PrefixCache()
    same = b"\0" * 32
    cache.register(7, 0, BlockKey(same, ROOT, block_of(1)))
    assert cache.find(0, BlockKey(same, ROOT, block_of(2))) is None
    assert cache.find(0, BlockKey(same, same, block_of(1))) is None


def longest(windows: tuple[int | None, ...], present: list[set[int]], num_blocks: int) -> int:
    """The longest prefix by the definition: the oracle of `match`."""
    for length in range(num_blocks, 0, -1):
        needed = [range(first_visible_block(64 * length, window), length) for window in windows]
        if all(set(wanted) <= blocks for wanted, blocks in zip(needed, present, strict=True)):
            return length
    return 0


@pytest.mark.parametrize("seed", range(300))
def test_match_is_the_longest_prefix_that_the_windows_need(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    windows = rng.choice([(None,), (None, 130), (None, 300, 300, 64), (200,), (1, 130), (None, None, 65, 500)])
    cache, num_blocks = PrefixCache(), rng.randrange(20)
    keys = []
    for index in range(num_blocks):
        parent = keys[-1].digest if keys else ROOT
        keys.append(BlockKey(chain_digest(parent, block_of(index)), parent, block_of(index)))
    share = rng.choice([0.5, 0.9, 0.97])
    present = [{index for index in range(num_blocks) if rng.random() < share} for _ in windows]
    for group, blocks in enumerate(present):
        for index in blocks:
            cache.register(100 * group + index, group, keys[index])
    asked: list[tuple[int, bytes]] = []
    find = cache.find
    monkeypatch.setattr(cache, "find", lambda group, key: asked.append((group, key.digest)) or find(group, key))
    length = longest(windows, present, num_blocks)
    tables = cache.match(windows, iter(keys))
    assert len(asked) == len(set(asked)), "a block was looked up twice"
    for group, (table, window) in enumerate(zip(tables, windows, strict=True)):
        first = first_visible_block(64 * length, window)
        assert table == [-1] * first + [100 * group + index for index in range(first, length)]


@pytest.mark.parametrize("damage", ["entry", "digest", "tokens", "group"])
def test_mutants_are_caught(damage: str) -> None:
    cache = PrefixCache()
    digest = chain_digest(ROOT, block_of(1))
    cache.register(7, 0, BlockKey(digest, ROOT, block_of(1)))
    cache.check_integrity()
    if damage == "entry":
        cache._entry_of[8] = cache._entry_of[7]
    elif damage == "digest":
        cache._block_of[0, digest] = 9
    elif damage == "group":
        cache._entry_of[7] = (1, cache._entry_of[7][1])
    else:
        cache._entry_of[7] = (0, BlockKey(digest, ROOT, b""))
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity()
