"""Sequences without an engine."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup

_numbers = iter(range(10**9))


def make_group(
    token_ids: ListLike[int],
    params: SamplingParams | None = None,
    *,
    priority: int = 0,
    salt: bytes = b"",
    seed: int | None = None,
    num_lockstep: int | None = None,
) -> SequenceGroup:
    number = next(_numbers)
    return SequenceGroup(
        f"request-{number}",
        list(token_ids),
        params or SamplingParams(max_tokens=1000),
        max_model_len=100_000,
        seed=number if seed is None else seed,
        arrival_number=number,
        arrival_time=0.0,
        priority=priority,
        cache_salt=salt,
        num_lockstep=num_lockstep,
    )


def make_sequence(token_ids: ListLike[int], *, salt: bytes = b"") -> Sequence:
    return make_group(token_ids, salt=salt).sequences[0]
