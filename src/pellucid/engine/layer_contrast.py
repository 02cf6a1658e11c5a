"""DoLa: from what flows through earlier layers to the logits of the requests that contrast the last one with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch
from pellucid.core.capture import SequenceCapture, residual_capture
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.decoding.contrast import dola, premature_layers
from pellucid.decoding.token_mask import TokenMask
from pellucid.models.spec import ModelSpec

MAX_PROJECTED = 64
"""Hidden states whose logits are held at a time, or those of one row where they are more."""


def contrasted_layers(params: SamplingParams, spec: ModelSpec) -> list[int]:
    """The layers that a request with `dola_layers` may contrast with (`decoding.contrast.premature_layers`).

    Raises:
        InvalidRequestError: one that the model does not have before its last.
    """
    assert params.dola_layers is not None
    return premature_layers(params.dola_layers, len(spec.layers), spec.tie_word_embeddings)


class LayerContrast:
    """Which requests contrast layers, and with which. False while there are none, which is all it costs others."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._points: dict[SequenceGroup, NDArray[np.int32]] = {}
        self._wanted: dict[int, SequenceCapture] = {}
        self._first_rows: list[tuple[int, Sequence]] = []
        self._siblings: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._points)

    def open(self, group: SequenceGroup) -> None:
        """From now on the rows of `group` are contrasted, until `close`."""
        self._points[group] = 2 * np.array(contrasted_layers(group.sampling_params, self._backend.spec), np.int32)

    def close(self, group: SequenceGroup) -> None:
        """No effect on a group that was not opened."""
        self._points.pop(group, None)

    def attach(self, batch: ForwardBatch, samples: list[Sequence]) -> ForwardBatch:
        """`batch`, whose logits rows are those of `samples`, with the hidden states that they are contrasted with."""
        self._wanted, self._first_rows, self._siblings = {}, [], []
        for row, sequence in enumerate(samples):
            points = self._points.get(sequence.group)
            if points is not None:
                token = int(batch.logits_rows[row])
                if token in self._wanted:  # siblings yet to fork have a row each
                    self._siblings.append((row, self._first_rows[-1][0]))
                else:
                    self._wanted[token] = self._wish(batch, token, points)
                    self._first_rows.append((row, sequence))
        if not self._wanted:
            return batch
        return batch.with_captures(self._wanted.values())

    def apply(self, logits: NDArray[np.float32], masks: Mapping[Sequence, TokenMask | None]) -> None:
        """Replace the rows of `logits`, float32 [num_logits, vocab_size], after the forward of the batch `attach` gave.

        Args:
            masks: the tokens that may come next of sequences for which not all may.

        Raises:
            BackendError: the head's logits of a hidden state are not finite.
        """
        for (row, sequence), premature in zip(self._first_rows, self._projected(), strict=True):
            logits[row] = dola(logits[row], premature, masks.get(sequence))[0]
        for row, first in self._siblings:
            logits[row] = logits[first]

    def _projected(self) -> Iterator[NDArray[np.float32]]:
        """The head's logits of each wanted token's hidden states: float32 [num_layers, vocab_size]."""
        hidden = [wanted.residual[:, 0] for wanted in self._wanted.values()]
        while hidden:
            count = 1
            while count < len(hidden) and sum(map(len, hidden[: count + 1])) <= MAX_PROJECTED:
                count += 1
            together, hidden = hidden[:count], hidden[count:]
            ends = np.cumsum([len(states) for states in together])[:-1]
            yield from np.split(self._backend.project(np.concatenate(together), normalize=False), ends)

    def _wish(self, batch: ForwardBatch, token: int, points: NDArray[np.int32]) -> SequenceCapture:
        row = int(np.searchsorted(batch.cu_seqlens, token, side="right")) - 1
        return residual_capture(row, np.array([token], np.int32), points, self._backend.spec.hidden_size)
