"""The contract between the engine and whatever runs a ModelSpec."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.models.spec import ModelSpec


class Backend(Protocol):
    """One model, loaded, with its KV cache. Not thread-safe: one caller at a time.

    The promise every backend keeps: the logits of a token depend, to the bit, only on the tokens before it and on
    itself; never on chunking, on what else is in the batch, on which KV blocks were used or on the thread count.
    """

    name: str
    spec: ModelSpec
    threads: int
    """Threads that a forward pass computes with."""
    kv_layout: str
    """What the bytes of a KV block mean: backend, version of its layout and arithmetic, dtype, block size, KV groups.
    Of the same model, bytes read under one layout may be written under an equal one, and only there."""

    def kv_bytes_per_block(self) -> int:
        """Bytes that one KV block takes: 64 tokens in the layers of one KV group (pellucid.models.kv_groups)."""
        ...

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make room for `num_blocks` KV blocks, dropping what was there.

        Raises:
            CapacityError: the memory is not to be had.
        """
        ...

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        """Copy KV blocks in order; `pairs` is int32 [n, 2] of (source, destination)."""
        ...

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        """The bytes of KV blocks: uint8 [n, kv_bytes_per_block], a row for each of `blocks`, int32 [n].

        Raises:
            BackendError: a block does not exist.
        """
        ...

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Put into KV blocks what `read_blocks` gave under the same `kv_layout`.

        Raises:
            BackendError: a block does not exist, or `data` is not uint8 [n, kv_bytes_per_block]; nothing was written.
        """
        ...

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Run the new tokens through every layer, writing their keys and values into the blocks named.

        Raises:
            BackendError: the logits asked for are not finite, or the step failed.
        """
        ...

    def project(self, hidden: NDArray[np.float32], *, normalize: bool = True) -> NDArray[np.float32]:
        """Logits of hidden states by the model's own head, wherever in the model they come from: the logit lens.

        Args:
            hidden: float32 [n, hidden_size]. Of the residual stream after the last layer, the result is what `forward`
                gives, to the bit.
            normalize: whether they go through the final norm first, as the head's input does.

        Returns:
            float32 [n, vocab_size], a row for each; the caller's to keep.

        Raises:
            BackendError: the logits are not finite, or `hidden` has another shape.
        """
        ...

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        """Choose one token a row of `logits` (float32 [num_rows, vocab_size], finite or -inf), which it may overwrite.

        Raises:
            BackendError: a row holds NaN or +inf, or nothing but -inf.
        """
        ...

    def close(self) -> None:
        """Free weights, KV cache and threads. Further calls raise BackendError."""
        ...
