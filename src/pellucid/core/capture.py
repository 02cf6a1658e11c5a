"""What a request may ask to see of the model at work, how a batch carries that wish, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, check_boolean, check_integer, refusal

MAX_CHOSEN = 2**20

LAYER_OPERATIONS = (
    "attention_input",
    "qkv_proj",
    "attention",
    "o_proj",
    "mlp_input",
    "gate_up_proj",
    "down_proj",
)
"""What a layer does, in order, by the same names in every backend. `attention_input` and `mlp_input` take the last
contribution into the residual stream (in the first layer, make it from the embeddings) and normalize it; `attention`
includes the norms and rotation of queries and keys and the writing of the KV cache; `gate_up_proj` the activation."""


def operation_names(num_layers: int) -> list[tuple[int | None, str]]:
    """(layer or None, name) of every operation of a step, in order.

    `prepare` makes what depends on the batch alone. `head_input` takes the last contribution into the residual stream
    and normalizes the rows whose logits are wanted, `lm_head` computes their logits; a step without any has neither.
    """
    layers = [(layer, name) for layer in range(num_layers) for name in LAYER_OPERATIONS]
    return [(None, "prepare"), *layers, (None, "head_input"), (None, "lm_head")]


def _chosen(name: str, value: Any, low: int, what: str) -> tuple[int, ...]:
    range_text = f"a list of 1 to {MAX_CHOSEN} {what}"
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise refusal(name, value, range_text)
    chosen = tuple(islice(value, MAX_CHOSEN + 1))
    if not 1 <= len(chosen) <= MAX_CHOSEN:
        found = "an empty one" if not chosen else f"more than {MAX_CHOSEN} of them"
        raise InvalidRequestError(f"{name} must be {range_text}, not {found}", param=name)
    return tuple(check_integer(name, index, low, INT32_MAX) for index in chosen)


@dataclass(frozen=True, slots=True)
class CaptureParams:
    """What a request asks to see. Immutable, checked when made; names of layers and heads once the model is known.

    Layers and heads count from 0, or from the end where negative. Tokens are named by absolute position; negative ones
    count from the end of the prompt, so that -1 is the prompt's last token. Chosen indices come back in rising order,
    each once.

    Attributes:
        residual: the residual stream before, within and after these layers; True for all.
        mlp: what goes into down_proj in these layers: the gated activations; True for all.
        positions: tokens whose residual stream and activations are wanted; None for all that are computed.
        attention: attention probabilities of these layers; True for all.
        heads: query heads whose probabilities are wanted; None for all.
        queries: tokens whose probabilities are wanted; None for all that are computed.
        operations: what each operation of each layer took.

    Raises:
        InvalidRequestError: a value is of the wrong type, or would have no effect; `param` names it.
    """

    residual: bool | Iterable[int] = False
    mlp: bool | Iterable[int] = False
    positions: Iterable[int] | None = None
    attention: bool | Iterable[int] = False
    heads: Iterable[int] | None = None
    queries: Iterable[int] | None = None
    operations: bool = False

    def __post_init__(self) -> None:
        for name in ("residual", "mlp", "attention"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                self._set(name, _chosen(name, value, -INT32_MAX, "layers, or true or false"))
        for name, what in (("positions", "positions, or None"), ("heads", "heads, or None"), ("queries", "positions")):
            if getattr(self, name) is not None:
                self._set(name, _chosen(name, getattr(self, name), -INT32_MAX, what))
        check_boolean("operations", self.operations)
        if self.positions is not None and not (self.residual or self.mlp):
            raise InvalidRequestError("positions chooses tokens of residual and mlp: ask for one", param="positions")
        for name in ("heads", "queries"):
            if getattr(self, name) is not None and not self.attention:
                raise InvalidRequestError(f"{name} chooses among attention: ask for it", param=name)
        if not (self.residual or self.mlp or self.attention or self.operations):
            raise InvalidRequestError(
                "the capture asks for nothing: ask for residual, mlp, attention or operations", param="capture"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, eq=False)
class SequenceCapture:
    """What is wanted of one sequence in one step, and the memory to write it to: arrays of the caller's, C-contiguous.

    Attributes:
        row: which sequence of the batch.
        tokens: int32 [n], rising indices into `input_ids`: the tokens of `residual` and `mlp`.
        residual_points: int32 [p], rising: 0 is the embedding, 2 l + 1 the residual stream after the attention of layer
            l, 2 l + 2 after its feed-forward; one more than the last of these, the stream after the final norm, which
            is what the head reads.
        residual: float32 [p, n, hidden_size].
        mlp: layer -> float32 [n, intermediate_size], the input of down_proj.
        queries: int32 [m], rising indices into `input_ids`.
        heads: int32 [h], rising.
        attention: layer -> float32 [h, m, kv_lens[row]], the weights that the values are added up with; they sum to 1,
            and are 0 for the tokens that the query does not see.
    """

    row: int
    tokens: NDArray[np.int32]
    residual_points: NDArray[np.int32]
    residual: NDArray[np.float32]
    mlp: dict[int, NDArray[np.float32]]
    queries: NDArray[np.int32]
    heads: NDArray[np.int32]
    attention: dict[int, NDArray[np.float32]]


def residual_capture(
    row: int, tokens: NDArray[np.int32], residual_points: NDArray[np.int32], hidden_size: int
) -> SequenceCapture:
    """A wish for the residual stream alone, with the memory for it; as in SequenceCapture.

    Raises:
        MemoryError: there is none.
    """
    none = np.empty(0, np.int32)
    residual = np.empty((len(residual_points), len(tokens), hidden_size), np.float32)
    return SequenceCapture(row, tokens, residual_points, residual, mlp={}, queries=none, heads=none, attention={})


@dataclass(frozen=True, slots=True, eq=False)
class StepCapture:
    """What a backend is to write down of one step besides its logits.

    Attributes:
        sequences: those that want something of their own.
        seconds: float64 [len(operation_names(num_layers))], zeros, to which the backend adds what each operation took;
            or None. Writing captures does not count.
    """

    sequences: tuple[SequenceCapture, ...]
    seconds: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class OperationCost:
    """What one operation took, over the steps that a request was part of: the cost of whole batches, not of a share.

    Attributes:
        layer: the layer; None for what is outside of them.
        name: see `LAYER_OPERATIONS` and `operation_names`.
        seconds: wall time in all.
        calls: in how many steps.
    """

    layer: int | None
    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What a request asked to see: of its prompt and of every token it generated but the last, which is never computed.

    Attributes:
        num_tokens: tokens computed.
        positions: int32 [n], the tokens of `residual` and `mlp`.
        residual_points: int32 [p]: 0 is the embedding, 2 l + 1 the residual stream after the attention of layer l,
            2 l + 2 after its feed-forward; the three around each layer asked for.
        residual: float32 [p, n, hidden_size]; None if not asked for. The difference of two successive points, taken in
            float64, is what attention or feed-forward contributed: adding it to the first gives the second exactly.
        mlp: layer -> float32 [n, intermediate_size], the gated activations.
        queries: int32 [m], the tokens that look, in `attention`.
        heads: int32 [h], the heads of `attention`.
        attention: layer -> float32 [h, m, num_tokens], the weight that each query gives to the value of each token;
            they sum to 1 within rounding, and are 0 for the tokens that it does not see.
        operations: what each operation took, in order, over the steps of `step_tokens`; empty if not asked for.
        step_tokens: how many tokens each of those steps computed, for all the requests in it.
    """

    num_tokens: int
    positions: NDArray[np.int32]
    residual_points: NDArray[np.int32]
    residual: NDArray[np.float32] | None
    mlp: dict[int, NDArray[np.float32]]
    queries: NDArray[np.int32]
    heads: NDArray[np.int32]
    attention: dict[int, NDArray[np.float32]]
    operations: list[OperationCost] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
