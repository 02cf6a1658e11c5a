"""What a backend is given for one step, and what it gives back. Explicit plain data, no hidden context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import StepCapture

BLOCK_SIZE = 64
"""Tokens a KV block holds, of the layers of one KV group (pellucid.models.kv_groups). Attention folds these blocks at
absolute positions (docs/kernels.md)."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step over `num_seqs` sequences with `num_tokens` new tokens in all.

    Attributes:
        input_ids: int32 [num_tokens], the new tokens, sequence after sequence.
        positions: int32 [num_tokens], absolute position of each, from 0.
        cu_seqlens: int32 [num_seqs + 1], where each sequence's new tokens begin in `input_ids`.
        kv_lens: int32 [num_seqs], length of each sequence's context once this step is done.
        block_tables: int32 [num_groups, num_seqs, max_blocks], each row contiguous: the KV blocks of each KV group, by
            absolute block index, padded with -1. What the window of a group has left behind may be -1.
        logits_rows: int32 [num_logits], indices into `input_ids` of the tokens whose logits are wanted.
        layers: int32 [num_layers], rising: the layers to run; the residual stream passes by the others, which write no
            keys and values. None runs all. A batch that leaves out layers captures nothing.
        capture: what else the backend is to write down; None for nothing, which costs nothing.
    """

    input_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    logits_rows: NDArray[np.int32]
    layers: NDArray[np.int32] | None = None
    capture: StepCapture | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_seqs(self) -> int:
        return int(self.kv_lens.shape[0])


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The answer to one `ForwardBatch`.

    Attributes:
        logits: float32 [num_logits, vocab_size], rows in the order of `logits_rows`. The memory may belong to the
            backend and is valid until its next `forward`; copy what is to be kept.
    """

    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to choose the next token of each logits row; arrays are parallel, [num_rows].

    The transforms apply in this order: temperature, top-k, top-p, min-p; then one draw.

    Attributes:
        temperature: float32; 0 means greedy (the highest logit, the lowest id on a tie).
        top_k: int32; 0 keeps all.
        top_p: float32 in (0, 1]; 1 keeps all.
        min_p: float32 in [0, 1]; 0 keeps all.
        seed: uint64, Philox key.
        sequence_index: uint32, index of the sequence within its request (n > 1).
        position: uint32, absolute position of the token to be chosen.
        num_logprobs: int32; -1 for none, else how many top alternatives to report besides the chosen token.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    sequence_index: NDArray[np.uint32]
    position: NDArray[np.uint32]
    num_logprobs: NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        return int(self.temperature.shape[0])


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One choice a row.

    Attributes:
        token_ids: int32 [num_rows].
        logprobs: float32 [num_rows], natural log of the raw softmax (no transforms) at the chosen token; NaN where the
            row asked for none.
        top_ids: int32 [num_rows, k] with k the largest `num_logprobs` in the batch, by falling raw probability,
            padded with -1.
        top_logprobs: float32 [num_rows, k], raw log-probabilities of `top_ids`.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
