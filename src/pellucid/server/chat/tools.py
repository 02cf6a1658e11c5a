"""The tools that a chat request offers, and what becomes of the prompt and the answer because of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pellucid.core.errors import InvalidRequestError, PellucidError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structural_tag import Format
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.validation import check_boolean
from pellucid.server.chat.conversation import as_plain_turns, for_template, read_messages, with_instructions
from pellucid.server.chat.formats import PLAIN_TEXT, ChatFormat
from pellucid.server.chat.template_support import generation_prompt, knows_developer, tool_variables
from pellucid.server.chat.tool_formats.base import Tool
from pellucid.server.chat.tool_request import parse_choice, parse_tools
from pellucid.tokenizer.chat_template import check_template_kwargs

if TYPE_CHECKING:
    from pellucid.server.served_model import ServedModel

_OPEN_OBJECT = frozenset(
    (
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "propertyNames",
        "minProperties",
        "$ref",
        "$dynamicRef",
        "allOf",
        "anyOf",
        "oneOf",
        "if",
        "not",
        "dependentSchemas",
        "enum",
        "const",
    )
)
"""Keywords under which an object may have properties beside its `properties`."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """What a request says about tools, and how its answers are read: `model.chat_format.parser(turn)` for each.

    Attributes:
        tools: what the prompt tells of: functions with a `name`, `parameters` and maybe a `description`.
        callable_names: those that the answer may call; none where there are no tools, or none may be called.
        is_required: the answer is calls and nothing else.
        parallel_tool_calls: whether an answer may have more than one call.
        has_format: the request says what the text of an answer must look like. So an answer is calls or text, never
            both.
        reasoning: whether the answer begins within reasoning, may begin with it, or is told not to.
        format: of the model.
    """

    tools: tuple[Tool, ...] = ()
    callable_names: tuple[str, ...] = ()
    is_required: bool = False
    parallel_tool_calls: bool = True
    has_format: bool = False
    reasoning: Literal["begun", "possible", "off"] = "off"
    format: ChatFormat = PLAIN_TEXT

    @property
    def is_constrained(self) -> bool:
        """Whether the answer follows a grammar for the sake of its calls."""
        return bool(self.callable_names)

    @property
    def skips_special_tokens(self) -> bool:
        """Whether the answer can be read without the special tokens in it."""
        tools, reasoning = self.format.tools, self.format.reasoning
        markers = [*(tools.markers if tools and self.callable_names else ()), *(reasoning.markers if reasoning else ())]
        return not self.format.special_in(markers)

    def sampling_params(self, params: SamplingParams) -> SamplingParams:
        """`params`, with what the turn needs for its answers to be read: a grammar for the calls, and special tokens
        that are not left out of the text. What `params` itself asks an answer to look like is asked of what follows the
        reasoning, where no call does. Of the turn that `render_chat` gives back.

        Raises:
            InvalidRequestError: `params` asks for what cannot be told from calls, or the grammar is too large.
        """
        asked = params.structured_outputs
        if self.callable_names:
            assert self.has_format or asked is None
            form = self._answer_format(asked)
            try:
                asked = StructuredOutputsParams(structural_tag={"format": form})
            except InvalidRequestError as error:  # all together are too large
                raise self.blamed(error) from None
        elif asked is not None and self.reasoning != "off":
            asked = self._after_reasoning(asked)
        skip = params.skip_special_tokens and self.skips_special_tokens
        return replace(params, structured_outputs=asked, skip_special_tokens=skip)

    def blamed(self, error: PellucidError) -> PellucidError:
        """An error of the grammar that `sampling_params` asked for, as one of the request's `tools`."""
        of_grammar = isinstance(error, InvalidRequestError) and (error.param or "").startswith("structured_outputs")
        if not self.callable_names or not of_grammar:
            return error
        text = ", and the text to its form" if self.has_format and not self.is_required else ""
        reason = re.sub(r"^structured_outputs(\.structural_tag)?", "the grammar of the calls", error.message)
        return InvalidRequestError(f"tools cannot be held to their parameters{text}: {reason}", param="tools")

    def _answer_format(self, asked: StructuredOutputsParams | None) -> Format:
        tool_format = self.format.tools
        assert tool_format is not None
        tools = [
            {**tool, "parameters": _held_to(tool["parameters"])}
            for tool in self.tools
            if tool["name"] in self.callable_names
        ]
        if self.is_required:
            return self._with_reasoning(tool_format.required(tools, parallel=self.parallel_tool_calls), "\n\n")
        if asked is not None:
            content = _format_of(asked)
            if content is None:
                raise InvalidRequestError(
                    "a structural tag says what the whole answer looks like, calls among it: leave tools out, or set "
                    'tool_choice to "none"',
                    param="structured_outputs",
                )
            either = tool_format.either(tools, content, parallel=self.parallel_tool_calls)
            return self._with_reasoning(either, "\n\n")
        answer = self._with_reasoning(tool_format.optional(tools, parallel=self.parallel_tool_calls))
        if self.reasoning != "begun":
            return answer
        return {"type": "or", "elements": [answer, {"type": "any_text"}]}  # it may end before the reasoning does

    def _after_reasoning(self, asked: StructuredOutputsParams) -> StructuredOutputsParams:
        content = _format_of(asked)
        if content is None:
            return asked
        return StructuredOutputsParams(structural_tag={"format": self._with_reasoning(content, "\n\n")})

    def _with_reasoning(self, answer: Format, between: str = "") -> Format:
        """The format of an answer that comes after reasoning, or may."""
        reasoning = self.format.reasoning
        if reasoning is None or self.reasoning == "off":
            return answer
        begin = "" if self.reasoning == "begun" else reasoning.open
        thought = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": reasoning.close}
        space = [{"type": "const_string", "value": between}] if between else []
        thoughtful = {"type": "sequence", "elements": [thought, *space, answer]}
        return thoughtful if self.reasoning == "begun" else {"type": "or", "elements": [thoughtful, answer]}


def parse_chat_turn(
    tools: Any, tool_choice: Any, parallel_tool_calls: Any, model_format: ChatFormat, *, has_format: bool = False
) -> ChatTurn:
    """The turn that these fields of OpenAI's chat completions ask for; None for those that are not given.

    Args:
        has_format: whether the request says what the text of the answer must look like.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
    """
    parallel = True if parallel_tool_calls is None else check_boolean("parallel_tool_calls", parallel_tool_calls)
    offered = parse_tools(tools)
    reasoning: Literal["possible", "off"] = "off" if model_format.reasoning is None else "possible"
    turn = ChatTurn(parallel_tool_calls=parallel, has_format=has_format, reasoning=reasoning, format=model_format)
    mode, names = parse_choice(tool_choice, [tool["name"] for tool in offered])
    if mode == "none":
        return turn
    if model_format.tools is None:
        raise InvalidRequestError("tools is not supported: this model has no format of tool calls", param="tools")
    return replace(turn, tools=tuple(offered), callable_names=tuple(names), is_required=mode == "required")


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    turn: ChatTurn,
    model: ServedModel,
    *,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> tuple[list[int], ChatTurn]:
    """The prompt's token ids, with the tools in it, and `turn` as the prompt makes it: it may end within reasoning.

    Args:
        messages: in OpenAI's form; an assistant's `tool_calls`, and results with the role "tool".
        add_generation_prompt: end with what opens the assistant's turn.

    Raises:
        InvalidRequestError: malformed messages, or the template refuses them.
        ModelFileError: the model's chat template is faulty.
    """
    check_template_kwargs(template_kwargs)
    tokenizer, support, tool_format = model.tokenizer, turn.format.template, turn.format.tools
    read = read_messages(messages)
    if not knows_developer(tokenizer):
        read = [{**message, "role": "system"} if message["role"] == "developer" else message for message in read]
    tools = [{"type": "function", "function": tool} for tool in turn.tools]
    variables = tool_variables(support.tools, tools)
    for name in variables.keys() & template_kwargs.keys():
        raise InvalidRequestError(
            f"chat_template_kwargs.{name} is what tools are given as: give tools alone",
            param=f"chat_template_kwargs.{name}",
        )
    if tool_format is not None:
        adapt = partial(for_template, support=support) if support.calls else as_plain_turns
        read = adapt(read, tools=tool_format)
        if tools and not variables:
            read = with_instructions(read, turn.tools, tool_format)
    if turn.format.reasoning is not None:
        turn = replace(turn, reasoning=_reasoning_of(turn, generation_prompt(tokenizer, **template_kwargs)))
    token_ids = tokenizer.apply_chat_template(
        read, add_generation_prompt, max_tokens=model.max_model_len - 1, **variables, **template_kwargs
    )
    return token_ids, turn


def _reasoning_of(turn: ChatTurn, opening: str) -> Literal["begun", "possible", "off"]:
    """Where the answer begins, by what opens the assistant's turn."""
    reasoning = turn.format.reasoning
    assert reasoning is not None
    opened, closed = opening.rfind(reasoning.open.strip()), opening.rfind(reasoning.close)
    if closed > opened:
        return "off"
    return "begun" if opened >= 0 or reasoning.always_begun else "possible"


def _held_to(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that arguments are held to: an object, which has no properties beside those that are listed unless the
    schema says something of others."""
    schema = {"type": "object", **parameters}
    if not _OPEN_OBJECT & schema.keys():
        schema["additionalProperties"] = False
    return schema


def _format_of(asked: StructuredOutputsParams) -> Format | None:
    """What is asked of an answer, as a part of a structural tag; None where it is one itself."""
    if asked.json is not None or asked.json_object:
        schema = {"type": "object"} if asked.json_object else json.loads(str(asked.json))
        space = {} if asked.whitespace_pattern is None else {"whitespace_pattern": asked.whitespace_pattern}
        return {"type": "json_schema", "json_schema": schema, **space}
    if asked.regex is not None:
        return {"type": "regex", "pattern": asked.regex}
    if asked.choice is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": choice} for choice in asked.choice]}
    return {"type": "grammar", "grammar": asked.grammar} if asked.grammar is not None else None
