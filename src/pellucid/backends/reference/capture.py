"""Writes down what a batch asks to see while the executor runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import StepCapture, operation_names

Array = NDArray[np.float32]


class Observer:
    """Is shown the intermediate results of a step and keeps what is wanted of them. Changes nothing.

    Args:
        capture: what is wanted; None for nothing.
        num_layers: of the model.
    """

    def __init__(self, capture: StepCapture | None, num_layers: int) -> None:
        self._sequences = () if capture is None else capture.sequences
        self._seconds = None if capture is None else capture.seconds
        self._operations = [] if self._seconds is None else operation_names(num_layers)
        self._since = perf_counter()

    def residual(self, point: int, x: Array) -> None:
        """The residual stream, float32 [num_tokens, hidden_size], at `point` (`core.capture.SequenceCapture`)."""
        with self._aside():
            for wanted in self._sequences:
                wanted.residual[wanted.residual_points == point] = x[wanted.tokens]

    def normalized(self, point: int, x: Array, norm: Callable[[Array], Array]) -> None:
        """`norm` of the residual stream, at `point`."""
        with self._aside():
            for wanted in self._sequences:
                if point in wanted.residual_points:
                    wanted.residual[wanted.residual_points == point] = norm(x[wanted.tokens])

    def activations(self, layer: int, x: Array) -> None:
        """What goes into down_proj, float32 [num_tokens, intermediate_size]."""
        with self._aside():
            for wanted in self._sequences:
                if layer in wanted.mlp:
                    wanted.mlp[layer][:] = x[wanted.tokens]

    def attention(self, layer: int, weights: Callable[[int], Array]) -> None:
        """`weights` gives those of a token of the batch: float32 [num_attention_heads, position + 1]."""
        with self._aside():
            for wanted in self._sequences:
                if layer in wanted.attention:
                    for index, token in enumerate(wanted.queries.tolist()):
                        seen = weights(token)[wanted.heads]
                        wanted.attention[layer][:, index, : seen.shape[1]] = seen
                        wanted.attention[layer][:, index, seen.shape[1] :] = 0

    def done(self, name: str, layer: int | None = None) -> None:
        """What was done since the last call was operation `name` of `layer` (`core.capture.operation_names`)."""
        if self._seconds is not None:
            now = perf_counter()
            self._seconds[self._operations.index((layer, name))] += now - self._since
            self._since = now

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done here does not count."""
        start = perf_counter()
        yield
        self._since += perf_counter() - start
