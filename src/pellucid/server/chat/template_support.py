"""What a model's chat template takes: of tools it is found out by rendering a conversation that has some, of its
switches by the variables that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pellucid.core.errors import PellucidError
from pellucid.tokenizer.tokenizer import Tokenizer

_NAME, _KEY, _RESULT, _QUESTION = "probe_name", "probe_key", "probe result", "probe question"
_ID = "probe0123"
_SWITCHES: tuple[Literal["enable_thinking", "thinking"], ...] = ("enable_thinking", "thinking")
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}


@dataclass(frozen=True, slots=True)
class TemplateSupport:
    """What a chat template takes.

    Attributes:
        tools: the variable that it writes tools from; None if it writes none.
        calls: whether it writes the calls and results of earlier turns.
        several_calls: whether one turn may have several calls.
        arguments: how it takes the arguments of a call.
        thinking: the variable that turns reasoning on and off; None if it reads none.
        effort: whether it reads how much the model is to think, as `reasoning_effort`.
    """

    tools: Literal["tools", "xml_tools"] | None = None
    calls: bool = False
    several_calls: bool = False
    arguments: Literal["object", "text"] = "object"
    thinking: Literal["enable_thinking", "thinking"] | None = None
    effort: bool = False

    @property
    def without_tools(self) -> TemplateSupport:
        """The same of a template whose tools are of no use."""
        return TemplateSupport(thinking=self.thinking, effort=self.effort)


NO_SUPPORT = TemplateSupport()
"""Of a template that knows nothing of tools, and has no switches."""


def template_support(tokenizer: Tokenizer) -> TemplateSupport:
    """What the chat template of `tokenizer` takes; nothing where it has none, or a faulty one."""
    if not tokenizer.has_chat_template:
        return NO_SUPPORT
    try:
        variables = tokenizer.chat_template_variables
    except PellucidError:
        return NO_SUPPORT
    support = TemplateSupport(
        thinking=next((name for name in _SWITCHES if name in variables), None), effort="reasoning_effort" in variables
    )
    tools: Literal["tools", "xml_tools"] | None = None
    if _NAME in _rendered(tokenizer, [_user()], tools=[_TOOL]):
        tools = "tools"
    elif _NAME in _rendered(tokenizer, [_user()], xml_tools=[_TOOL["function"]]):
        tools = "xml_tools"
    given = tool_variables(tools, [_TOOL])
    for arguments in _ARGUMENTS:
        text = _rendered(tokenizer, _conversation(1, arguments), **given)
        if f'"{_KEY}"' in text and _RESULT in text:
            several = _rendered(tokenizer, _conversation(2, arguments), **given)
            is_more = several.count(f'"{_KEY}"') > text.count(f'"{_KEY}"')
            return replace(support, tools=tools, calls=True, several_calls=is_more, arguments=arguments)
    return replace(support, tools=tools)


def tool_variables(name: str | None, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The variables of a template that takes `tools`, which are in OpenAI's form, under `name`."""
    if not tools or name is None:
        return {}
    return {"tools": list(tools)} if name == "tools" else {name: [tool["function"] for tool in tools]}


def knows_developer(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has the role "developer", which is what OpenAI came to call "system"."""
    return "developer" in (tokenizer.chat_template or "")


def generation_prompt(tokenizer: Tokenizer, **template_kwargs: Any) -> str:
    """What the template writes after the last message, to open the assistant's turn; "" where that cannot be told."""
    return _rendered(tokenizer, [_user()], **template_kwargs).rpartition(_QUESTION)[2]


_ARGUMENTS: tuple[Literal["object", "text"], ...] = ("object", "text")


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _QUESTION}


def _conversation(num_calls: int, arguments: str) -> list[dict[str, Any]]:
    value: Any = {_KEY: "x"} if arguments == "object" else f'{{"{_KEY}": "x"}}'
    ids = [_ID[:-1] + str(number) for number in range(num_calls)]
    function = {"name": _NAME, "arguments": value}
    calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
    results = [{"role": "tool", "tool_call_id": call_id, "name": _NAME, "content": _RESULT} for call_id in ids]
    return [_user(), {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], **variables: Any) -> str:
    try:
        return tokenizer.render_chat_template(messages, **variables)
    except PellucidError:
        return ""
