"""Who holds which KV block."""

from __future__ import annotations

from collections import OrderedDict

from pellucid.core.errors import PellucidError


class CacheIntegrityError(PellucidError):
    """The KV cache's books do not balance: a defect of the engine, never of a request."""

    code = "kv_cache_integrity"


class BlockPool:
    """Counts references to `num_blocks` blocks; knows nothing of what is in them.

    A block is exactly one of: free; used (`ref_count > 0`); cached (no reference, but its content is wanted: it waits,
    least recently used first, to be revived by `share` or recycled by `evict`). free + used + cached = num_blocks.

    Every operation is O(1). Misuse raises CacheIntegrityError and changes nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise CacheIntegrityError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: blocks that are warm are taken first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free, or cached and evictable."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[self._checked(block)]

    def is_cached(self, block: int) -> bool:
        """Whether `block` has no reference but is kept for its content."""
        return block in self._cached

    def allocate(self) -> int:
        """Take a free block; its reference count is 1. `evict` first where none is free."""
        if not self._free:
            raise CacheIntegrityError("allocate from a pool without a free block")
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a used block, or revive a cached one."""
        count = self._ref_counts[self._checked(block)]
        if count == 0:
            if block not in self._cached:
                raise CacheIntegrityError(f"share of free block {block}")
            del self._cached[block]
        self._ref_counts[block] = count + 1

    def release(self, block: int, *, keep: bool) -> None:
        """Drop a reference. At the last one the block becomes cached (`keep`), as most recently used, or free."""
        count = self._ref_counts[self._checked(block)]
        if count == 0:
            raise CacheIntegrityError(f"release of block {block}, which nobody holds")
        self._ref_counts[block] = count - 1
        if count == 1:
            if keep:
                self._cached[block] = None
            else:
                self._free.append(block)

    def evict(self) -> int:
        """Make the least recently used cached block free; return it."""
        if not self._cached:
            raise CacheIntegrityError("evict from a pool without a cached block")
        block, _ = self._cached.popitem(last=False)
        self._free.append(block)
        return block

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless every block is in exactly one state. O(num_blocks)."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise CacheIntegrityError("a block is twice in the free list")
        if not free.isdisjoint(self._cached):
            raise CacheIntegrityError("a block is both free and cached")
        used = 0
        for block, count in enumerate(self._ref_counts):
            idle = block in free or block in self._cached
            if count < 0 or (count > 0) == idle:
                raise CacheIntegrityError(f"block {block} has {count} references and is {'idle' if idle else 'lost'}")
            used += count > 0
        if used != self.num_used:
            raise CacheIntegrityError(f"{used} blocks are held, the pool counts {self.num_used}")

    def _checked(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise CacheIntegrityError(f"block {block} is not one of {self.num_blocks}")
        return block
