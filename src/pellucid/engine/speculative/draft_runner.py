"""Guesses of a model: token by token, for many sequences at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import NOTHING_ALLOWED
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.models.kv_groups import kv_windows


class DraftRunner:
    """Lets copies of sequences grow by what a model guesses.

    A guess is chosen as the token itself will be: by the request's parameters and the random number of its place, so
    that where the guessing model's distribution is near the other's the two mostly agree, at any temperature. Masks are
    left out: what they forbid is merely not accepted.

    Args:
        backend: the model that guesses.
        max_num_seqs, max_num_batched_tokens: most sequences and most tokens in one forward pass.
        max_model_len: most tokens of a sequence.
        layers: int32, rising: the layers that guess; None for all.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        layers: NDArray[np.int32] | None = None,
    ) -> None:
        self._backend = backend
        self._layers = layers
        self._input_builder = InputBuilder(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_groups=len(kv_windows(backend.spec)),
        )

    def compute(self, shadows: list[Sequence], samples: list[Sequence]) -> list[int]:
        """Compute the scheduled tokens of `shadows`; the next token of each of `samples`, which are those of them whose
        last token is scheduled.

        Raises:
            BackendError: the backend failed, or gave logits that cannot be sampled.
        """
        batch = self._input_builder.build(shadows, samples)
        if self._layers is not None:
            batch = replace(batch, layers=self._layers)
        logits = self._backend.forward(batch).logits
        for shadow in shadows:
            shadow.num_computed_tokens += shadow.num_scheduled_tokens
            shadow.num_scheduled_tokens = 0
        if not samples:
            return []
        chosen: list[int] = self._backend.sample(logits, self._input_builder.build_sampling(samples)).token_ids.tolist()
        return chosen

    def extend(self, shadows: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        """Compute what is left of each of `shadows` and let it grow by guesses, a pass for each: up to `max_tokens[i]`,
        1 or more; fewer where its blocks end, or it guesses that the text does, or no token is allowed. The last guess
        is not computed.

        Returns:
            The guesses for each.

        Raises:
            BackendError: the backend failed, or gave logits that cannot be sampled.
        """
        begins = [shadow.num_tokens for shadow in shadows]
        ends = [
            min(shadow.num_tokens + most, shadow.num_writable_tokens + 1)
            for shadow, most in zip(shadows, max_tokens, strict=True)
        ]
        running = list(zip(shadows, ends, strict=True))
        while running:
            batch = [shadow for shadow, _ in running]
            for shadow in batch:
                shadow.num_scheduled_tokens = shadow.num_tokens - shadow.num_computed_tokens
            chosen = self.compute(batch, batch)
            going_on: list[tuple[Sequence, int]] = []
            for (shadow, end), token_id in zip(running, chosen, strict=True):
                if token_id == NOTHING_ALLOWED:
                    continue
                shadow.token_ids.append(token_id)
                if shadow.num_tokens < end and token_id not in shadow.group.stop_token_ids:
                    going_on.append((shadow, end))
            running = going_on
        return [shadow.token_ids[begin:] for shadow, begin in zip(shadows, begins, strict=True)]
