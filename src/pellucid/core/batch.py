"""What a backend is given for one step, and what it gives back. Explicit plain data, no hidden context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import SequenceCapture, StepCapture
from pellucid.core.sampling_params import SamplingParams


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

    def with_captures(self, wanted: Iterable[SequenceCapture]) -> ForwardBatch:
        """This batch, with `wanted` to be written down too."""
        others, seconds = ((), None) if self.capture is None else (self.capture.sequences, self.capture.seconds)
        return replace(self, capture=StepCapture((*others, *wanted), seconds))


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The answer to one `ForwardBatch`.

    Attributes:
        logits: float32 [num_logits, vocab_size], rows in the order of `logits_rows`. The memory may belong to the
            backend and is valid until its next `forward`; copy what is to be kept.
    """

    logits: NDArray[np.float32]


SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("dynatemp_range", np.float32),
        ("dynatemp_exponent", np.float32),
        ("top_n_sigma", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("epsilon_cutoff", np.float32),
        ("eta_cutoff", np.float32),
        ("xtc_probability", np.float32),
        ("xtc_threshold", np.float32),
        ("mirostat", np.int32),
        ("mirostat_tau", np.float32),
        ("mirostat_eta", np.float32),
        ("mirostat_mu", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("dry_multiplier", np.float32),
        ("dry_base", np.float32),
        ("dry_allowed_length", np.int32),
        ("dry_penalty_last_n", np.int32),
        ("no_repeat_ngram_size", np.int32),
        ("num_prompt_tokens", np.int32),
        ("num_logprobs", np.int32),
        ("processed_logprobs", np.int32),
        ("sequence_index", np.uint32),
        ("position", np.uint32),
        ("seed", np.uint64),
    ],
    align=True,
)
"""How to choose a token, as one record; `SamplingRow` of native/include/sampling.h is the same in C++.

Columns named as fields of `SamplingParams` mean the same. The rest:

- mirostat_mu: what mirostat has come to for this sequence; 2 * mirostat_tau at its start.
- num_prompt_tokens: how many of the row's tokens are the prompt; the others were generated.
- num_logprobs: -1 for none, else how many top alternatives to report besides the chosen token.
- processed_logprobs: 1 to report log-probabilities of the distribution that is drawn from, 0 of the model's own.
- seed: Philox key; sequence_index: index of the sequence within its request (n > 1); position: absolute position of
  the token to be chosen. All three unsigned.
"""

_FROM_PARAMS = [name for name in SAMPLING_DTYPE.names or () if name in SamplingParams.__slots__ and name != "seed"]


def sampling_record(params: SamplingParams, *, seed: int, num_prompt_tokens: int) -> NDArray[np.void]:
    """One record of SAMPLING_DTYPE, [1], that lacks the sequence's index and the position of the token."""
    record = np.zeros(1, SAMPLING_DTYPE)
    for name in _FROM_PARAMS:
        record[name] = getattr(params, name)
    record["mirostat_mu"] = 2 * params.mirostat_tau
    record["num_prompt_tokens"] = num_prompt_tokens
    record["num_logprobs"] = params.num_logprobs
    record["processed_logprobs"] = params.logprobs_mode == "processed"
    record["seed"] = seed
    return record


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to choose the next token of each logits row. Row k's answer depends on entry k of each attribute alone.

    The lists are None where no row has an entry.

    Attributes:
        rows: records [num_rows] of SAMPLING_DTYPE, contiguous.
        tokens: the prompt and the output so far, int32 [num_tokens], of each row whose penalties look at them.
        bias: token ids int32 [n], without repetition, and what is added to their logits, float32 [n].
        masks: uint32 [ceil(vocab_size / 32)]; token t may be chosen where bit t % 32 of word t // 32 is set.
        dry_breakers: token ids int32 [n], ascending, that end a repetition for DRY.
    """

    rows: NDArray[np.void]
    tokens: list[NDArray[np.int32] | None] | None = None
    bias: list[tuple[NDArray[np.int32], NDArray[np.float32]] | None] | None = None
    masks: list[NDArray[np.uint32] | None] | None = None
    dry_breakers: list[NDArray[np.int32] | None] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows)


NOTHING_ALLOWED = -1
"""The token of a row of which the masks leave nothing to choose."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One choice a row.

    Attributes:
        token_ids: int32 [num_rows]; NOTHING_ALLOWED where the masks leave no token, and then nothing else is known.
        logprobs: float32 [num_rows], natural log of the raw softmax (no transforms) at the chosen token, or of the
            final one where the row asked for `processed_logprobs`; NaN where it asked for none.
        top_ids: int32 [num_rows, k] with k the largest `num_logprobs` in the batch, by falling probability in the same
            distribution, padded with -1. Of the final one, only tokens that survived.
        top_logprobs: float32 [num_rows, k], log-probabilities of `top_ids`.
        mirostat_mu: float32 [num_rows], what each row's `mirostat_mu` comes to; None where no row uses mirostat.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    mirostat_mu: NDArray[np.float32] | None = None

    def of_rows(self, rows: list[int]) -> SampledTokens:
        """The choices of some rows."""
        mirostat_mu = None if self.mirostat_mu is None else self.mirostat_mu[rows]
        return SampledTokens(
            self.token_ids[rows], self.logprobs[rows], self.top_ids[rows], self.top_logprobs[rows], mirostat_mu
        )
