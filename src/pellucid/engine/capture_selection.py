"""What a request wants to see, in numbers of its model and its prompt."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import CaptureParams
from pellucid.core.errors import InvalidRequestError
from pellucid.models.spec import ModelSpec

Indices = NDArray[np.int32]
Array = NDArray[np.float32]


class CaptureSelection:
    """One request's wish.

    Attributes:
        residual_points: int32, rising (`core.capture.SequenceCapture`).
        mlp, attention: layers, rising.
        heads: int32, rising.
        positions, queries: int32, rising; None for all. Set by `choose_tokens`.
        operations: whether costs are wanted.

    Raises:
        InvalidRequestError: a layer or head that the model does not have; `param` names it.
    """

    def __init__(self, params: CaptureParams, spec: ModelSpec) -> None:
        self.residual_points = _int32(
            {point for layer in _layers("residual", params.residual, spec) for point in range(2 * layer, 2 * layer + 3)}
        )
        self.mlp = _layers("mlp", params.mlp, spec)
        self.attention = _layers("attention", params.attention, spec)
        self.heads = _heads(params.heads, self.attention, spec)
        self.positions: Indices | None = None
        self.queries: Indices | None = None
        self.operations = params.operations
        self._spec = spec

    def choose_tokens(self, params: CaptureParams, num_prompt_tokens: int, num_computed: int) -> None:
        """Resolve the tokens that `params` names, for a request that computes at most `num_computed`.

        Raises:
            InvalidRequestError: one that it does not compute; `param` names it.
        """
        self.positions = _tokens("positions", params.positions, num_prompt_tokens, num_computed)
        self.queries = _tokens("queries", params.queries, num_prompt_tokens, num_computed)

    @property
    def first_token(self) -> int | None:
        """The first of which something is wanted; None if nothing is wanted of any."""
        firsts = []
        if self.residual_points.size or self.mlp:
            firsts.append(0 if self.positions is None else int(self.positions[0]))
        if self.attention:
            firsts.append(0 if self.queries is None else int(self.queries[0]))
        return min(firsts, default=None)

    def rows(self, begin: int, end: int) -> Indices:
        """The tokens of [begin, end) whose residual stream and activations are wanted."""
        return _within(self.positions, begin, end) if self.residual_points.size or self.mlp else _int32(())

    def query_rows(self, begin: int, end: int) -> Indices:
        """The tokens of [begin, end) whose attention is wanted."""
        return _within(self.queries, begin, end) if self.attention else _int32(())

    def sizes(self, num_tokens: int) -> dict[str, list[int]]:
        """Bytes of each array of a sequence of `num_tokens` computed tokens, by the parameter that asks for it."""
        rows, queries = len(self.rows(0, num_tokens)), len(self.query_rows(0, num_tokens))
        points, layers = len(self.residual_points), self._spec.layers
        return {
            "residual": [4 * points * rows * self._spec.hidden_size] if points else [],
            "mlp": [4 * rows * layers[layer].mlp.intermediate_size for layer in self.mlp],
            "attention": [4 * len(self.heads) * queries * num_tokens for _ in self.attention],
        }

    def peak_bytes(self, num_tokens: int) -> int:
        """Bytes held at most: every array, and the largest a second time while it is put together from its pieces."""
        sizes = [size for sizes in self.sizes(num_tokens).values() for size in sizes]
        return sum(sizes) + max(sizes, default=0)

    def residual(self, rows: int) -> Array:
        return np.empty((len(self.residual_points), rows, self._spec.hidden_size), np.float32)

    def activations(self, layer: int, rows: int) -> Array:
        return np.empty((rows, self._spec.layers[layer].mlp.intermediate_size), np.float32)

    def probabilities(self, queries: int, keys: int) -> Array:
        return np.empty((len(self.heads), queries, keys), np.float32)


def _int32(values: Iterable[int]) -> Indices:
    return np.array(sorted(values), np.int32)


def _within(chosen: Indices | None, begin: int, end: int) -> Indices:
    """The positions of [begin, end) that are chosen."""
    if chosen is None:
        return np.arange(begin, end, dtype=np.int32)
    first, last = np.searchsorted(chosen, (begin, end))
    return chosen[first:last]


def _layers(name: str, value: bool | Iterable[int], spec: ModelSpec) -> tuple[int, ...]:
    count = len(spec.layers)
    if isinstance(value, bool):
        return tuple(range(count)) if value else ()
    return tuple(sorted({_index(name, layer, count, "the model has layers") for layer in value}))


def _heads(value: Iterable[int] | None, layers: tuple[int, ...], spec: ModelSpec) -> Indices:
    counts = {spec.layers[layer].attention.num_attention_heads for layer in layers}
    if len(counts) > 1 and value is None:
        raise InvalidRequestError(
            f"these layers have {min(counts)} to {max(counts)} heads: choose heads, or layers that are alike",
            param="heads",
        )
    count = min(counts, default=0)
    return _int32(
        range(count) if value is None else {_index("heads", head, count, "there are heads") for head in value}
    )


def _index(name: str, index: int, count: int, what: str) -> int:
    if not -count <= index < count:
        raise InvalidRequestError(
            f"{name} has {index}, but {what} 0 to {count - 1} (or -{count} to -1, from the end)", param=name
        )
    return index % count


def _tokens(name: str, value: Iterable[int] | None, num_prompt_tokens: int, num_computed: int) -> Indices | None:
    if value is None:
        return None
    for position in value:
        if not -num_prompt_tokens <= position < num_computed:
            raise InvalidRequestError(
                f"{name} has {position}, but the request computes tokens 0 to {num_computed - 1} at most (or "
                f"-{num_prompt_tokens} to -1, from the end of the prompt)",
                param=name,
            )
    return _int32({position + num_prompt_tokens if position < 0 else position for position in value})
