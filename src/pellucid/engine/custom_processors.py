"""Runs the `logits_processors` that requests bring along. They are somebody else's code: whatever one does, only the
request that brought it fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sequence import SequenceGroup
from pellucid.core.validation import shown

Logits = NDArray[np.float32]


class CustomProcessor(NamedTuple):
    """A processor as it is called.

    Attributes:
        name: what error messages call it.
        function: takes the ids of the tokens generated so far and the logits; with `wants_prompt` those of the prompt
            before them, as vLLM's processors may.
    """

    name: str
    function: Callable[..., Any]
    wants_prompt: bool

    def __call__(self, prompt_token_ids: ListLike[int], token_ids: ListLike[int], logits: Logits) -> Logits:
        """What the processor makes of `logits`, float32 [vocab_size], which it gets a copy of.

        Raises:
            InvalidRequestError: it raised, or gave anything but such logits, finite or -inf.
        """
        arguments: list[Any] = [list(token_ids), logits.copy()]
        if self.wants_prompt:
            arguments.insert(0, list(prompt_token_ids))
        try:
            result = self.function(*arguments)
        except Exception as error:
            raise self._error(f"raised {type(error).__name__}: {shown_text(error)}") from error
        if not isinstance(result, np.ndarray):
            raise self._error(f"returned {shown(result)} and not the logits")
        if result.shape != logits.shape or result.dtype != np.float32:
            raise self._error(f"returned {result.dtype} {list(result.shape)}, not float32 {list(logits.shape)}")
        bad = np.flatnonzero(~(result < np.inf))
        if bad.size:
            value = "NaN" if np.isnan(result[bad[0]]) else "+inf"
            raise self._error(f"gave token {bad[0]} the logit {value}; a logit is a number or -inf")
        return result

    def _error(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.name} {what}", param="logits_processors")


class ProcessorBook:
    """The processors of the requests that have any. False while there are none, which is all it costs others."""

    def __init__(self) -> None:
        self._processors: dict[SequenceGroup, list[CustomProcessor]] = {}

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __contains__(self, group: SequenceGroup) -> bool:
        return group in self._processors

    def open(self, group: SequenceGroup) -> None:
        """A request begins."""
        functions: Any = group.sampling_params.logits_processors
        if functions:
            self._processors[group] = [_described(number, function) for number, function in enumerate(functions)]

    def close(self, group: SequenceGroup) -> None:
        """A request has ended. No effect on one without processors."""
        self._processors.pop(group, None)

    def apply(self, group: SequenceGroup, token_ids: ListLike[int], logits: Logits) -> None:
        """Let the processors of `group`, in their order, change `logits` in place; `token_ids` is the prompt and all
        tokens after it.

        Raises:
            InvalidRequestError: one of them failed; `logits` are as they were before it.
        """
        num_prompt_tokens = len(group.prompt_token_ids)
        for processor in self._processors[group]:
            logits[:] = processor(group.prompt_token_ids, token_ids[num_prompt_tokens:], logits)


def shown_text(error: Exception) -> str:
    """What an exception says, in at most 200 characters."""
    try:
        text = str(error)
    except Exception:
        return "(no message)"
    return text if len(text) <= 200 else text[:197] + "..."


def _described(number: int, function: Callable[..., Any]) -> CustomProcessor:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    try:
        parameters = inspect.signature(function).parameters.values()
        required = [
            parameter
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            and parameter.default is parameter.empty
        ]
        wants_prompt = len(required) == 3
    except (TypeError, ValueError):  # some callables of C have none
        wants_prompt = False
    return CustomProcessor(f"logits_processors[{number}] ({name})", function, wants_prompt)
