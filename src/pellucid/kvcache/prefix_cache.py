"""Which blocks already hold the keys and values of a prefix."""

from __future__ import annotations

from array import array

from pellucid.core.batch import BLOCK_SIZE
from pellucid.kvcache.block_pool import CacheIntegrityError


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


class PrefixCache:
    """Full blocks by the chained SHA-256 of all tokens up to their end.

    A hit is taken only if parent digest and tokens are equal to those asked for, so that not even a collision could
    hand one prompt's keys and values to another. Knows nothing of references: the pool does.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, tuple[bytes, bytes, bytes]] = {}  # block -> digest, parent digest, tokens

    def __contains__(self, block: object) -> bool:
        return block in self._entry_of

    def find(self, digest: bytes, parent: bytes, tokens: bytes) -> int | None:
        """The block registered under `digest` with these very `tokens` after `parent`, or None."""
        block = self._block_of.get(digest)
        if block is not None and self._entry_of[block] == (digest, parent, tokens):
            return block
        return None

    def register(self, block: int, digest: bytes, parent: bytes, tokens: bytes) -> bool:
        """Remember a full, computed block. False, and nothing done, if the digest is already taken."""
        if block in self._entry_of:
            raise CacheIntegrityError(f"block {block} is registered twice")
        if digest in self._block_of:
            return False
        self._block_of[digest] = block
        self._entry_of[block] = (digest, parent, tokens)
        return True

    def forget(self, block: int) -> None:
        """Drop a block whose content is about to change."""
        entry = self._entry_of.pop(block, None)
        if entry is None:
            raise CacheIntegrityError(f"block {block} is not registered")
        del self._block_of[entry[0]]

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless digests and blocks are one to one, each with a whole block of tokens."""
        for digest, block in self._block_of.items():
            entry = self._entry_of.get(block)
            if entry is None or entry[0] != digest or len(entry[2]) != 4 * BLOCK_SIZE:
                raise CacheIntegrityError(f"the entry of block {block} does not match its digest")
        if len(self._block_of) != len(self._entry_of):
            raise CacheIntegrityError(f"{len(self._block_of)} digests for {len(self._entry_of)} blocks")
