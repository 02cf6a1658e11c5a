"""A backend whose logits are a function of the tokens found in its KV blocks, and of nothing else.

It stores each token in the slot that the block table names and reads the whole context back from there, so a wrong
block table, a missing copy or a false prefix hit changes what it says.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import BLOCK_SIZE, ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.errors import BackendError
from pellucid.decoding import sampler

VOCAB_SIZE = 61
NUM_PATTERNS = 1009


class FakeBackend:
    """Implements `backends.base.Backend`.

    Attributes:
        num_forwards: forward calls so far.
        fail_on: a context that contains this token makes the step fail.
        fail_forwards: numbers of forward calls that fail, whatever they hold.
    """

    name = "fake"
    kv_layout = "fake 1"

    def __init__(self, *, vocab_size: int = VOCAB_SIZE, max_position_embeddings: int = 100_000) -> None:
        self.spec: Any = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=max_position_embeddings)
        self.num_forwards = 0
        self.fail_on: int | None = None
        self.fail_forwards: set[int] = set()
        self.closed = False
        random = np.random.default_rng(0)
        self._patterns = (3 * random.standard_normal((NUM_PATTERNS, vocab_size))).astype(np.float32)
        self._tokens = np.zeros((0, BLOCK_SIZE), np.int32)
        self._positions = np.zeros((0, BLOCK_SIZE), np.int32)

    def kv_bytes_per_block(self) -> int:
        return 1000

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._tokens = np.full((num_blocks, BLOCK_SIZE), -1, np.int32)
        self._positions = np.full((num_blocks, BLOCK_SIZE), -1, np.int32)

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        for source, destination in pairs.tolist():
            self._tokens[destination] = self._tokens[source]
            self._positions[destination] = self._positions[source]

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        self._require_blocks(blocks)
        stored = np.zeros((len(blocks), self.kv_bytes_per_block() // 4), np.int32)
        stored[:, :BLOCK_SIZE], stored[:, BLOCK_SIZE : 2 * BLOCK_SIZE] = self._tokens[blocks], self._positions[blocks]
        return stored.view(np.uint8)

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._require_blocks(blocks)
        if data.dtype != np.uint8 or data.shape != (len(blocks), self.kv_bytes_per_block()):
            raise BackendError(f"{data.dtype} {data.shape} is not {len(blocks)} KV blocks")
        stored = np.ascontiguousarray(data).view(np.int32)
        self._tokens[blocks], self._positions[blocks] = stored[:, :BLOCK_SIZE], stored[:, BLOCK_SIZE : 2 * BLOCK_SIZE]

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._require_open()
        self.num_forwards += 1
        check_batch(batch, len(self._tokens))
        for row in range(batch.num_seqs):
            new = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
            positions = batch.positions[new]
            blocks = batch.block_tables[row, positions // BLOCK_SIZE]
            self._tokens[blocks, positions % BLOCK_SIZE] = batch.input_ids[new]
            self._positions[blocks, positions % BLOCK_SIZE] = positions
        logits = np.stack([self._logits(batch, int(token)) for token in batch.logits_rows] or [self._patterns[0]])
        if self.num_forwards in self.fail_forwards:
            raise BackendError("this forward was told to fail")
        return ForwardOutput(logits[: len(batch.logits_rows)])

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        self._require_open()
        return sampler.sample(logits, sampling)

    def close(self) -> None:
        self.closed = True

    def _logits(self, batch: ForwardBatch, token: int) -> NDArray[np.float32]:
        row = int(np.searchsorted(batch.cu_seqlens, token, side="right")) - 1
        length = int(batch.positions[token]) + 1
        positions = np.arange(length)
        blocks = batch.block_tables[row, positions // BLOCK_SIZE]
        found = self._positions[blocks, positions % BLOCK_SIZE]
        assert (found == positions).all(), f"row {row}: the KV slots hold other positions than the block table says"
        context = self._tokens[blocks, positions % BLOCK_SIZE]
        if self.fail_on is not None and self.fail_on in context:
            raise BackendError(f"token {self.fail_on} makes the logits not finite")
        return self._patterns[crc32(context.tobytes()) % NUM_PATTERNS]

    def _require_blocks(self, blocks: NDArray[np.int32]) -> None:
        if not all(0 <= block < len(self._tokens) for block in blocks.tolist()):
            raise BackendError(f"not all of {blocks} are KV blocks")

    def _require_open(self) -> None:
        if self.closed:
            raise BackendError("this backend is closed")


def check_batch(batch: ForwardBatch, num_blocks: int) -> None:
    """What every backend may rely on."""
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == batch.num_tokens == len(batch.positions)
    assert len(batch.cu_seqlens) == batch.num_seqs + 1 == len(batch.block_tables) + 1
    assert (np.diff(batch.cu_seqlens) > 0).all()
    written: set[tuple[int, int]] = set()
    for row in range(batch.num_seqs):
        positions = batch.positions[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]].tolist()
        assert positions == list(range(positions[0], batch.kv_lens[row]))
        used = -(-int(batch.kv_lens[row]) // BLOCK_SIZE)
        table = batch.block_tables[row]
        assert ((table[:used] >= 0) & (table[:used] < num_blocks)).all()
        assert (table[used:] == -1).all()
        for position in positions:
            slot = (int(table[position // BLOCK_SIZE]), position % BLOCK_SIZE)
            assert slot not in written, f"two sequences write to slot {slot}"
            written.add(slot)
    for array in (batch.input_ids, batch.positions, batch.cu_seqlens, batch.kv_lens, batch.logits_rows):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert batch.block_tables.flags.c_contiguous
