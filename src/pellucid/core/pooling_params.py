"""What a request asks for that generates nothing: one vector for its prompt. Names follow vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pellucid.core.validation import check_boolean, refusal

Pooling = Literal["mean", "last"]


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the hidden states of a prompt become its embedding. Immutable, checked when made.

    The hidden states are those after the final norm, which the head reads.

    Attributes:
        pooling: "mean" of all tokens, or that of the "last" one, which alone has seen all others.
        normalize: scale the result to length 1, so that a dot product is the cosine. A vector of zeros stays one.

    Raises:
        InvalidRequestError: a value is of the wrong type or unknown; `param` names it.
    """

    pooling: Pooling = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.pooling, str) or self.pooling not in get_args(Pooling):
            raise refusal("pooling", self.pooling, '"mean" or "last"')
        check_boolean("normalize", self.normalize)
