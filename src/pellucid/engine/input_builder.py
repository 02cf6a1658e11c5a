"""From a plan to the arrays a backend reads."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import replace

import numpy as np

from pellucid.core.batch import SAMPLING_DTYPE, ForwardBatch, SamplingBatch
from pellucid.core.config import num_blocks_for
from pellucid.core.sequence import Sequence


class InputBuilder:
    """Fills one set of arrays again and again, writing only what changed since the last step.

    A batch it returns is valid until the next call.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_groups: int = 1,
        max_draft_tokens: int = 0,
    ) -> None:
        max_num_rows = max_num_seqs + max_draft_tokens
        self._input_ids = np.zeros(max_num_batched_tokens, np.int32)
        self._positions = np.zeros(max_num_batched_tokens, np.int32)
        self._cu_seqlens = np.zeros(max_num_seqs + 1, np.int32)
        self._kv_lens = np.zeros(max_num_seqs, np.int32)
        self._logits_rows = np.zeros(max_num_rows + max_num_batched_tokens, np.int32)
        self._block_tables = np.full((num_groups, max_num_seqs, num_blocks_for(max_model_len)), -1, np.int32)
        self._table_stamps = [0] * max_num_seqs  # what each row of block_tables holds, in all groups
        self._counting = np.arange(max_num_seqs + 1, dtype=np.int32)
        self._decode_batches: dict[int, ForwardBatch] = {}

        self._sampling_rows = np.zeros(max_num_rows, SAMPLING_DTYPE)
        self._sampling_memory = self._sampling_rows.view(np.uint8)
        self._sampled: list[Sequence] = []
        self._look_at_tokens: list[bool] = []
        self._mirostat_rows: list[int] = []
        self._sampling_batch: SamplingBatch | None = None

    def build(self, sequences: list[Sequence], samples: list[Sequence]) -> ForwardBatch:
        """The forward batch of `sequences`, each with its `num_scheduled_tokens` next tokens.

        Logits are asked for at the last token of every sequence that is computed to the end; where its group is yet to
        fork, once for each sibling; and at each of its draft tokens: one row for each of `samples`. After those come
        the rows of each sequence's `scheduled_prompt_positions`.
        """
        num_seqs = len(sequences)
        num_tokens = sum([sequence.num_scheduled_tokens for sequence in sequences])
        self._fill_block_tables(sequences)
        if num_tokens == num_seqs and samples == sequences:  # every sequence decodes
            self._input_ids[:num_seqs] = [sequence.token_ids[-1] for sequence in sequences]
            self._positions[:num_seqs] = [sequence.num_computed_tokens for sequence in sequences]
            np.add(self._positions[:num_seqs], 1, out=self._kv_lens[:num_seqs])
            self._cu_seqlens[: num_seqs + 1] = self._counting[: num_seqs + 1]
            self._logits_rows[:num_seqs] = self._counting[:num_seqs]
            batch = self._decode_batches.get(num_seqs)
            if batch is None:
                batch = self._decode_batches[num_seqs] = self._view(num_seqs, num_seqs, num_seqs)
            return batch
        input_ids: list[int] = []
        positions: list[int] = []
        kv_lens: list[int] = []
        cu_seqlens: list[int] = [0]
        logits_rows: list[int] = []
        prompt_rows: list[int] = []
        for sequence in sequences:
            begin = sequence.num_computed_tokens
            end = begin + sequence.num_scheduled_tokens
            input_ids += sequence.token_ids[begin:end]
            input_ids += sequence.draft_token_ids
            positions += range(begin, end)
            kv_lens.append(end)
            cu_seqlens.append(len(input_ids))
            if end >= len(sequence.token_ids) and sequence.group.pooling_params is None:
                num_drafts = len(sequence.draft_token_ids)
                siblings = 1 if sequence.group.is_forked else len(sequence.group.sequences)
                logits_rows += [len(input_ids) - 1 - num_drafts] * siblings
                logits_rows += range(len(input_ids) - num_drafts, len(input_ids))
            prompt_rows += [cu_seqlens[-2] + position - begin for position in sequence.scheduled_prompt_positions]
        self._input_ids[:num_tokens] = input_ids
        self._positions[:num_tokens] = positions
        self._cu_seqlens[: num_seqs + 1] = cu_seqlens
        self._kv_lens[:num_seqs] = kv_lens
        logits_rows += prompt_rows
        num_logits = len(logits_rows)
        self._logits_rows[:num_logits] = logits_rows
        return self._view(num_tokens, num_seqs, num_logits)

    def build_sampling(self, samples: list[Sequence], draft_offsets: ListLike[int] = ()) -> SamplingBatch:
        """How to choose the next token of each of `samples`; after the first `draft_offsets[row]` of its draft tokens,
        where there are any."""
        num_rows = len(samples)
        if self._sampling_batch is None or samples != self._sampled:
            self._sampling_batch = self._fill_sampling(samples)
            self._sampled = samples
            params = [sequence.group.sampling_params for sequence in samples]
            look_at_tokens = [p.looks_at_tokens for p in params]
            self._look_at_tokens = look_at_tokens if any(look_at_tokens) else []
            self._mirostat_rows = [row for row, p in enumerate(params) if p.mirostat]
        # A sibling yet to be forked stands where the first of its group does: both know the same tokens.
        self._sampling_rows["position"][:num_rows] = [len(sequence.token_ids) for sequence in samples]
        if draft_offsets:
            self._sampling_rows["position"][:num_rows] += np.array(draft_offsets, np.uint32)
        for row in self._mirostat_rows:
            self._sampling_rows["mirostat_mu"][row] = samples[row].mirostat_mu
        if not self._look_at_tokens:
            return self._sampling_batch
        tokens = [
            sequence.token_array(sequence.draft_token_ids) if looks else None
            for sequence, looks in zip(samples, self._look_at_tokens, strict=True)
        ]
        for row, offset in enumerate(draft_offsets):
            if (array := tokens[row]) is not None:
                tokens[row] = array[: len(samples[row].token_ids) + offset]
        return replace(self._sampling_batch, tokens=tokens)

    def _fill_sampling(self, samples: list[Sequence]) -> SamplingBatch:
        """What does not change while `samples` are the same."""
        rows = self._sampling_rows[: len(samples)]
        records = b"".join([sequence.group.sampling_record for sequence in samples])
        self._sampling_memory[: rows.nbytes] = np.frombuffer(records, np.uint8)
        rows["sequence_index"] = [sequence.index for sequence in samples]
        bias = [sequence.group.logit_bias for sequence in samples]
        breakers = [sequence.group.dry_breakers for sequence in samples]
        return SamplingBatch(
            rows,
            bias=bias if any(entry is not None for entry in bias) else None,
            dry_breakers=breakers if any(entry is not None for entry in breakers) else None,
        )

    def _fill_block_tables(self, sequences: list[Sequence]) -> None:
        num_seqs = len(sequences)
        stamps = [sequence.table_stamp for sequence in sequences]
        if stamps == self._table_stamps[:num_seqs]:
            return
        for row, sequence in enumerate(sequences):
            if self._table_stamps[row] != sequence.table_stamp:
                for table, rows in zip(sequence.block_tables, self._block_tables, strict=True):
                    rows[row, : len(table)] = table
                    rows[row, len(table) :] = -1
        self._table_stamps[:num_seqs] = stamps

    def _view(self, num_tokens: int, num_seqs: int, num_logits: int) -> ForwardBatch:
        return ForwardBatch(
            input_ids=self._input_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            cu_seqlens=self._cu_seqlens[: num_seqs + 1],
            kv_lens=self._kv_lens[:num_seqs],
            block_tables=self._block_tables[:, :num_seqs],
            logits_rows=self._logits_rows[:num_logits],
        )
