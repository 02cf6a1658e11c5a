"""KV blocks for sequences: allocate, fork, trim, free, and find again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike

from pellucid.core.config import BLOCK_SIZE, num_blocks_for
from pellucid.core.kv_windows import first_visible_block, max_blocks_held
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.kvcache.block_pool import BlockPool, CacheIntegrityError
from pellucid.kvcache.prefix_cache import (
    MIN_PARTIAL_TOKENS,
    BlockKey,
    PrefixCache,
    chain_digest,
    encode_tokens,
    root_digest,
)


class CacheManager:
    """Gives every sequence the blocks its tokens need, and each block to as many sequences as share its content.

    A model's layers are in KV groups (pellucid.models.kv_groups), and a sequence has a table of blocks for each. All
    blocks are of one size and in one pool; which group a block holds is decided when it is taken.

    The life of a sequence's blocks:
        `match`     what the prefix cache holds of it (nothing changes);
        `adopt`     take these blocks: their tokens count as computed;
        `adopt_partial`  and those that the next block has in common with a cached one, which is copied;
        `allocate`  room for tokens to be computed next, all or nothing; a shared last block is copied first. Blocks
                    that the next token does not see under its group's window are given back before;
        `commit`    once computed, full blocks become findable by others;
        `fork`      a second sequence on the same blocks;
        `trim`      back to fewer computed tokens;
        `free`      every block back; full ones stay findable until their room is needed, and the last one if wanted.

    Args:
        windows: the attention window of each KV group; None sees everything.

    Attributes:
        pool: the books.
        copies: (source, destination) block pairs that must be copied, in this order, before the next forward.
    """

    def __init__(
        self, num_blocks: int, *, windows: ListLike[int | None] = (None,), enable_prefix_caching: bool = True
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.windows = tuple(windows)
        self.copies: list[tuple[int, int]] = []
        self._groups_of_window = {
            window: [group for group, own in enumerate(windows) if own == window]
            for window in dict.fromkeys(windows)
            if window is not None
        }
        self._prefix_cache = PrefixCache() if enable_prefix_caching else None
        self._last_stamp = 0

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def has_prefix_cache(self) -> bool:
        return self._prefix_cache is not None

    @property
    def num_available(self) -> int:
        return self.pool.num_available

    def match(self, sequence: Sequence) -> list[list[int]]:
        """The blocks of the longest prefix of `sequence` that is cached: a table for each KV group, for `adopt`.

        Whole blocks only; never the last token, whose logits are wanted, nor more than the group's `max_cached_tokens`.
        """
        cache = self._prefix_cache
        if cache is None:
            return [[] for _ in self.windows]
        return cache.match(self.windows, self._keys(sequence, 0, _max_cached_tokens(sequence) // BLOCK_SIZE))

    def adopt(self, sequence: Sequence, tables: list[list[int]]) -> None:
        """Begin `sequence`, which holds nothing, with the blocks that `match` found."""
        if sequence.num_blocks or sequence.num_computed_tokens:
            raise CacheIntegrityError(f"{sequence} already holds blocks")
        length = len(tables[0])
        self._share(tables)
        sequence.block_tables = [list(table) for table in tables]
        sequence.first_blocks = [first_visible_block(length * BLOCK_SIZE, window) for window in self.windows]
        sequence.num_computed_tokens = length * BLOCK_SIZE
        sequence.num_registered_blocks = length
        self._stamp(sequence)

    def adopt_partial(self, sequence: Sequence) -> None:
        """After `adopt`: go on with what the next block of `sequence` begins with, if a registered block, full or
        partly filled, begins so too. No effect where they have fewer than MIN_PARTIAL_TOKENS in common, or there is no
        room.

        The keys and values of those tokens depend on them and on what is before them alone. What else is in the block
        is copied with them and is overwritten before any token sees it. The source may be evicted, and its room be
        given to others, before the copy is made: they write only by later copies, or in the forward.
        """
        cache, pool = self._prefix_cache, self.pool
        begin, end = sequence.num_computed_tokens, _max_cached_tokens(sequence)
        if not cache or end - begin < MIN_PARTIAL_TOKENS:
            return
        tokens = encode_tokens(sequence.token_ids[begin : min(end, begin + BLOCK_SIZE)])
        found = cache.match_partial(len(self.windows), self._parent(sequence, begin // BLOCK_SIZE), tokens)
        if found is None or len(found.blocks) > pool.num_available - sum(map(pool.is_cached, found.blocks)):
            return
        self._share([found.blocks])  # lest one of them be evicted for the copy of another
        for table, source in zip(sequence.block_tables, found.blocks, strict=True):
            table.append(self._take())
            self.copies.append((source, table[-1]))
        for source in found.blocks:
            self._release(source)
        sequence.num_computed_tokens = begin + found.num_tokens
        sequence.num_writable_tokens = begin + BLOCK_SIZE
        self._stamp(sequence)

    def reserve(self, sequence: Sequence, num_blocks: int) -> list[int] | None:
        """Give `sequence`, which holds nothing, the blocks that a token after its first `num_blocks` full ones sees,
        for content that is not computed but comes from elsewhere; None, and no block taken, if there is no room.

        What the prefix cache has is shared. The rest is for the caller to fill, to count as computed, and to `commit`.

        Returns:
            Of each KV group in turn, by position: the block to fill, or -1 where the content is there.
        """
        if sequence.num_blocks or sequence.num_computed_tokens:
            raise CacheIntegrityError(f"{sequence} already holds blocks")
        firsts = [first_visible_block(num_blocks * BLOCK_SIZE, window) for window in self.windows]
        tables = [[-1] * num_blocks for _ in firsts]
        found: list[int] = []
        if self._prefix_cache is not None:
            for index, key in enumerate(self._keys(sequence, 0, num_blocks)):
                for group, first in enumerate(firsts):
                    if index >= first and (block := self._prefix_cache.find(group, key)) is not None:
                        tables[group][index] = block
                        found.append(block)
        missing = sum(num_blocks - first for first in firsts) - len(found)
        if missing + sum(map(self.pool.is_cached, found)) > self.pool.num_available:
            return None
        self._share(tables)
        places: list[int] = []
        for table, first in zip(tables, firsts, strict=True):
            for index in range(first, num_blocks):
                places.append(-1 if table[index] >= 0 else self._take())
                table[index] = max(table[index], places[-1])
        sequence.block_tables, sequence.first_blocks = tables, firsts
        self._stamp(sequence)
        return places

    def allocate(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Make room for the next `num_new_tokens` tokens of `sequence`; False, and no block taken, if there is none."""
        if self._groups_of_window:
            self._release_behind_windows(sequence)
        tables = sequence.block_tables or [[] for _ in self.windows]
        computed = sequence.num_computed_tokens
        first = computed // BLOCK_SIZE
        length = len(tables[0])
        end = -(-(computed + num_new_tokens) // BLOCK_SIZE)
        missing = end - length
        pool, cache = self.pool, self._prefix_cache
        shared: list[list[int]] = []
        if first < length:
            for table in tables:
                if pool.ref_count(table[first]) > 1:
                    shared.append(table)
        if (missing > 0 or shared) and max(missing, 0) * len(tables) + len(shared) > pool.num_available:
            return False
        if first < length and cache is not None:
            for table in tables:  # left partly filled by a trim, and about to be written
                if table[first] in cache and table not in shared:
                    cache.forget(table[first])
        sequence.num_writable_tokens = end * BLOCK_SIZE
        if missing <= 0 and not shared:
            return True
        for table in shared:
            source = table[first]
            table[first] = self._take()
            self.copies.append((source, table[first]))
            self._release(source)
        for _ in range(missing):
            for table in tables:
                table.append(self._take())
        if not sequence.block_tables:
            sequence.block_tables = tables
            sequence.first_blocks = [0] * len(tables)
        self._stamp(sequence)
        return True

    def num_blocks_to_admit(self, sequence: Sequence, tables: list[list[int]], max_new_tokens: int) -> int:
        """Blocks that `sequence`, begun with the `tables` that `match` found, takes at most of those available until
        all its tokens are computed, up to `max_new_tokens` a step, and it has grown by a block in each group, or to its
        end. Where it is yet to fork, its siblings are counted with it.
        """
        num_tokens = _num_tokens_wanted(sequence)
        num_blocks = num_blocks_for(num_tokens)
        needed = self._num_blocks_of_forks(sequence, num_blocks)
        for window, table in zip(self.windows, tables, strict=True):
            # Blocks that a window has left behind are never needed, those that others hold not until it has moved on.
            at_hand = sum(1 for block in table if block < 0 or self.pool.ref_count(block) > 0)
            needed += min(num_blocks - at_hand, max_blocks_held(window, num_tokens, max_new_tokens))
        return needed

    def num_blocks_to_come(self, sequence: Sequence, max_new_tokens: int) -> int:
        """The same for a sequence that has begun: blocks beyond those it holds."""
        num_tokens = _num_tokens_wanted(sequence)
        num_blocks = num_blocks_for(num_tokens)
        needed = self._num_blocks_of_forks(sequence, num_blocks)
        growth = num_blocks - len(sequence.block_tables[0])
        if sequence.num_writable_tokens == 0 and sequence.num_computed_tokens % BLOCK_SIZE:
            growth += 1  # what it shares since a fork, to be copied
        if growth <= 1 or not self._groups_of_window:
            return needed + growth * len(self.windows)
        for window, table, first in zip(self.windows, sequence.block_tables, sequence.first_blocks, strict=True):
            if window is None:
                needed += growth
            else:  # what it alone holds comes back as the window moves on
                own = sum(1 for block in table[first:] if self.pool.ref_count(block) == 1)
                needed += min(growth, max(0, max_blocks_held(window, num_tokens, max_new_tokens) - own))
        return needed

    def max_blocks_of_group(self, group: SequenceGroup, max_new_tokens: int) -> int:
        """Most blocks that a lockstep group, computed up to `max_new_tokens` a step, holds at any time from now on.
        What its live sequences have in common is shared."""
        num_tokens = max(sequence.max_length for sequence in group.live) - 1
        num_shared = num_shared_tokens(group.live) // BLOCK_SIZE
        num_sequences = len(group.sequences)
        num_blocks = 0
        for window in self.windows:
            most = max_blocks_held(window, num_tokens, max_new_tokens)
            num_blocks += num_sequences * most - (0 if window is not None else (num_sequences - 1) * num_shared)
        return num_blocks

    def _num_blocks_of_forks(self, sequence: Sequence, num_blocks: int) -> int:
        """Blocks that the siblings yet to fork take beside the full ones they share, up to `num_blocks` in a table."""
        group = sequence.group
        num_to_come = 0 if group.is_forked else len(group.sequences) - 1
        if group.is_lockstep and group.is_forked and sequence is group.lead:
            num_to_come = len(group.sequences) - len(group.live)
        return num_to_come * (num_blocks - sequence.num_tokens // BLOCK_SIZE) * len(self.windows)

    def commit(self, sequence: Sequence) -> None:
        """Register the full blocks that `sequence` has computed since the last commit.

        Where another sequence has registered the same tokens meanwhile, its block is taken over and ours given back:
        the contents are equal to the bit.
        """
        num_full = sequence.num_computed_tokens // BLOCK_SIZE
        cache = self._prefix_cache
        begin = sequence.num_registered_blocks
        if num_full <= begin or cache is None:
            return
        for index, key in enumerate(self._keys(sequence, begin, num_full), begin):
            for group, table in enumerate(sequence.block_tables):
                block = table[index]
                if block < 0 or block in cache:  # behind the window since, or a fork of ours was first
                    continue
                twin = cache.find(group, key)
                if twin is None:
                    cache.register(block, group, key)
                else:
                    self.pool.share(twin)
                    table[index] = twin
                    self._release(block)
                    self._stamp(sequence)
        sequence.num_registered_blocks = num_full

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which holds nothing, go on from where `parent` is. Blocks are shared until one writes."""
        if child.num_blocks or child.num_computed_tokens:
            raise CacheIntegrityError(f"{child} already holds blocks")
        self._share(parent.block_tables)
        parent.num_writable_tokens = 0
        child.block_tables = [list(table) for table in parent.block_tables]
        child.first_blocks = list(parent.first_blocks)
        child.block_digests = list(parent.block_digests)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_registered_blocks = parent.num_registered_blocks
        self._stamp(child)

    def can_trim(self, sequence: Sequence, num_computed_tokens: int) -> bool:
        """Whether `sequence` still has the blocks that its token number `num_computed_tokens` sees."""
        return num_computed_tokens == 0 or all(
            first <= first_visible_block(num_computed_tokens, window)
            for first, window in zip(sequence.first_blocks, self.windows, strict=False)
        )

    def trim(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Forget what was computed beyond the first `num_computed_tokens` tokens, and give back the blocks beyond them.

        A block that stays in part is no longer found, or is copied if it is shared, once it is written to again.

        What a window has left behind is given back by `allocate`, for the first of the tokens it makes room for. So a
        trim to where the last `allocate` began, or to anything after it, is always possible: draft tokens that were
        refused go back whatever their number. Further back it is possible as far as `can_trim` says, and to 0.

        Raises:
            CacheIntegrityError: a block that the next token must see was given back (`free`, and compute again).
        """
        if not 0 <= num_computed_tokens <= sequence.num_computed_tokens:
            raise CacheIntegrityError(f"{sequence} cannot be trimmed to {num_computed_tokens} computed tokens")
        if not self.can_trim(sequence, num_computed_tokens):
            raise CacheIntegrityError(f"{sequence} has given back blocks that token {num_computed_tokens} must see")
        num_full = num_computed_tokens // BLOCK_SIZE
        self._release_from(sequence, num_blocks_for(num_computed_tokens))
        sequence.num_computed_tokens = num_computed_tokens
        sequence.num_writable_tokens = 0
        sequence.num_registered_blocks = min(sequence.num_registered_blocks, num_full)
        del sequence.block_digests[num_full:]
        self._stamp(sequence)

    def give_back(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Of what `allocate` made room for, keep what the next `num_new_tokens` tokens of `sequence` need."""
        if len(sequence.block_tables[0]) > num_blocks_for(sequence.num_computed_tokens + num_new_tokens):
            self.trim(sequence, sequence.num_computed_tokens)
            self.allocate(sequence, num_new_tokens)

    def free(self, sequence: Sequence, *, keep_partial: bool = False) -> None:
        """Give back every block; nothing counts as computed. The end of a prefix is evicted before its beginning.

        Args:
            keep_partial: register the last block, if it is partly filled, for `adopt_partial`. Not the first block: a
                short prompt leaves nothing behind.
        """
        if keep_partial:
            self._register_partial(sequence)
        self._release_from(sequence, 0)
        sequence.num_computed_tokens = 0
        sequence.num_writable_tokens = 0
        sequence.num_registered_blocks = 0
        self._stamp(sequence)

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies to make before the next forward, which the caller now owes."""
        copies = self.copies
        if copies:
            self.copies = []
        return copies

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks in use stay in use."""
        if self._prefix_cache is not None:
            while self.pool.num_cached:
                self._prefix_cache.forget(self.pool.evict())

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Check the books against the `sequences` that hold blocks. O(blocks + tables).

        Raises:
            CacheIntegrityError: a block is held by other than its reference count says, is lost, or is in tables of two
                KV groups; or a sequence lacks a block that tokens yet to be computed see.
        """
        self.pool.check_integrity()
        held: Counter[int] = Counter()
        group_of: dict[int, int] = {}
        for sequence in sequences:
            self._check_tables(sequence)
            for group, table in enumerate(sequence.block_tables):
                blocks = [block for block in table if block >= 0]
                held.update(blocks)
                for block in blocks:
                    if group_of.setdefault(block, group) != group:
                        raise CacheIntegrityError(f"block {block} is in tables of groups {group_of[block]} and {group}")
        for block in range(self.num_blocks):
            if held[block] != self.pool.ref_count(block):
                raise CacheIntegrityError(
                    f"block {block} is in {held[block]} tables and has {self.pool.ref_count(block)} references"
                )
        if self._prefix_cache is None:
            if self.pool.num_cached:
                raise CacheIntegrityError("blocks are cached without a prefix cache")
            return
        self._prefix_cache.check_integrity()
        for block in range(self.num_blocks):
            registered = self._prefix_cache.group_of(block)
            if self._prefix_cache.is_partial(block) and not self.pool.is_cached(block):
                raise CacheIntegrityError(f"block {block} can be found as partly filled and is not cached")
            if self.pool.is_cached(block) and registered is None:
                raise CacheIntegrityError(f"block {block} is cached but cannot be found")
            if self.pool.ref_count(block) == 0 and not self.pool.is_cached(block) and registered is not None:
                raise CacheIntegrityError(f"block {block} is free but can be found")
            if registered is not None and group_of.get(block, registered) != registered:
                raise CacheIntegrityError(f"block {block} of group {group_of[block]} is found as one of {registered}")

    def _check_tables(self, sequence: Sequence) -> None:
        """Raises CacheIntegrityError unless every block that tokens yet to be computed see is there, and those that are
        not all lie before those that are."""
        tables, firsts = sequence.block_tables, sequence.first_blocks
        if not tables and not firsts and not sequence.num_computed_tokens:
            return
        if not len(tables) == len(firsts) == len(self.windows) or len(set(map(len, tables))) > 1:
            raise CacheIntegrityError(f"{sequence} has tables that do not fit {len(self.windows)} KV groups")
        if len(tables[0]) * BLOCK_SIZE < max(sequence.num_computed_tokens, sequence.num_writable_tokens):
            raise CacheIntegrityError(f"{sequence} has computed more than its blocks hold")
        num_writable = num_blocks_for(sequence.num_writable_tokens)
        for table, first, window in zip(tables, firsts, self.windows, strict=True):
            for block in table[sequence.num_computed_tokens // BLOCK_SIZE : num_writable]:
                if self.pool.ref_count(block) > 1 or (self._prefix_cache is not None and block in self._prefix_cache):
                    raise CacheIntegrityError(f"{sequence} may write to block {block}, which others read")
            if not 0 <= first <= first_visible_block(sequence.num_computed_tokens, window):
                raise CacheIntegrityError(f"{sequence} has given back blocks that its next token sees")
            if any((block < 0) != (index < first) for index, block in enumerate(table)):
                raise CacheIntegrityError(f"{sequence} has a gap in a table, or a block before its first")

    def _keys(self, sequence: Sequence, begin: int, end: int) -> Iterator[BlockKey]:
        """What the full blocks from `begin` to `end` of `sequence` are found by, each as it is asked for."""
        digests, token_ids = sequence.block_digests, sequence.token_ids
        for index in range(min(len(digests), begin), end):
            tokens = encode_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            parent = self._parent(sequence, index)
            if index == len(digests):
                digests.append(chain_digest(parent, tokens))
            if index >= begin:
                yield BlockKey(digests[index], parent, tokens)

    @staticmethod
    def _parent(sequence: Sequence, index: int) -> bytes:
        """Digest of what is before block `index` of `sequence`, the digests of whose blocks before are known."""
        return sequence.block_digests[index - 1] if index else root_digest(sequence.group.cache_salt)

    def _register_partial(self, sequence: Sequence) -> None:
        """Register the partly filled last block of `sequence`, which is about to be freed, if no other holds it."""
        index, length = divmod(sequence.num_computed_tokens, BLOCK_SIZE)
        cache = self._prefix_cache
        if cache is None or index == 0 or length < MIN_PARTIAL_TOKENS or sequence.num_registered_blocks < index:
            return
        blocks = [table[index] for table in sequence.block_tables]
        yet_to_copy = {destination for _, destination in self.copies}
        if any(self.pool.ref_count(block) > 1 or block in cache or block in yet_to_copy for block in blocks):
            return
        parent = self._parent(sequence, index)
        tokens = encode_tokens(sequence.token_ids[index * BLOCK_SIZE : sequence.num_computed_tokens])
        key = BlockKey(chain_digest(parent, tokens), parent, tokens)
        for group, block in enumerate(blocks):
            cache.register(block, group, key)

    def _share(self, tables: list[list[int]]) -> None:
        for table in tables:
            for block in table:
                if block >= 0:
                    self.pool.share(block)

    def _release_behind_windows(self, sequence: Sequence) -> None:
        """Give back what the next token of `sequence` does not see; as in `free`, the end first."""
        if not sequence.block_tables:
            return
        for window, groups in self._groups_of_window.items():
            begin = sequence.first_blocks[groups[0]]
            end = first_visible_block(sequence.num_computed_tokens, window)
            if begin >= end:
                continue
            tables = [sequence.block_tables[group] for group in groups]
            for index in range(end - 1, begin - 1, -1):
                for table in tables:
                    self._release(table[index])
                    table[index] = -1
            for group in groups:
                sequence.first_blocks[group] = end
            self._stamp(sequence)

    def _release_from(self, sequence: Sequence, begin: int) -> None:
        """Give back the blocks from index `begin` on, the end first in all groups."""
        tables = sequence.block_tables
        for _ in range(begin, len(tables[0]) if tables else 0):
            for table in tables:
                block = table.pop()
                if block >= 0:
                    self._release(block)
        sequence.first_blocks = [min(first, begin) for first in sequence.first_blocks]

    def _take(self) -> int:
        if self.pool.num_free == 0:
            block = self.pool.evict()
            if self._prefix_cache is not None:
                self._prefix_cache.forget(block)
        return self.pool.allocate()

    def _release(self, block: int) -> None:
        self.pool.release(block, keep=self._prefix_cache is not None and block in self._prefix_cache)

    def _stamp(self, sequence: Sequence) -> None:
        self._last_stamp += 1
        sequence.table_stamp = self._last_stamp


def _max_cached_tokens(sequence: Sequence) -> int:
    """Most tokens of `sequence` that may come from the prefix cache: none whose logits are wanted, as the last one's
    always are, and no more than its group's `max_cached_tokens`."""
    group = sequence.group
    most = len(sequence.token_ids) - 1
    if group.prompt_logprobs is not None and group.wants_prompt_logits:
        most = len(group.prompt_logprobs)
    return most if group.max_cached_tokens is None else min(most, group.max_cached_tokens)


def _num_tokens_wanted(sequence: Sequence) -> int:
    """Tokens that `sequence` is to have room for: those it has and a block more, but for the last it can have, which is
    never computed. One that computes what its lockstep group shares is counted as long as it will be."""
    lead_token_ids = sequence.group.lead_token_ids
    num_tokens = sequence.num_tokens if lead_token_ids is None else len(lead_token_ids)
    return min(num_tokens + BLOCK_SIZE, sequence.max_length - 1)


def num_shared_tokens(sequences: ListLike[Sequence]) -> int:
    """Tokens in whole blocks that all of `sequences` begin with, leaving each a token at least."""
    first = sequences[0].token_ids
    shortest = min(len(sequence.token_ids) for sequence in sequences)
    end = 0
    while end + BLOCK_SIZE < shortest:
        block = first[end : end + BLOCK_SIZE]
        if any(sequence.token_ids[end : end + BLOCK_SIZE] != block for sequence in sequences[1:]):
            break
        end += BLOCK_SIZE
    return end
