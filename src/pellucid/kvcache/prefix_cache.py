"""Which blocks already hold the keys and values of a prefix."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from pellucid.core.config import BLOCK_SIZE
from pellucid.core.kv_windows import first_visible_block
from pellucid.kvcache.block_pool import CacheIntegrityError

MIN_PARTIAL_TOKENS = 16
"""Fewer tokens of a block are neither kept nor copied: the matmul kernels compute up to 16 tokens at a time, so that
they would save little, and a block that is kept for them takes the room of one that has 64."""

MAX_CHILDREN = 8
"""Most blocks after one prefix that `PrefixCache.match_partial` compares, the most recent ones."""


def encode_tokens(token_ids: list[int]) -> bytes:
    """Token ids as the bytes that are hashed and compared."""
    return array("i", token_ids).tobytes()


def chain_digest(parent: bytes, tokens: bytes) -> bytes:
    """Digest of a block whose predecessor has digest `parent`: it stands for the whole prefix, not just the block."""
    return _sha256(parent + tokens)


def root_digest(salt: bytes) -> bytes:
    """The parent of the first block. Requests of different salts share nothing."""
    return _sha256(b"pellucid prefix cache\0" + salt)


def _sha256(data: bytes) -> bytes:
    from hashlib import sha256  # loads OpenSSL, 10 ms and 3 MB that a short prompt can do without

    return sha256(data).digest()


class BlockKey(NamedTuple):
    """What a block is found by: the chained digests of its end and of its predecessor's, and its tokens: 64, or fewer
    where it is partly filled, as the last of a sequence."""

    digest: bytes
    parent: bytes
    tokens: bytes


class PartialMatch(NamedTuple):
    """The blocks, one of each KV group, whose first `num_tokens` tokens are those asked for."""

    num_tokens: int
    blocks: list[int]


class PrefixCache:
    """Blocks of each KV group by the chained SHA-256 of all tokens up to their end.

    A hit is taken only if parent digest and tokens are equal to those asked for, so that not even a collision could
    hand one prompt's keys and values to another. Knows nothing of references: the pool does.
    """

    def __init__(self) -> None:
        self._block_of: dict[tuple[int, bytes], int] = {}  # KV group, digest
        self._entry_of: dict[int, tuple[int, BlockKey]] = {}  # block -> KV group, key
        # Of each parent, by digest: what goes on after it, the most recent last.
        self._children: dict[bytes, dict[bytes, BlockKey]] = {}

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, block: object) -> bool:
        return block in self._entry_of

    def group_of(self, block: int) -> int | None:
        """The KV group that `block` is registered for, or None."""
        entry = self._entry_of.get(block)
        return None if entry is None else entry[0]

    def is_partial(self, block: int) -> bool:
        """Whether `block` is registered as partly filled."""
        entry = self._entry_of.get(block)
        return entry is not None and len(entry[1].tokens) < 4 * BLOCK_SIZE

    def find(self, group: int, key: BlockKey) -> int | None:
        """The block of `group` registered under this very `key`, or None."""
        block = self._block_of.get((group, key.digest))
        if block is not None and self._entry_of[block] == (group, key):
            return block
        return None

    def match(self, windows: Sequence[int | None], keys: Iterable[BlockKey]) -> list[list[int]]:
        """The blocks of the longest known prefix of `keys`, for KV groups of these `windows`.

        A prefix of L blocks is known if every group without a window has all of them, and every other those that the
        token after the prefix still sees. No block is looked up twice.

        Returns:
            A table of L entries for each group, -1 for what its window has left behind.
        """
        tables: list[list[int]] = [[] for _ in windows]
        unlimited = [group for group, window in enumerate(windows) if window is None]
        known: list[BlockKey] = []
        for key in keys:
            blocks = [block for group in unlimited if (block := self.find(group, key)) is not None]
            if len(blocks) < len(unlimited):
                break
            known.append(key)
            for group, block in zip(unlimited, blocks, strict=True):
                tables[group].append(block)
        if len(unlimited) < len(windows):
            self._match_windows(windows, known, tables)
        return tables

    def _match_windows(self, windows: Sequence[int | None], known: list[BlockKey], tables: list[list[int]]) -> None:
        """Fill in the tables of the groups with a window, and shorten all to what every one of them has.

        Each group goes from the end of the prefix back to what the window still shows. A block that is missing there
        is missing for every shorter prefix that it is part of, so that the prefix ends before it.
        """
        length = len(known)
        limited = [(group, window) for group, window in enumerate(windows) if window is not None]
        firsts = dict.fromkeys((group for group, _ in limited), length)  # from where on blocks were found
        for group, _ in limited:
            tables[group] = [-1] * length
        behind = True
        while behind:
            behind = False
            for group, window in limited:
                first = first_visible_block(length * BLOCK_SIZE, window)
                index = min(firsts[group], length)
                while index > first:
                    block = self.find(group, known[index - 1])
                    index -= 1
                    if block is None:
                        length = index
                        first = first_visible_block(length * BLOCK_SIZE, window)
                        behind = True
                    else:
                        tables[group][index] = block
                firsts[group] = index
        for table in tables:
            del table[length:]

    def match_partial(self, num_groups: int, parent: bytes, tokens: bytes) -> PartialMatch | None:
        """Blocks after the prefix `parent` that begin with the longest part of `tokens`, at least MIN_PARTIAL_TOKENS of
        them, and are there in all groups; None without any.

        Of blocks after the same prefix only the MAX_CHILDREN most recent are compared, however many there are.
        """
        best: PartialMatch | None = None
        most = MIN_PARTIAL_TOKENS - 1
        children = self._children.get(parent, {})
        for key in reversed(children.values()):
            num_tokens = _num_common_tokens(key.tokens, tokens)
            if num_tokens > most:
                blocks = [block for group in range(num_groups) if (block := self.find(group, key)) is not None]
                if len(blocks) == num_groups:
                    best, most = PartialMatch(num_tokens, blocks), num_tokens
        return best

    def register(self, block: int, group: int, key: BlockKey) -> bool:
        """Remember a computed block. False, and nothing done, if the group has one of this digest already."""
        if block in self._entry_of:
            raise CacheIntegrityError(f"block {block} is registered twice")
        if (group, key.digest) in self._block_of:
            return False
        self._block_of[group, key.digest] = block
        self._entry_of[block] = (group, key)
        children = self._children.setdefault(key.parent, {})
        children.pop(key.digest, None)
        children[key.digest] = key
        if len(children) > MAX_CHILDREN:
            del children[next(iter(children))]
        return True

    def forget(self, block: int) -> None:
        """Drop a block whose content is about to change."""
        entry = self._entry_of.pop(block, None)
        if entry is None:
            raise CacheIntegrityError(f"block {block} is not registered")
        group, key = entry
        del self._block_of[group, key.digest]
        children = self._children.get(key.parent, {})
        if children.pop(key.digest, None) is not None and not children:
            del self._children[key.parent]

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless digests and blocks are one to one, each with as many tokens as are kept,
        and what is listed after a prefix is registered."""
        for (group, digest), block in self._block_of.items():
            entry = self._entry_of.get(block)
            if (
                entry is None
                or (entry[0], entry[1].digest) != (group, digest)
                or not MIN_PARTIAL_TOKENS <= len(entry[1].tokens) / 4 <= BLOCK_SIZE
            ):
                raise CacheIntegrityError(f"the entry of block {block} does not match its digest")
        if len(self._block_of) != len(self._entry_of):
            raise CacheIntegrityError(f"{len(self._block_of)} digests for {len(self._entry_of)} blocks")
        registered = {key.digest: key for _, key in self._entry_of.values()}
        for parent, children in self._children.items():
            if not 0 < len(children) <= MAX_CHILDREN:
                raise CacheIntegrityError(f"{len(children)} blocks are listed after a prefix")
            for digest, key in children.items():
                if key.parent != parent or key.digest != digest or registered.get(digest) != key:
                    raise CacheIntegrityError("a block that is listed after a prefix is not registered")


def _num_common_tokens(left: bytes, right: bytes) -> int:
    """How many tokens two encoded lists of them begin with in common."""
    pairs = zip(memoryview(left).cast("i"), memoryview(right).cast("i"), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
