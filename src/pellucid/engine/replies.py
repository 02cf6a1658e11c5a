"""The terminal reply of a request, from what its sequences have come to."""

from __future__ import annotations

import math
from dataclasses import replace

from pellucid.core.capture import Captured
from pellucid.core.errors import PellucidError
from pellucid.core.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from pellucid.core.sequence import Sequence, SequenceGroup


def returned_sequences(group: SequenceGroup) -> list[Sequence]:
    """The sequences whose continuations a request gives back, in their order: all of them, or the `n` of `best_of` with
    the highest mean log-probability a token, as the OpenAI API has it. Equals stay in the order of their index."""
    sequences = group.sequences
    if group.sampling_params.num_sequences > group.sampling_params.n:
        sequences = sorted(sequences, key=_mean_logprob, reverse=True)[: group.sampling_params.n]
    return sequences


def completion_output(index: int, sequence: Sequence, text: str, finish_reason: FinishReason) -> CompletionOutput:
    """One continuation; `index` is its place among those returned."""
    group = sequence.group
    token_ids, logprobs = sequence.output_token_ids, sequence.logprobs
    if has_echo(sequence):
        token_ids = group.prompt_token_ids + token_ids
        if logprobs is not None:
            echoed = (echoed_logprobs(group, position) for position in range(len(group.prompt_token_ids)))
            logprobs = [*echoed, *logprobs]
    return CompletionOutput(
        index, text, token_ids, finish_reason, sequence.stop_reason, logprobs, sequence.cumulative_logprob
    )


def request_output(
    group: SequenceGroup,
    outputs: list[CompletionOutput],
    error: PellucidError | None,
    captured: Captured | None = None,
) -> RequestOutput:
    """The terminal reply of `group`, whose continuations came to `outputs`."""
    count = group.sampling_params.prompt_logprobs
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if count is not None and group.prompt_logprobs is not None:
        prompt_logprobs = [None, *(_likeliest(entry, count) for entry in group.prompt_logprobs)]
    return RequestOutput(
        group.request_id,
        group.prompt,
        group.prompt_token_ids,
        outputs,
        group.metrics,
        error,
        captured,
        prompt_logprobs=prompt_logprobs,
    )


def has_echo(sequence: Sequence) -> bool:
    """Whether the prompt comes before what was generated: not where nothing was."""
    return sequence.group.sampling_params.echo and sequence.num_output_tokens > 0


def echoed_logprobs(group: SequenceGroup, position: int) -> dict[int, Logprob]:
    """What `logprobs` asked for, of the token of the prompt at `position`; empty for the first one."""
    assert group.prompt_logprobs is not None
    assert group.sampling_params.logprobs is not None
    return {} if position == 0 else _likeliest(group.prompt_logprobs[position - 1], group.sampling_params.logprobs)


def _likeliest(entry: dict[int, Logprob], count: int) -> dict[int, Logprob]:
    """A token's log-probability and those of the `count` most probable alternatives, out of an `entry` that may have
    more."""
    (token_id, chosen), *others = entry.items()
    if chosen.rank is not None and chosen.rank > count:
        chosen = replace(chosen, rank=None)
    likeliest = {token_id: chosen}
    likeliest.update((other, item) for other, item in others if item.rank is not None and item.rank <= count)
    return likeliest


def _mean_logprob(sequence: Sequence) -> float:
    if not sequence.num_output_tokens or sequence.cumulative_logprob is None:
        return -math.inf
    return sequence.cumulative_logprob / sequence.num_output_tokens
