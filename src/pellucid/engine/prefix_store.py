"""Prefixes to disk and back into the prefix cache (the file: pellucid.kvcache.saved_prefix)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import CapacityError, ContextLengthError, InvalidRequestError, PrefixFileError
from pellucid.core.kv_windows import first_visible_block
from pellucid.core.sequence import Sequence
from pellucid.engine.llm_engine import LLMEngine
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.kvcache.prefix_cache import root_digest
from pellucid.kvcache.saved_prefix import Messages, PrefixFile, SavedPrefix, write_prefix
from pellucid.weights.file_hash import file_hash

_CHUNK_BYTES = 16 << 20  # of KV blocks in memory at once


@dataclass(frozen=True, slots=True)
class PrefixToSave:
    """A prefix on its way to disk.

    Attributes:
        token_ids: all of it.
        num_blocks: how many of its KV blocks are to be saved, all that are full or none.
        messages: the conversation that it is, or None.
        cache_salt: under which it is cached.
        sequence: stands for the full blocks; holds nothing between two calls.
    """

    token_ids: list[int]
    num_blocks: int
    messages: Messages | None
    cache_salt: bytes
    sequence: Sequence


class PrefixStore:
    """Saves prefixes as the engine computes them, and puts saved ones where requests find them.

    Methods are called between two steps, and hold no block from one call to the next.
    """

    def __init__(self, engine: LLMEngine, backend: Backend, model_path: Path, model_status: os.stat_result) -> None:
        """
        Args:
            model_path: the model file that `backend` runs.
            model_status: of that file, as it was opened.
        """
        self._engine = engine
        self._backend = backend
        self._model_path = model_path
        self._model_status = model_status
        self._model_sha256: str | None = None

    @property
    def _cache(self) -> CacheManager:
        return self._engine.scheduler.cache  # another one once the engine has failed and begun anew

    def model_sha256(self) -> str:
        """SHA-256 of the model file, in hexadecimal. The first call may read all of it (`file_hash`).

        Raises:
            ModelFileError: it was changed before that first call.
        """
        if self._model_sha256 is None:
            self._model_sha256 = file_hash(self._model_path, self._model_status)
        return self._model_sha256

    def begin(
        self,
        token_ids: list[int],
        *,
        messages: Messages | None = None,
        cache_salt: bytes = b"",
        include_kv: bool = True,
    ) -> PrefixToSave:
        """Begin to save a prefix; computes nothing.

        Args:
            token_ids: in the vocabulary.
            messages: the conversation that they are, to be kept with them.
            cache_salt: as in the requests that computed it.
            include_kv: save the keys and values of the full blocks too.

        Raises:
            InvalidRequestError: the engine has no prefix cache.
            ContextLengthError: there are more tokens than a request may have, and keys and values are wanted.
        """
        self._require_prefix_cache()
        if include_kv:
            self._require_context(len(token_ids), "the prefix")
        num_blocks = len(token_ids) // BLOCK_SIZE if include_kv else 0
        return PrefixToSave(
            token_ids, num_blocks, messages, cache_salt, self._sequence(token_ids, num_blocks, cache_salt)
        )

    def advance(self, saving: PrefixToSave) -> bool:
        """Compute of the blocks to be saved what is not cached, up to about a step's tokens; True when all are cached.

        Running sequences give way where their blocks are needed.

        Raises:
            CapacityError: there are not enough KV blocks.
            BackendError: the backend failed.
        """
        sequence, end = saving.sequence, saving.num_blocks * BLOCK_SIZE
        self._cache.adopt(sequence, self._cache.match(sequence))
        try:
            if sequence.num_computed_tokens < end:
                num_blocks = max(1, self._engine.scheduler.config.max_num_batched_tokens // BLOCK_SIZE)
                piece_end = min(end, sequence.num_computed_tokens + num_blocks * BLOCK_SIZE)
                for _ in self._engine.alone.compute(sequence, piece_end):
                    self._cache.commit(sequence)
            return sequence.num_computed_tokens == end
        finally:
            self._cache.free(sequence)

    def write(self, saving: PrefixToSave, path: Path) -> int:
        """Write the file, right after `advance` has returned True.

        Returns:
            Tokens whose keys and values it holds.

        Raises:
            StorageError: it cannot be written; one that was there is as it was.
            InvalidRequestError: the messages are not JSON.
            ModelFileError: the model file has been changed.
        """
        sequence, num_tokens = saving.sequence, saving.num_blocks * BLOCK_SIZE
        first_blocks = self._first_blocks(saving.num_blocks)
        name = self._model_path.name
        prefix = SavedPrefix(
            model_name=name if name.isprintable() else ascii(name),
            model_sha256=self.model_sha256(),
            kv_layout=self._backend.kv_layout,
            bytes_per_block=self._backend.kv_bytes_per_block(),
            root_digest=root_digest(saving.cache_salt).hex(),
            token_ids=saving.token_ids,
            num_blocks=saving.num_blocks,
            first_blocks=first_blocks,
            messages=saving.messages,
        )
        self._cache.adopt(sequence, self._cache.match(sequence))
        try:
            if sequence.num_computed_tokens != num_tokens:
                raise RuntimeError(f"{sequence} is to be saved, but not all of it is cached")
            tables = zip(sequence.block_tables, first_blocks, strict=True)
            write_prefix(path, prefix, self._read([block for table, first in tables for block in table[first:]]))
        finally:
            self._cache.free(sequence)
        return num_tokens

    def load(self, path: Path, *, cache_salt: bytes = b"") -> int:
        """Put the blocks of a saved prefix into the prefix cache, as a request leaves them there: found by requests
        that begin alike, and evicted, least recently used first, when their room is needed. What is cached already
        stays as it is. No request gives way.

        Returns:
            Tokens whose keys and values the file holds.

        Raises:
            PrefixFileError: the file is malformed or damaged, or was saved with another model, KV layout or salt;
                nothing of it is cached.
            ContextLengthError: the prefix is longer than a request may be.
            CapacityError: too many KV blocks are in use.
            InvalidRequestError: the engine has no prefix cache.
            ModelFileError: the model file has been changed.
        """
        self._require_prefix_cache()
        with PrefixFile.open(path) as file:
            prefix = file.prefix
            self._require_fit(path, prefix, cache_salt)
            sequence = self._sequence(prefix.token_ids, prefix.num_blocks, cache_salt)
            places = self._cache.reserve(sequence, prefix.num_blocks)
            if places is None:
                raise self._no_room(path, prefix)
            try:
                self._fill(np.array(places, np.int32), file.blocks())
                sequence.num_computed_tokens = prefix.num_blocks * BLOCK_SIZE
                self._cache.commit(sequence)
            finally:
                self._cache.free(sequence)
        return prefix.num_blocks * BLOCK_SIZE

    def _sequence(self, token_ids: list[int], num_blocks: int, cache_salt: bytes) -> Sequence:
        """The full blocks, and a token in place of whatever comes after them: a match leaves out the last."""
        return self._engine.alone.sequence([*token_ids[: num_blocks * BLOCK_SIZE], 0], cache_salt=cache_salt)

    def _first_blocks(self, num_blocks: int) -> list[int]:
        """Of each KV group, the first block that a token after `num_blocks` blocks sees."""
        return [first_visible_block(num_blocks * BLOCK_SIZE, window) for window in self._cache.windows]

    def _read(self, blocks: list[int]) -> Iterator[NDArray[np.uint8]]:
        count = max(1, _CHUNK_BYTES // self._backend.kv_bytes_per_block())
        for start in range(0, len(blocks), count):
            yield self._backend.read_blocks(np.array(blocks[start : start + count], np.int32))

    def _fill(self, places: NDArray[np.int32], chunks: Iterator[NDArray[np.uint8]]) -> None:
        """Write each block to its place; one whose place is negative is only read."""
        start = 0
        for chunk in chunks:
            own = places[start : start + len(chunk)]
            self._backend.write_blocks(own[own >= 0], chunk[own >= 0])
            start += len(chunk)

    def _require_prefix_cache(self) -> None:
        if not self._cache.has_prefix_cache:
            raise InvalidRequestError(
                "a saved prefix goes through the prefix cache, which is off: use enable_prefix_caching=True",
                param="enable_prefix_caching",
            )

    def _require_context(self, num_tokens: int, what: str) -> None:
        if num_tokens >= self._engine.max_model_len:
            raise ContextLengthError(
                f"{what} has {num_tokens} tokens and needs room for one more, but the context holds "
                f"{self._engine.max_model_len}: set a larger max_model_len, or kv_cache_memory where that limits it",
                param="max_model_len",
            )

    def _require_fit(self, path: Path, prefix: SavedPrefix, cache_salt: bytes) -> None:
        """Raises PrefixFileError or ContextLengthError unless the blocks mean here what they meant where they were
        computed."""
        model_sha256 = self.model_sha256()
        if prefix.model_sha256 != model_sha256:
            raise PrefixFileError(
                f"{path} was saved with {prefix.model_name} (SHA-256 {prefix.model_sha256[:12]}...), but this model is "
                f"{self._model_path.name} ({model_sha256[:12]}...): load it with that model, or save the prefix again",
                param="model",
            )
        if prefix.kv_layout != self._backend.kv_layout:
            raise PrefixFileError(
                f"{path} was saved in the KV layout '{prefix.kv_layout}', but this model runs with "
                f"'{self._backend.kv_layout}': load the model as it was then, or save the prefix again",
                param="kv_layout",
            )
        if prefix.root_digest != root_digest(cache_salt).hex():
            raise PrefixFileError(f"{path} was saved under another cache salt: load it under that", param="cache_salt")
        own = {
            "bytes_per_block": self._backend.kv_bytes_per_block(),
            "first_blocks": self._first_blocks(prefix.num_blocks),
        }
        for name, value in own.items():
            if getattr(prefix, name) != value:
                raise PrefixFileError(
                    f"{path}: {name} is {getattr(prefix, name)}, this model has {value}: the file was tampered with",
                    param=name,
                )
        vocab_size = self._backend.spec.vocab_size
        if any(token_id >= vocab_size for token_id in prefix.token_ids):
            raise PrefixFileError(
                f"{path}: a token id is {max(prefix.token_ids)}, but the vocabulary has ids 0 to {vocab_size - 1}: the "
                "file was tampered with",
                param="token_ids",
            )
        self._require_context(len(prefix.token_ids), str(path))

    def _no_room(self, path: Path, prefix: SavedPrefix) -> CapacityError:
        pool = self._cache.pool
        return CapacityError(
            f"{path} has {prefix.num_blocks * BLOCK_SIZE} tokens in {prefix.num_stored_blocks} KV blocks, but "
            f"{pool.num_used} of {pool.num_blocks} are in use by running requests: load it when they are done, or set "
            "a larger kv_cache_memory",
            param="kv_cache_memory",
        )
