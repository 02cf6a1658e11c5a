"""The tools that a chat request offers, and what becomes of the prompt and the answer because of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.chat.formats import ChatFormat

if TYPE_CHECKING:
    from pellucid.server.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """What a request says about tools, and how its answers are read: `model.chat_format.parser(turn)` for each.

    Attributes:
        tools: what the request offers, in OpenAI's form, checked.
        tool_choice: "none", "auto" or "required" (a function that is named is required, and the only one).
        parallel_tool_calls: whether an answer may have more than one call.
        begins_in_reasoning: the prompt ends with the opening of a reasoning block, so that the answer begins in it.
    """

    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "none"
    parallel_tool_calls: bool = True
    begins_in_reasoning: bool = False

    def sampling_params(self, params: SamplingParams) -> SamplingParams:
        """`params`, with what the turn needs for its answers to be read: a grammar for the calls, and special tokens
        that are not left out of the text. Apply it last, to the turn that `render_chat` gives back.

        Raises:
            InvalidRequestError: `params` has a grammar of its own, and there are tools.
        """
        return params


def parse_chat_turn(tools: Any, tool_choice: Any, parallel_tool_calls: Any, model_format: ChatFormat) -> ChatTurn:
    """The turn that these fields of OpenAI's chat completions ask for; None for those that are not given.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
    """
    if tools:
        raise InvalidRequestError("tools is not supported: leave it out", param="tools")
    return ChatTurn()


def render_chat(
    messages: Sequence[Mapping[str, Any]], turn: ChatTurn, model: ServedModel, **template_kwargs: Any
) -> tuple[list[int], ChatTurn]:
    """The prompt's token ids, with the tools in it, and `turn` as the prompt makes it: it may end within reasoning.

    Args:
        messages: in OpenAI's form; an assistant's `tool_calls`, and results with the role "tool".

    Raises:
        InvalidRequestError: malformed messages, or the template refuses them.
        ModelFileError: the model's chat template is faulty.
    """
    return model.tokenizer.apply_chat_template(messages, **template_kwargs), turn
