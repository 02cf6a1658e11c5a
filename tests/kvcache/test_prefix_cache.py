from __future__ import annotations

import pytest

from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.prefix_cache import PrefixCache, chain_digest, encode_tokens, root_digest

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
    assert cache.find(digest, ROOT, block_of(1)) is None
    assert cache.register(7, digest, ROOT, block_of(1))
    assert cache.find(digest, ROOT, block_of(1)) == 7
    assert not cache.register(8, digest, ROOT, block_of(1))
    with pytest.raises(CacheIntegrityError):
        cache.register(7, chain_digest(digest, block_of(2)), digest, block_of(2))
    cache.forget(7)
    assert cache.find(digest, ROOT, block_of(1)) is None
    with pytest.raises(CacheIntegrityError):
        cache.forget(7)


def test_a_collision_is_no_hit() -> None:
    """Tokens and parent are compared, so a broken hash costs hits, never a wrong answer."""
    cache = PrefixCache()
    same = b"\0" * 32
    cache.register(7, same, ROOT, block_of(1))
    assert cache.find(same, ROOT, block_of(2)) is None
    assert cache.find(same, same, block_of(1)) is None


@pytest.mark.parametrize("damage", ["entry", "digest", "tokens"])
def test_mutants_are_caught(damage: str) -> None:
    cache = PrefixCache()
    digest = chain_digest(ROOT, block_of(1))
    cache.register(7, digest, ROOT, block_of(1))
    cache.check_integrity()
    if damage == "entry":
        cache._entry_of[8] = cache._entry_of[7]
    elif damage == "digest":
        cache._block_of[digest] = 9
    else:
        cache._entry_of[7] = (digest, ROOT, b"")
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity()
