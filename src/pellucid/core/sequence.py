"""A request as the engine carries it: a group of sequences that share a prompt."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import sampling_record
from pellucid.core.errors import PellucidError
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import FinishReason, Logprob
from pellucid.core.pooling_params import PoolingParams
from pellucid.core.sampling_params import SamplingParams


class SequenceStatus(Enum):
    PENDING = "pending"
    """Computes nothing: the first sequence of its group computes for it what they share, and it is forked then; or its
    lockstep group goes on without it."""
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    """Is not computed until it is resumed; keeps its KV blocks until somebody else needs them."""
    FINISHED = "finished"


class Sequence:
    """One continuation of one prompt.

    There is no prefill or decode state: tokens `[num_computed_tokens, num_tokens)` are still to be computed, and a
    sequence whose last token is computed in a step has its next token chosen in that step.

    Attributes:
        token_ids: the prompt and every token generated.
        num_computed_tokens: how many of them have their keys and values in the KV cache.
        num_scheduled_tokens: how many more the current step computes, draft tokens included.
        draft_token_ids: what the current step computes beyond `token_ids`, in the guess that it comes next; empty
            between steps.
        block_tables: KV blocks of each KV group, by absolute block index, all of one length; -1 where a block was given
            back because the group's window has left it behind. Empty where the sequence holds nothing.
        first_blocks: index of the first block that each table still has.
        block_digests: chained digests of the full blocks of `token_ids`, as far as computed (pellucid.kvcache).
        num_writable_tokens: up to which of its tokens the next ones can be computed with no more said to the KV cache:
            their blocks are there, and nobody else reads them.
        num_registered_blocks: blocks of each table, from the first on, that the prefix cache was told of.
        table_stamp: changes whenever `block_tables` do; no two states of any sequences share one.
        max_length: number of tokens at which the sequence ends with "length".
        logprobs: one dictionary a generated token, or None.
        cumulative_logprob: sum of the log-probabilities of the tokens generated; None where they are not computed.
        token_times: when each token generated came, in seconds on the engine's clock.
        mirostat_mu: what mirostat has come to; given to each draw and taken back from it.
        num_buffered_tokens: how many of `token_ids` `token_array` need not look at again; whoever changes any but by
            appending lowers it.
    """

    __slots__ = (
        "_token_buffer",
        "block_digests",
        "block_tables",
        "cumulative_logprob",
        "draft_token_ids",
        "error",
        "finish_reason",
        "first_blocks",
        "group",
        "index",
        "logprobs",
        "max_length",
        "mirostat_mu",
        "num_buffered_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_scheduled_tokens",
        "num_writable_tokens",
        "order",
        "status",
        "stop_reason",
        "table_stamp",
        "token_ids",
        "token_times",
    )

    def __init__(self, group: SequenceGroup, index: int, max_length: int) -> None:
        self.group = group
        self.index = index
        self.order = (group.priority, group.arrival_number, index)
        self.token_ids = list(group.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.draft_token_ids: list[int] = []
        self.block_tables: list[list[int]] = []
        self.first_blocks: list[int] = []
        self.block_digests: list[bytes] = []
        self.num_writable_tokens = 0
        self.num_registered_blocks = 0
        self.table_stamp = 0
        self.max_length = max_length
        self.status = SequenceStatus.PENDING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: PellucidError | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None if group.sampling_params.logprobs is None else []
        self.cumulative_logprob: float | None = None if group.sampling_params.num_logprobs < 0 else 0.0
        self.token_times: list[float] = []
        self.mirostat_mu = 2 * group.sampling_params.mirostat_tau
        self.num_buffered_tokens = 0
        self._token_buffer = np.empty(0, np.int32)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks that it holds, of all groups."""
        return sum(map(len, self.block_tables)) - sum(self.first_blocks)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def token_array(self, draft_token_ids: ListLike[int] = ()) -> NDArray[np.int32]:
        """`token_ids` and then `draft_token_ids` as int32 [n]: a view of a buffer that the next call overwrites."""
        first, end = self.num_buffered_tokens, len(self.token_ids)
        length = end + len(draft_token_ids)
        if length > len(self._token_buffer):
            buffer = np.empty(2 * length, np.int32)
            buffer[:first] = self._token_buffer[:first]
            self._token_buffer = buffer
        self._token_buffer[first:end] = self.token_ids[first:]
        self._token_buffer[end:length] = draft_token_ids
        self.num_buffered_tokens = end
        return self._token_buffer[:length]

    @property
    def scheduled_prompt_positions(self) -> range:
        """Of the tokens that the current step computes, those after which a token of the prompt comes whose
        log-probability is wanted and not known yet."""
        known = self.group.prompt_logprobs
        if known is None or self.index:  # the first computes the prompt; others may have another one
            return range(0)
        end = min(self.num_computed_tokens + self.num_scheduled_tokens, self.num_prompt_tokens - 1)
        return range(max(self.num_computed_tokens, len(known)), end)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.group.request_id}/{self.index}, {self.status.value}, tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, blocks={self.num_blocks})"
        )


class SequenceGroup:
    """One request: `n` sequences, or `best_of`, the first of which computes the prompt for all.

    Or a lockstep group: up to `num_lockstep` sequences that a search (pellucid.engine.search) lets go on together. The
    last tokens of those that are `live` are computed in one step, after which it says what comes next. The group keeps
    places in the batch for all from the start. After a preemption its lead stands for all again, until the whole blocks
    that they have in common are computed.

    Attributes:
        is_lockstep: which of the two it is.
        live: the sequences of a lockstep group that go on, in the order of its search; the others hold nothing.
        lead_token_ids: tokens of the lead while it computes for all and has only those they share, and one more; else
            None.
        seed: key of every draw of the request; the sequence's index and the token's position make the rest.
        sampling_record: how its tokens are chosen: the bytes of a record of SAMPLING_DTYPE, which lacks the sequence's
            index, the token's position and mirostat's state.
        logit_bias: token ids int32 [n] and what is added to their logits, float32 [n]; None for nothing.
        dry_breakers: token ids int32 [n], ascending, that end a repetition for DRY; None for none.
        stop_token_ids: token ids that end a sequence, end-of-sequence tokens included unless ignored.
        eos_token_ids: the end-of-sequence tokens among them.
        priority: lower runs first; equal ones in order of arrival.
        arrival_number: counts requests in order of arrival.
        cache_salt: prefix-cache entries are shared only between requests of the same salt.
        stream: whether each token is reported as it comes.
        max_cached_tokens: most tokens that may come from the prefix cache, since something is wanted of the later ones
            that only computing gives; None for no limit.
        is_drafted: whether tokens of its sequences may be guessed ahead.
        is_forked: whether each sequence goes its own way; until then the first, or the lead, stands for all. Never
            where the prompt is pooled.
        pooling_params: how its prompt is pooled, of a request that generates nothing; else None.
        prompt_logprobs: what is known of the tokens of the prompt after the first, so far; None if nothing is wanted.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
        num_computed_elsewhere: tokens computed for it beyond what its sequences count: plus those whose blocks were
            given back, less those that came from the prefix cache or a fork.
        num_preemptions: how often a sequence of it had to give way.
        num_draft_tokens: guessed tokens that were computed.
        num_accepted_tokens: those of them that are in the output.
        num_unfinished: how many of `sequences` have not ended.
        step_times: when the search of a lockstep group was asked, in seconds on the engine's clock.
        num_decode_tokens: rows that it was given, other than the first time.
        arrival_time, first_scheduled_time: seconds on the engine's clock.
    """

    __slots__ = (
        "arrival_number",
        "arrival_time",
        "cache_salt",
        "dry_breakers",
        "eos_token_ids",
        "first_scheduled_time",
        "is_drafted",
        "is_forked",
        "is_lockstep",
        "lead_token_ids",
        "live",
        "logit_bias",
        "max_cached_tokens",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed_elsewhere",
        "num_decode_tokens",
        "num_draft_tokens",
        "num_preemptions",
        "num_unfinished",
        "pooling_params",
        "priority",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "sampling_record",
        "seed",
        "sequences",
        "step_times",
        "stop_token_ids",
        "stream",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        max_model_len: int,
        seed: int,
        arrival_number: int,
        arrival_time: float,
        eos_token_ids: frozenset[int] = frozenset(),
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: bytes = b"",
        stream: bool = False,
        num_lockstep: int | None = None,
        pooling_params: PoolingParams | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.seed = seed
        record = sampling_record(sampling_params, seed=seed, num_prompt_tokens=len(prompt_token_ids))
        self.sampling_record = record.tobytes()
        self.logit_bias = _logit_bias(sampling_params)
        self.dry_breakers: NDArray[np.int32] | None = None
        self.eos_token_ids = frozenset() if sampling_params.ignore_eos else eos_token_ids
        self.stop_token_ids = self.eos_token_ids.union(sampling_params.stop_token_ids or ())
        self.priority = priority
        self.arrival_number = arrival_number
        self.cache_salt = cache_salt
        self.stream = stream
        self.max_cached_tokens: int | None = None
        self.prompt_logprobs: list[dict[int, Logprob]] | None = None
        if sampling_params.num_prompt_logprobs >= 0:
            self.prompt_logprobs = []
        self.arrival_time = arrival_time
        self.first_scheduled_time: float | None = None
        self.num_cached_tokens = 0
        self.num_computed_elsewhere = 0
        self.num_preemptions = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        max_length = max_model_len
        if sampling_params.max_tokens is not None:
            max_length = min(max_length, len(prompt_token_ids) + sampling_params.max_tokens)
        num_sequences = sampling_params.num_sequences if num_lockstep is None else num_lockstep
        self.sequences = [Sequence(self, index, max_length) for index in range(num_sequences)]
        self.is_lockstep = num_lockstep is not None
        self.live = self.sequences[:1] if self.is_lockstep else []
        self.lead_token_ids: list[int] | None = None
        self.step_times: list[float] = []
        self.num_decode_tokens = 0
        self.pooling_params = pooling_params
        self.is_forked = self.is_lockstep or (num_sequences == 1 and pooling_params is None)
        self.is_drafted = sampling_params.speculative and not (
            sampling_params.mirostat or sampling_params.dola_layers is not None or self.is_lockstep
        )
        self.num_unfinished = num_sequences

    @property
    def lead(self) -> Sequence:
        """The live sequence of a lockstep group that comes first in the batch."""
        return min(self.live, key=lambda sequence: sequence.index)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether log-probabilities of tokens of the prompt are wanted and not all known yet."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    @property
    def metrics(self) -> RequestMetrics:
        """Times and counts so far."""
        output_tokens = [sequence.num_output_tokens for sequence in self.sequences]
        if self.is_lockstep:
            decode_tokens, token_times = self.num_decode_tokens, [self.step_times]
        else:
            decode_tokens = sum(count - 1 for count in output_tokens if count)
            token_times = [sequence.token_times for sequence in self.sequences]
        computed_tokens = self.num_computed_elsewhere + sum(sequence.num_computed_tokens for sequence in self.sequences)
        metrics = RequestMetrics(
            prompt_tokens=len(self.prompt_token_ids),
            cached_tokens=self.num_cached_tokens,
            prefill_tokens=computed_tokens - decode_tokens,
            output_tokens=sum(output_tokens),
            decode_tokens=decode_tokens,
            preemptions=self.num_preemptions,
            draft_tokens=self.num_draft_tokens,
            accepted_tokens=self.num_accepted_tokens,
            token_times=token_times,
        )
        if self.first_scheduled_time is not None:
            metrics.queue = self.first_scheduled_time - self.arrival_time
            begun = [times for times in metrics.token_times if times]
            if begun:
                first, last = min(times[0] for times in begun), max(times[-1] for times in begun)
                metrics.ttft = first - self.arrival_time
                metrics.prefill = first - self.first_scheduled_time
                metrics.decode = last - first
        return metrics


def _logit_bias(params: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    if not params.logit_bias:
        return None
    token_ids, values = zip(*params.logit_bias, strict=True)
    return np.array(token_ids, np.int32), np.array(values, np.float32)
