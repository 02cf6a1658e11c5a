"""From what requests ask to see to buffers for each step, and from those to what they get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch
from pellucid.core.capture import (
    Captured,
    CaptureParams,
    OperationCost,
    SequenceCapture,
    StepCapture,
    operation_names,
)
from pellucid.core.errors import CapacityError, InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.core.validation import shown
from pellucid.engine.capture_selection import Array, CaptureSelection, Indices
from pellucid.estimate.memory import free_memory
from pellucid.models.spec import ModelSpec

CAPTURE_MEMORY_SHARE = 0.5
"""Share of the memory that is free when a request comes that its captures, with those of others, may take."""


def check_capture(params: CaptureParams, sampling_params: SamplingParams, spec: ModelSpec) -> None:
    """Check what the model can tell of a wish before the prompt is known.

    Raises:
        InvalidRequestError: a layer or head that the model does not have, or several continuations.
    """
    if not isinstance(params, CaptureParams):
        raise InvalidRequestError(f"capture must be a CaptureParams, not {shown(params)}", param="capture")
    if sampling_params.num_sequences > 1:
        name = "n" if sampling_params.best_of is None else "best_of"
        raise InvalidRequestError(
            f"{name} is {sampling_params.num_sequences}, but a capture is of one continuation: ask for {name} = 1",
            param=name,
        )
    CaptureSelection(params, spec)


class CaptureBook:
    """What capturing requests have asked for and been given. False while there are none, which is all it costs others.

    Args:
        spec: the model.
        memory: bytes that the captures of all unfinished requests may take; None takes `CAPTURE_MEMORY_SHARE`.
    """

    def __init__(self, spec: ModelSpec, memory: int | None = None) -> None:
        self._spec = spec
        self._memory = memory
        self._collectors: dict[SequenceGroup, _Collector] = {}
        self._pending: list[tuple[_Collector, _Piece]] = []

    def __bool__(self) -> bool:
        return bool(self._collectors)

    def open(self, group: SequenceGroup, params: CaptureParams) -> None:
        """Begin to collect for a request; a refusal leaves nothing behind.

        Raises:
            InvalidRequestError: a token that the request does not compute.
            CapacityError: what it asks for may take more memory than there is.
        """
        most = group.sequences[0].max_length - 1  # the last token is never computed
        selection = CaptureSelection(params, self._spec)
        selection.choose_tokens(params, len(group.prompt_token_ids), most)
        self._require_memory(selection, most)
        group.max_cached_tokens = selection.first_token
        self._collectors[group] = _Collector(selection, selection.peak_bytes(most))

    def attach(self, batch: ForwardBatch, sequences: list[Sequence]) -> ForwardBatch:
        """`batch`, which computes the scheduled tokens of `sequences`, with what their requests want of this step.

        Raises:
            CapacityError: there is no memory for it.
        """
        self._pending = []
        try:
            for row, sequence in enumerate(sequences):
                collector = self._collectors.get(sequence.group)
                if collector is not None:
                    self._pending.append((collector, collector.begin_step(row, int(batch.cu_seqlens[row]), sequence)))
        except MemoryError:
            raise CapacityError("no memory is left for what a request wants to capture", param="capture") from None
        if not self._pending:
            return batch
        timed = any(collector.selection.operations for collector, _ in self._pending)
        return replace(
            batch,
            capture=StepCapture(
                tuple(piece.buffers for _, piece in self._pending if piece.rows.size or piece.queries.size),
                np.zeros(len(operation_names(len(self._spec.layers)))) if timed else None,
            ),
        )

    def commit(self, batch: ForwardBatch) -> None:
        """Take in what the step of `batch` has written, once all of it has succeeded."""
        assert batch.capture is not None
        for collector, piece in self._pending:
            collector.commit(piece)
            if collector.selection.operations and batch.capture.seconds is not None:
                collector.add_costs(batch.capture.seconds, batch.num_tokens, has_logits=len(batch.logits_rows) > 0)
        self._pending = []

    def close(self, group: SequenceGroup) -> Captured | None:
        """What a request that ended was given; None if it did not ask.

        Raises:
            CapacityError: there is no memory to put it together.
        """
        collector = self._collectors.pop(group, None)
        try:
            return None if collector is None else collector.result(len(self._spec.layers))
        except MemoryError:
            raise CapacityError("no memory is left to put together what was captured", param="capture") from None

    def _require_memory(self, selection: CaptureSelection, num_tokens: int) -> None:
        needed = selection.peak_bytes(num_tokens)
        taken = sum(collector.num_bytes for collector in self._collectors.values())
        limit, source = self._memory, "the limit"
        if limit is None:
            limit, source = int(CAPTURE_MEMORY_SHARE * free_memory()), f"{CAPTURE_MEMORY_SHARE:.0%} of the free memory"
        if taken + needed <= limit:
            return
        parts = ", ".join(f"{name} {sum(sizes):,}" for name, sizes in selection.sizes(num_tokens).items() if sizes)
        others = f", beside {taken:,} of other unfinished requests," if taken else ""
        raise CapacityError(
            f"captures of up to {num_tokens} tokens may take {needed:,} bytes ({parts}, and the largest array a second "
            f"time while it is put together){others} but {source} is {limit:,}: lower max_tokens, or choose fewer "
            "layers, positions, heads or queries",
            param="capture",
        )


class _Piece(NamedTuple):
    """What one step wrote of the tokens from position `begin` to `end`: of those at `rows` and at `queries`."""

    begin: int
    end: int
    rows: Indices
    queries: Indices
    buffers: SequenceCapture


class _Collector:
    """One request's pieces, step by step.

    Attributes:
        selection: what it wants.
        num_bytes: what it may come to hold.
    """

    def __init__(self, selection: CaptureSelection, num_bytes: int) -> None:
        self.selection = selection
        self.num_bytes = num_bytes
        self._pieces: list[_Piece] = []
        self._seconds: NDArray[np.float64] | None = None
        self._step_tokens: list[int] = []
        self._num_steps_with_logits = 0

    def begin_step(self, row: int, first_token: int, sequence: Sequence) -> _Piece:
        """Buffers for the scheduled tokens of `sequence`, which is `row` of the batch and begins at `first_token`.

        What was captured of these tokens before goes, for they are computed again.
        """
        begin = sequence.num_computed_tokens
        end = begin + sequence.num_scheduled_tokens
        while self._pieces and self._pieces[-1].end > begin:
            self._pieces.pop()
        selection = self.selection
        rows, queries = selection.rows(begin, end), selection.query_rows(begin, end)
        buffers = SequenceCapture(
            row=row,
            tokens=rows + np.int32(first_token - begin),
            residual_points=selection.residual_points,
            residual=selection.residual(len(rows)),
            mlp={layer: selection.activations(layer, len(rows)) for layer in selection.mlp},
            queries=queries + np.int32(first_token - begin),
            heads=selection.heads,
            attention={layer: selection.probabilities(len(queries), end) for layer in selection.attention},
        )
        return _Piece(begin, end, rows, queries, buffers)

    def commit(self, piece: _Piece) -> None:
        """Keep what a step wrote."""
        self._pieces.append(piece)

    def add_costs(self, seconds: NDArray[np.float64], num_tokens: int, *, has_logits: bool) -> None:
        """Count a step of `num_tokens` tokens in all."""
        self._seconds = seconds.copy() if self._seconds is None else self._seconds + seconds
        self._step_tokens.append(num_tokens)
        self._num_steps_with_logits += has_logits

    def result(self, num_layers: int) -> Captured:
        """Everything together. Pieces go as they are put together, so that only one array is held twice at a time."""
        selection, pieces = self.selection, self._pieces
        num_tokens = pieces[-1].end if pieces else 0
        queries = _joined([np.empty(0, np.int32), *(piece.queries for piece in pieces)])
        mlp: dict[int, Array] = {}
        for layer in selection.mlp:
            parts = [piece.buffers.mlp.pop(layer) for piece in pieces]
            mlp[layer] = _joined([selection.activations(layer, 0), *parts])
        attention: dict[int, Array] = {}
        for layer in selection.attention:
            parts = [piece.buffers.attention.pop(layer) for piece in pieces]
            attention[layer] = _stacked(parts, selection.probabilities(len(queries), num_tokens))
        residual = _joined([selection.residual(0), *(piece.buffers.residual for piece in pieces)], axis=1)
        return Captured(
            num_tokens=num_tokens,
            positions=_joined([np.empty(0, np.int32), *(piece.rows for piece in pieces)]),
            residual_points=selection.residual_points,
            residual=residual if len(selection.residual_points) else None,
            mlp=mlp,
            queries=queries,
            heads=selection.heads,
            attention=attention,
            operations=self._operations(num_layers),
            step_tokens=self._step_tokens,
        )

    def _operations(self, num_layers: int) -> list[OperationCost]:
        if self._seconds is None:
            return []
        costs = []
        for (layer, name), seconds in zip(operation_names(num_layers), self._seconds.tolist(), strict=True):
            needs_logits = name in ("head_input", "lm_head")
            calls = self._num_steps_with_logits if needs_logits else len(self._step_tokens)
            costs.append(OperationCost(layer, name, seconds, calls))
        return costs


def _joined(parts: list[NDArray[Any]], axis: int = 0) -> NDArray[Any]:
    """`parts` one after another along `axis`; where only one holds anything, that one itself."""
    filled = [part for part in parts if part.shape[axis]]
    return filled[0] if len(filled) == 1 else np.concatenate(filled or parts[:1], axis)


def _stacked(parts: list[Array], out: Array) -> Array:
    """Probabilities float32 [heads, queries, keys] of one step after another, in `out`; no query saw later keys."""
    query = 0
    for part in parts:
        rows = out[:, query : query + part.shape[1]]
        rows[..., : part.shape[2]] = part
        rows[..., part.shape[2] :] = 0
        query += part.shape[1]
    return out
