"""A backend whose logits are a function of what is found in its KV blocks, and of nothing else.

It stores each token, with a hash of all up to it, in the slot that each KV group's block table names, and reads what
the group's window shows back from there, so a wrong block table, a missing copy, a false prefix hit or a block given
back too early changes what it says. What a batch that leaves out layers writes is marked, and must not be read by one
that runs all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import BackendError
from pellucid.core.kv_windows import first_visible_block
from pellucid.decoding import sampler
from pellucid.models.kv_groups import kv_windows
from pellucid.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

VOCAB_SIZE = 61
NUM_PATTERNS = 1009
SKIPPED = -(2**31)
"""Marks the hash of a prefix that was written by a batch that leaves out layers."""


class FakeBackend:
    """Implements `backends.base.Backend`.

    Args:
        windows: the attention window of each layer, which make a KV group each.

    Attributes:
        windows: those of the KV groups, in their order.
        num_forwards: forward calls so far.
        fail_on: a context that contains this token makes the step fail.
        fail_forwards: numbers of forward calls that fail, whatever they hold.
    """

    name = "fake"
    threads = 1
    kv_layout = "fake 1"

    def __init__(
        self,
        *,
        vocab_size: int = VOCAB_SIZE,
        max_position_embeddings: int = 100_000,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.spec = fake_spec(vocab_size, max_position_embeddings, windows)
        self.windows = kv_windows(self.spec)
        self.num_forwards = 0
        self.fail_on: int | None = None
        self.fail_forwards: set[int] = set()
        self.closed = False
        random = np.random.default_rng(0)
        self._patterns = (3 * random.standard_normal((NUM_PATTERNS, vocab_size))).astype(np.float32)
        self.allocate_kv_cache(0)

    def kv_bytes_per_block(self) -> int:
        return 1000

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._slots = np.full((num_blocks, 3, BLOCK_SIZE), -1, np.int32)  # token, position, hash of the prefix
        self._tokens, self._positions, self._prefixes = self._slots.swapaxes(0, 1)

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        for source, destination in pairs.tolist():
            self._slots[destination] = self._slots[source]

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        self._require_blocks(blocks)
        stored = np.zeros((len(blocks), self.kv_bytes_per_block() // 4), np.int32)
        stored[:, : 3 * BLOCK_SIZE] = self._slots[blocks].reshape(len(blocks), 3 * BLOCK_SIZE)
        return stored.view(np.uint8)

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._require_blocks(blocks)
        if data.dtype != np.uint8 or data.shape != (len(blocks), self.kv_bytes_per_block()):
            raise BackendError(f"{data.dtype} {data.shape} is not {len(blocks)} KV blocks")
        stored = np.ascontiguousarray(data).view(np.int32)
        self._slots[blocks] = stored[:, : 3 * BLOCK_SIZE].reshape(len(blocks), 3, BLOCK_SIZE)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._require_open()
        self.num_forwards += 1
        check_batch(batch, len(self._slots), self.windows)
        for row in range(batch.num_seqs):
            new = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
            positions, tokens = batch.positions[new], batch.input_ids[new]
            prefix = self._prefix_before(batch, row, int(positions[0]))
            prefixes = [prefix := crc32(token, prefix) & 0x7FFFFFFF for token in tokens[:, None]]
            if batch.layers is not None:
                prefixes = [value | SKIPPED for value in prefixes]
            for table in batch.block_tables[:, row]:
                blocks = table[positions // BLOCK_SIZE]
                self._tokens[blocks, positions % BLOCK_SIZE] = tokens
                self._positions[blocks, positions % BLOCK_SIZE] = positions
                self._prefixes[blocks, positions % BLOCK_SIZE] = prefixes
        logits = np.stack([self._logits(batch, int(token)) for token in batch.logits_rows] or [self._patterns[0]])
        for wanted in () if batch.capture is None else batch.capture.sequences:
            for index, token in enumerate(wanted.tokens.tolist()):
                context = self._context(batch, token)
                wanted.residual[:, index] = [self._hidden(context, point) for point in wanted.residual_points.tolist()]
        if self.num_forwards in self.fail_forwards:
            raise BackendError("this forward was told to fail")
        return ForwardOutput(logits[: len(batch.logits_rows)])

    def project(self, hidden: NDArray[np.float32], *, normalize: bool = True) -> NDArray[np.float32]:
        self._require_open()
        patterns = [self._patterns[crc32(row.tobytes(), normalize) % NUM_PATTERNS] for row in hidden]
        return np.array(patterns, np.float32).reshape(len(hidden), self.spec.vocab_size)

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        self._require_open()
        return sampler.sample(logits, sampling)

    def close(self) -> None:
        self.closed = True

    def _prefix_before(self, batch: ForwardBatch, row: int, position: int) -> int:
        """The hash that the slots before `position` hold, in every group that still sees them."""
        if position == 0:
            return 0
        index, offset = divmod(position - 1, BLOCK_SIZE)
        found = {
            int(self._read_prefixes(batch, table[index], offset))
            for table, window in zip(batch.block_tables[:, row], self.windows, strict=True)
            if window is None or window > 1
        }
        assert len(found) == 1, f"row {row}: the KV groups hold other prefixes at {position - 1}: {found}"
        return found.pop()

    def _hidden(self, context: int, point: int) -> NDArray[np.float32]:
        random = np.random.default_rng(crc32(b"%d" % point, context))
        return random.standard_normal(self.spec.hidden_size).astype(np.float32)

    def _logits(self, batch: ForwardBatch, token: int) -> NDArray[np.float32]:
        context = self._context(batch, token)
        logits = self._patterns[context % NUM_PATTERNS]
        if batch.layers is None:
            return logits
        return logits + np.float32(0.3) * self._patterns[crc32(batch.layers, context) % NUM_PATTERNS]

    def _context(self, batch: ForwardBatch, token: int) -> int:
        """A hash of what the KV slots hold of all that `token` sees."""
        row = int(np.searchsorted(batch.cu_seqlens, token, side="right")) - 1
        position = int(batch.positions[token])
        context = 0
        for table, window in zip(batch.block_tables[:, row], self.windows, strict=True):
            positions = np.arange(0 if window is None else max(0, position - window + 1), position + 1)
            blocks, offsets = table[positions // BLOCK_SIZE], positions % BLOCK_SIZE
            found = self._positions[blocks, offsets]
            assert (found == positions).all(), f"row {row}: the KV slots hold other positions than the block table says"
            if self.fail_on is not None and self.fail_on in self._tokens[blocks, offsets]:
                raise BackendError(f"token {self.fail_on} makes the logits not finite")
            context = crc32(self._read_prefixes(batch, blocks, offsets).tobytes(), context)
        return context

    def _read_prefixes(self, batch: ForwardBatch, blocks: Any, offsets: Any) -> NDArray[np.int32]:
        prefixes = self._prefixes[blocks, offsets]
        if batch.layers is not None:
            return prefixes & ~np.int32(SKIPPED)
        empty = prefixes == -1
        assert (empty | (prefixes >= 0)).all(), "what a batch that leaves out layers wrote is read by one that runs all"
        return prefixes

    def _require_blocks(self, blocks: NDArray[np.int32]) -> None:
        if not all(0 <= block < len(self._slots) for block in blocks.tolist()):
            raise BackendError(f"not all of {blocks} are KV blocks")

    def _require_open(self) -> None:
        if self.closed:
            raise BackendError("this backend is closed")


def fake_spec(vocab_size: int, max_position_embeddings: int, windows: Sequence[int | None]) -> ModelSpec:
    """A model with a layer of each of `windows`, alike in all else."""
    norm, rope = NormSpec(1e-6), RopeSpec((1.0,))
    attentions = [AttentionSpec(1, 1, 2, 1.0, rope, sliding_window=window) for window in windows]
    return ModelSpec(
        architecture="fake",
        vocab_size=vocab_size,
        hidden_size=2,
        max_position_embeddings=max_position_embeddings,
        layers=tuple(LayerSpec(norm, attention, None, norm, MlpSpec(2, "silu"), None) for attention in attentions),
        final_norm=norm,
        tie_word_embeddings=True,
    )


def check_batch(batch: ForwardBatch, num_blocks: int, windows: Sequence[int | None]) -> None:
    """What every backend may rely on."""
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == batch.num_tokens == len(batch.positions)
    assert len(batch.cu_seqlens) == batch.num_seqs + 1
    assert batch.block_tables.shape[:2] == (len(windows), batch.num_seqs)
    assert (np.diff(batch.cu_seqlens) > 0).all()
    written: set[tuple[int, int]] = set()
    for row in range(batch.num_seqs):
        positions = batch.positions[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]].tolist()
        assert positions == list(range(positions[0], batch.kv_lens[row]))
        used = -(-int(batch.kv_lens[row]) // BLOCK_SIZE)
        for table, window in zip(batch.block_tables[:, row], windows, strict=True):
            visible = table[first_visible_block(positions[0], window) : used]
            assert ((visible >= 0) & (visible < num_blocks)).all()
            assert ((table >= -1) & (table < num_blocks)).all()
            assert (table[used:] == -1).all()
            for position in positions:
                slot = (int(table[position // BLOCK_SIZE]), position % BLOCK_SIZE)
                assert slot not in written, f"slot {slot} is written to twice"
                written.add(slot)
    for array in (batch.input_ids, batch.positions, batch.cu_seqlens, batch.kv_lens, batch.logits_rows):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert batch.block_tables.dtype == np.int32
    assert batch.block_tables.strides[2] == 4
    if batch.layers is not None:
        assert batch.layers.dtype == np.int32
        assert (np.diff([-1, *batch.layers, len(windows)]) > 0).all()
