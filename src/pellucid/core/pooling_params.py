"""What a request asks for that generates nothing: one vector for its prompt, or how probable tokens are to follow it.
Names follow vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_boolean, check_token_ids, refusal

Pooling = Literal["mean", "last"]

MAX_LABELS = 128


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the hidden states of a prompt become its embedding. Immutable, checked when made.

    The hidden states are those after the final norm, which the head reads.

    Attributes:
        pooling: "mean" of all tokens, or that of the "last" one, which alone has seen all others.
        normalize: scale the result to length 1, so that a dot product is the cosine. A vector of zeros stays one.
        label_token_ids: up to 128. Where there are any, the "last" hidden state goes through the head, and what is
            asked for are the log-probabilities of these tokens to come next.

    Raises:
        InvalidRequestError: a value is of the wrong type or unknown, or would have no effect; `param` names it.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    label_token_ids: Iterable[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pooling, str) or self.pooling not in get_args(Pooling):
            raise refusal("pooling", self.pooling, '"mean" or "last"')
        check_boolean("normalize", self.normalize)
        labels = check_token_ids("label_token_ids", self.label_token_ids, MAX_LABELS)
        object.__setattr__(self, "label_token_ids", labels)
        for name, value in (("pooling", "last"), ("normalize", False)) if labels else ():
            if getattr(self, name) != value:
                raise InvalidRequestError(f"with label_token_ids, {name} must be {value!r}", param=name)


def labelling(label_token_ids: Iterable[int]) -> PoolingParams:
    """What asks for the log-probabilities of these tokens to come after a prompt.

    Raises:
        InvalidRequestError: there is none, there are more than 128, or one is no token id.
    """
    params = PoolingParams("last", False, label_token_ids)
    if not params.label_token_ids:
        raise InvalidRequestError("label_token_ids is empty: give at least one", param="label_token_ids")
    return params
