"""Self-speculation: the model guesses for itself by leaving out some of its layers.

Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding", ACL 2024
(arXiv:2309.08168), here with layers left out whole.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import numpy as np

from pellucid.backends.base import Backend
from pellucid.core.errors import InvalidRequestError, PellucidError
from pellucid.core.sequence import Sequence
from pellucid.engine.speculative.draft_runner import DraftRunner


class LayerSkipDrafter:
    """Guesses with some layers of the engine's own model. Implements `Drafter`.

    The layers that run read the sequence's own keys and values, and write theirs where the step that follows computes
    its tokens: in all layers, and before anybody reads them. It takes no blocks: a guess ends where the block does that
    the next token is in.

    Args:
        backend: runs the engine's model, with its KV cache.
        layers: the layers that guess, rising; None takes `default_layers`.
        max_num_seqs: most sequences at once.
        max_model_len: most tokens of a sequence.

    Raises:
        InvalidRequestError: the model does not have one of `layers`.
    """

    is_cheap = False

    def __init__(
        self, backend: Backend, layers: ListLike[int] | None = None, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        num_layers = len(backend.spec.layers)
        layers = default_layers(num_layers) if layers is None else layers
        if layers[-1] >= num_layers:
            raise InvalidRequestError(
                f"layers has {layers[-1]}, but this model has layers 0 to {num_layers - 1}", param="layers"
            )
        self._runner = DraftRunner(
            backend,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs,
            max_model_len=max_model_len,
            layers=np.array(layers, np.int32),
        )

    def prepare(self, sequences: list[Sequence]) -> None:
        """The sequences' own keys and values are all it takes."""

    def propose(self, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
        shadows = [_shadow(sequence) for sequence in sequences]
        try:
            return self._runner.extend(shadows, max_tokens)
        except PellucidError:
            return [[] for _ in sequences]

    def observe(self, sequence: Sequence, draft_token_ids: list[int], chosen_token_ids: list[int]) -> None:
        """Nothing to learn: the layers are what they are."""

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


def default_layers(num_layers: int) -> list[int]:
    """All but the middle quarter of `num_layers` layers, and at least one less than all (but of one).

    Of the choices measured in docs/speculation.md the one that guesses right most often for what it costs.
    """
    num_skipped = min(max(1, round(num_layers / 4)), num_layers - 1)
    first = (num_layers - num_skipped) // 2
    return [layer for layer in range(num_layers) if not first <= layer < first + num_skipped]


def _shadow(sequence: Sequence) -> Sequence:
    """`sequence` in the blocks that it has, to grow by guesses."""
    shadow = Sequence(sequence.group, sequence.index, sequence.max_length)
    shadow.token_ids = list(sequence.token_ids)
    shadow.num_computed_tokens = sequence.num_computed_tokens
    shadow.num_writable_tokens = sequence.num_writable_tokens
    shadow.block_tables = sequence.block_tables
    shadow.table_stamp = sequence.table_stamp
    return shadow
