"""KV blocks for sequences: allocate, fork, trim, free, and find again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pellucid.core.batch import BLOCK_SIZE
from pellucid.core.sequence import Sequence
from pellucid.kvcache.block_pool import BlockPool, CacheIntegrityError
from pellucid.kvcache.prefix_cache import PrefixCache, chain_digest, encode_tokens, root_digest


class CacheManager:
    """Gives every sequence the blocks its tokens need, and each block to as many sequences as share its content.

    The life of a sequence's blocks:
        `match`     what the prefix cache holds of it (nothing changes);
        `adopt`     take these blocks: their tokens count as computed;
        `allocate`  room for tokens to be computed next, all or nothing; a shared last block is copied first;
        `commit`    once computed, full blocks become findable by others;
        `fork`      a second sequence on the same blocks;
        `trim`      back to fewer computed tokens;
        `free`      every block back; full ones stay findable until their room is needed.

    Attributes:
        pool: the books.
        copies: (source, destination) block pairs that must be copied, in this order, before the next forward.
    """

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.copies: list[tuple[int, int]] = []
        self._prefix_cache = PrefixCache() if enable_prefix_caching else None
        self._last_stamp = 0

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_available(self) -> int:
        return self.pool.num_available

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest prefix of `sequence` that is cached.

        Whole blocks only, and never the last token: its logits are wanted.
        """
        cache = self._prefix_cache
        if cache is None:
            return []
        token_ids = sequence.token_ids
        blocks: list[int] = []
        for index in range((len(token_ids) - 1) // BLOCK_SIZE):
            parent, digest = self._digests(sequence, index)
            tokens = encode_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            block = cache.find(digest, parent, tokens)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def adopt(self, sequence: Sequence, blocks: list[int]) -> None:
        """Begin `sequence`, which holds nothing, with the blocks that `match` found."""
        if sequence.block_table or sequence.num_computed_tokens:
            raise CacheIntegrityError(f"{sequence} already holds blocks")
        for block in blocks:
            self.pool.share(block)
        sequence.block_table = list(blocks)
        sequence.num_computed_tokens = len(blocks) * BLOCK_SIZE
        sequence.num_registered_blocks = len(blocks)
        self._stamp(sequence)

    def allocate(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Make room for the next `num_new_tokens` tokens of `sequence`; False, nothing changed, if there is none."""
        table = sequence.block_table
        first = sequence.num_computed_tokens // BLOCK_SIZE
        end = -(-(sequence.num_computed_tokens + num_new_tokens) // BLOCK_SIZE)
        pool = self.pool
        copy_first = first < len(table) and pool.ref_count(table[first]) > 1
        missing = end - len(table)
        if max(missing, 0) + copy_first > pool.num_available:
            return False
        if first < len(table) and not copy_first:
            cache = self._prefix_cache
            if cache is not None and table[first] in cache:  # left partly filled by a trim, and about to be written
                cache.forget(table[first])
        if missing <= 0 and not copy_first:
            return True
        if copy_first:
            source = table[first]
            table[first] = self._take()
            self.copies.append((source, table[first]))
            self._release(source)
        for _ in range(missing):
            table.append(self._take())
        self._stamp(sequence)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Register the full blocks that `sequence` has computed since the last commit.

        Where another sequence has registered the same tokens meanwhile, its block is taken over and ours given back:
        the contents are equal to the bit.
        """
        num_full = sequence.num_computed_tokens // BLOCK_SIZE
        cache = self._prefix_cache
        if num_full <= sequence.num_registered_blocks or cache is None:
            return
        table = sequence.block_table
        for index in range(sequence.num_registered_blocks, num_full):
            block = table[index]
            if block in cache:  # a fork of ours was first
                continue
            parent, digest = self._digests(sequence, index)
            tokens = encode_tokens(sequence.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            twin = cache.find(digest, parent, tokens)
            if twin is None:
                cache.register(block, digest, parent, tokens)
            else:
                self.pool.share(twin)
                table[index] = twin
                self._release(block)
                self._stamp(sequence)
        sequence.num_registered_blocks = num_full

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which holds nothing, go on from where `parent` is. Blocks are shared until one writes."""
        if child.block_table or child.num_computed_tokens:
            raise CacheIntegrityError(f"{child} already holds blocks")
        for block in parent.block_table:
            self.pool.share(block)
        child.block_table = list(parent.block_table)
        child.block_digests = list(parent.block_digests)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_registered_blocks = parent.num_registered_blocks
        self._stamp(child)

    def trim(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Forget what was computed beyond the first `num_computed_tokens` tokens, and give back the blocks beyond them.

        A block that stays in part is no longer found, or is copied if it is shared, once it is written to again.
        """
        if not 0 <= num_computed_tokens <= sequence.num_computed_tokens:
            raise CacheIntegrityError(f"{sequence} cannot be trimmed to {num_computed_tokens} computed tokens")
        keep = -(-num_computed_tokens // BLOCK_SIZE)
        num_full = num_computed_tokens // BLOCK_SIZE
        table = sequence.block_table
        while len(table) > keep:
            self._release(table.pop())
        sequence.num_computed_tokens = num_computed_tokens
        sequence.num_registered_blocks = min(sequence.num_registered_blocks, num_full)
        del sequence.block_digests[num_full:]
        self._stamp(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back every block; nothing counts as computed. The end of a prefix is evicted before its beginning."""
        while sequence.block_table:
            self._release(sequence.block_table.pop())
        sequence.num_computed_tokens = 0
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
            CacheIntegrityError: a block is held by other than its reference count says, is lost, or is found under
                tokens that are not its sequence's; or a sequence lacks a block for a token it has computed.
        """
        self.pool.check_integrity()
        held: Counter[int] = Counter()
        for sequence in sequences:
            held.update(sequence.block_table)
            if len(sequence.block_table) * BLOCK_SIZE < sequence.num_computed_tokens:
                raise CacheIntegrityError(f"{sequence} has computed more than its blocks hold")
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
            if self.pool.is_cached(block) and block not in self._prefix_cache:
                raise CacheIntegrityError(f"block {block} is cached but cannot be found")
            if self.pool.ref_count(block) == 0 and not self.pool.is_cached(block) and block in self._prefix_cache:
                raise CacheIntegrityError(f"block {block} is free but can be found")

    def _digests(self, sequence: Sequence, index: int) -> tuple[bytes, bytes]:
        """Parent digest and digest of full block `index`, computing those still unknown."""
        digests = sequence.block_digests
        while len(digests) <= index:
            begin = len(digests) * BLOCK_SIZE
            parent = digests[-1] if digests else root_digest(sequence.group.cache_salt)
            digests.append(chain_digest(parent, encode_tokens(sequence.token_ids[begin : begin + BLOCK_SIZE])))
        return digests[index - 1] if index else root_digest(sequence.group.cache_salt), digests[index]

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
