"""How much a model is to think: variables of its chat template, from what a request says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.server.chat.formats import ChatFormat
from pellucid.server.json_fields import read_choice

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""OpenAI's. "none" is no reasoning at all."""


def effort_variables(effort: Any, given: Mapping[str, Any], model_format: ChatFormat) -> dict[str, Any]:
    """`given`, with what `reasoning_effort` makes of it. A template that can only turn reasoning on and off takes any
    effort but "none" for on, as with vLLM.

    Args:
        given: `chat_template_kwargs` of the request.

    Raises:
        InvalidRequestError: there is no such effort, the model cannot be told, or `given` says otherwise.
    """
    effort = read_choice("reasoning_effort", effort, EFFORTS)
    template, is_none = model_format.template, effort == "none"
    variables: dict[str, Any] = {"reasoning_effort": effort} if template.effort else {}
    if template.thinking is not None:
        variables[template.thinking] = not is_none
    if not variables and not (is_none and model_format.reasoning is None):
        raise InvalidRequestError(
            "reasoning_effort is not supported by this model: its chat template does not read it, and has no switch "
            "for reasoning",
            param="reasoning_effort",
        )
    return with_variables("reasoning_effort", variables, given)


def with_variables(param: str, variables: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both.

    Raises:
        InvalidRequestError: they differ; `param` is what `variables` came of.
    """
    for name, value in variables.items():
        if given.get(name, value) != value:
            raise InvalidRequestError(f"{param} and chat_template_kwargs.{name} differ: give one", param=param)
    return {**given, **variables}
