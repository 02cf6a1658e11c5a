"""Blocks of which a sequence goes on with a part: found, copied, kept, forgotten."""

from __future__ import annotations

import pytest

from pellucid.core.sequence import Sequence
from pellucid.kvcache import prefix_cache
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.kvcache.prefix_cache import MAX_CHILDREN, BlockKey, PrefixCache, chain_digest, encode_tokens, root_digest
from tests.kvcache.test_cache_manager import Memory, begin, exercise_all
from tests.support.mutants import mutant
from tests.support.sequences import make_sequence

ROOT = root_digest(b"")


def resume(cache: CacheManager, token_ids: list[int], salt: bytes = b"") -> Sequence:
    sequence = begin(cache, token_ids, salt)
    cache.adopt_partial(sequence)
    return sequence


def leave(memory: Memory, token_ids: list[int]) -> None:
    """Compute them all in a sequence that ends, and whose last block is kept."""
    sequence = resume(memory.cache, token_ids)
    assert memory.compute(sequence, sequence.num_tokens - sequence.num_computed_tokens)
    memory.cache.free(sequence, keep_partial=True)
    memory.cache.check_integrity([])


@pytest.mark.parametrize("windows", [(None,), (None, 70, 1), (100,)])
@pytest.mark.parametrize(
    ("token_ids", "cached"),
    [
        ([5] * 114 + [6], 114),  # of the second full block
        ([5] * 114, 113),  # not the last token
        ([5] * 80 + [6], 80),
        ([5] * 79 + [6], 64),  # too few
        ([5] * 50 + [6], 50),  # of the first block
        ([5] * 168 + [6], 168),  # all of the partly filled one
        ([5] * 300, 168),
        ([5] * 150 + [6] * 100, 150),
        ([6] + [5] * 200, 0),
    ],
)
def test_the_longest_common_part_is_copied(token_ids: list[int], cached: int, windows: tuple[int | None, ...]) -> None:
    cache = CacheManager(40, windows=windows)
    memory = Memory(cache)
    leave(memory, [5] * 168)
    sequence = resume(cache, token_ids)
    assert sequence.num_computed_tokens == cached
    assert len(cache.copies) == (len(windows) if cached % 64 else 0)
    cache.check_integrity([sequence])
    assert memory.compute(sequence, sequence.num_tokens - cached)
    memory.check(sequence)
    cache.check_integrity([sequence])


def test_a_limit_and_a_salt_hold_for_parts_of_blocks() -> None:
    cache = CacheManager(40)
    leave(Memory(cache), [5] * 168)
    assert resume(cache, [5] * 200, salt=b"other").num_computed_tokens == 0
    limited = make_sequence([5] * 200)
    limited.group.max_cached_tokens = 150
    cache.adopt(limited, cache.match(limited))
    cache.adopt_partial(limited)
    assert limited.num_computed_tokens == 150


def test_what_is_not_kept() -> None:
    for cache, length, keep in (
        (CacheManager(8, enable_prefix_caching=False), 100, True),
        (CacheManager(8), 100, False),
        (CacheManager(8), 79, True),  # 15 tokens
        (CacheManager(8), 63, True),  # a first block
    ):
        sequence = begin(cache, [5] * 200)
        assert Memory(cache).compute(sequence, length)
        cache.free(sequence, keep_partial=keep)
        cache.check_integrity([])
        assert cache.pool.num_cached == (length // 64 if cache.has_prefix_cache else 0)


def test_a_block_that_others_hold_is_kept_by_the_last_of_them() -> None:
    cache = CacheManager(8)
    parent = begin(cache, [5] * 100)
    assert Memory(cache).compute(parent, 100)
    child = make_sequence(parent.token_ids)
    cache.fork(parent, child)
    cache.free(parent, keep_partial=True)
    cache.check_integrity([child])
    assert resume(cache, [5] * 100).num_computed_tokens == 64
    cache.free(child, keep_partial=True)
    assert resume(cache, [5] * 100).num_computed_tokens == 99


def test_a_block_whose_copy_is_not_made_is_not_kept() -> None:
    cache = CacheManager(8)
    leave(Memory(cache), [5] * 100)
    cache.reset_prefix_cache()
    leave(Memory(cache), [5] * 128)
    sequence = resume(cache, [5] * 100 + [6] * 100)
    assert sequence.num_computed_tokens == 100
    cache.free(sequence, keep_partial=True)
    assert cache.pool.num_cached == 2


def test_reset_and_eviction_forget() -> None:
    cache = CacheManager(4)
    memory = Memory(cache)
    leave(memory, [5] * 100)
    cache.reset_prefix_cache()
    assert (cache.pool.num_free, resume(cache, [5] * 100).num_computed_tokens) == (4, 0)
    leave(memory, [5] * 100)
    other = begin(cache, [6] * 190)
    assert memory.compute(other, 190)  # takes the room of the partly filled block, which was given back first
    cache.check_integrity([other])
    cache.free(other)
    assert resume(cache, [5] * 100).num_computed_tokens == 64


def test_without_room_for_the_copy_only_full_blocks_are_taken() -> None:
    cache = CacheManager(2)
    leave(Memory(cache), [5] * 100)
    sequence = resume(cache, [5] * 200)
    assert sequence.num_computed_tokens == 64
    cache.check_integrity([sequence])


def source_given_to_another(copies_first: bool) -> None:
    """A sequence goes on with a part of a block which another one gets, and writes to, in the same step."""
    cache = CacheManager(5)
    memory = Memory(cache)
    leave(memory, [5] * 100)
    sequence, other = resume(cache, [5] * 90 + [6] * 10), begin(cache, [7] * 190)
    assert cache.allocate(other, 190)
    ((source, destination),) = cache.copies
    assert source in other.block_tables[0]
    assert destination in sequence.block_tables[0]
    cache.check_integrity([sequence, other])
    if not copies_first:
        copies = cache.take_copies()
        assert memory.compute(other, 190)
        cache.copies = copies
    assert memory.compute(sequence, 10)
    memory.check(sequence)


def test_a_source_is_copied_before_another_writes_to_it() -> None:
    source_given_to_another(copies_first=True)


def test_mutant_that_copies_after_the_writing_is_caught() -> None:
    with pytest.raises(AssertionError, match="reads another's keys at 64"):
        source_given_to_another(copies_first=False)


def source_first_to_be_evicted() -> None:
    """The source of one group is the first to go when the copy of the other's takes the last room there is."""
    cache = CacheManager(16, windows=(None, 70))
    memory = Memory(cache)
    first = begin(cache, [5] * 400)
    for _ in range(2):  # the window leaves two blocks behind
        assert memory.compute(first, 200)
    leave_behind = begin(cache, [6] * 64)
    assert memory.compute(leave_behind, 64)
    cache.free(leave_behind)
    assert (cache.pool.num_free, cache.pool.num_cached) == (0, 4)
    sequence = resume(cache, [5] * 90 + [6])
    assert sequence.num_computed_tokens == 90
    cache.check_integrity([first, sequence])
    assert memory.compute(sequence, 1)
    memory.check(sequence)
    cache.check_integrity([first, sequence])


def test_a_source_is_not_evicted_for_a_copy() -> None:
    source_first_to_be_evicted()


def test_mutant_that_does_not_hold_its_sources_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    unheld = mutant(CacheManager.adopt_partial, "self._share([found.blocks])", "found.blocks.extend([])")
    monkeypatch.setattr(CacheManager, "adopt_partial", unheld)
    with pytest.raises((AssertionError, CacheIntegrityError)):
        source_first_to_be_evicted()


@pytest.mark.parametrize("broken", ["length", "tokens", "kept", "copy"])
def test_mutants_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "length":
        longer = mutant(CacheManager.adopt_partial, "begin + found.num_tokens", "begin + found.num_tokens + 1")
        monkeypatch.setattr(CacheManager, "adopt_partial", longer)
    elif broken == "tokens":
        monkeypatch.setattr(prefix_cache, "_num_common_tokens", lambda left, right: min(len(left), len(right)) // 4)
    elif broken == "kept":
        kept = mutant(CacheManager._register_partial, "self.pool.ref_count(block) > 1 or ", "")
        monkeypatch.setattr(CacheManager, "_register_partial", kept)
    else:
        uncopied = mutant(CacheManager.adopt_partial, "self.copies.append((source, table[-1]))", "pass")
        monkeypatch.setattr(CacheManager, "adopt_partial", uncopied)
    with pytest.raises((AssertionError, CacheIntegrityError, KeyError)):
        exercise_all()


def key_of(tokens: list[int], parent: bytes = ROOT) -> BlockKey:
    encoded = encode_tokens(tokens)
    return BlockKey(chain_digest(parent, encoded), parent, encoded)


def test_match_partial_wants_all_groups_and_compares_the_most_recent() -> None:
    cache = PrefixCache()
    wanted = encode_tokens([5] * 64)
    for block in range(3 * MAX_CHILDREN):
        assert cache.register(block, 0, key_of([5] * (20 + block) + [6 + block]))
        cache.check_integrity()
    assert cache.match_partial(1, ROOT, wanted) == (20 + 3 * MAX_CHILDREN - 1, [3 * MAX_CHILDREN - 1])
    assert cache.match_partial(1, key_of([1] * 64).digest, wanted) is None
    assert cache.match_partial(2, ROOT, wanted) is None
    cache.register(100, 1, key_of([5] * 20 + [6]))  # so recent again
    assert cache.match_partial(2, ROOT, wanted) == (20, [0, 100])
    cache.forget(0)
    cache.check_integrity()
    assert cache.match_partial(2, ROOT, wanted) is None
    for block in (*range(1, 3 * MAX_CHILDREN), 100):
        cache.forget(block)
        cache.check_integrity()
    assert not cache
    assert not cache._children


@pytest.mark.parametrize("damage", ["missing", "parent", "empty", "short"])
def test_damage_is_found(damage: str) -> None:
    cache = PrefixCache()
    key = key_of([5] * 20)
    cache.register(7, 0, key)
    cache.check_integrity()
    if damage == "missing":
        cache._children[ROOT][b"x"] = key_of([6] * 20)
    elif damage == "parent":
        cache._children[key.digest] = cache._children.pop(ROOT)
    elif damage == "empty":
        cache._children[ROOT].clear()
    else:
        cache.register(8, 0, key_of([5] * 15))
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity()


def test_a_partly_filled_block_in_use_is_found_out() -> None:
    cache = CacheManager(8)
    leave(Memory(cache), [5] * 100)
    sequence = resume(cache, [5] * 80 + [6])
    ((source, _),) = cache.take_copies()
    cache.pool.share(source)
    sequence.block_tables[0][1] = source
    with pytest.raises(CacheIntegrityError):
        cache.check_integrity([sequence])
