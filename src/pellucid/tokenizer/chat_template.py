"""Chat templates: a conversation to the text a model was tuned on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError

from pellucid.core.errors import InvalidRequestError, ModelFileError
from pellucid.core.validation import shown
from pellucid.tokenizer.literal_guard import LiteralGuard, unused_character
from pellucid.tokenizer.template_sandbox import (
    MAX_SECONDS,
    Budget,
    BudgetExceededError,
    RefusedByTemplateError,
    TemplateEnvironment,
    compile_template,
    render_template,
)
from pellucid.tokenizer.tokenizer import check_text

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"))

# What a request may hand to a template besides messages and tools: switches that published templates read.
TEMPLATE_KWARGS = frozenset(
    (
        "enable_thinking",
        "thinking",
        "preserve_thinking",
        "reasoning_effort",
        "date_string",
        "documents",
        "builtin_tools",
        "tools_in_user_message",
        "model_identity",
        "xml_tools",
        "python_tools",
    )
)
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered chat in which special tokens that users wrote are broken up by `mark`."""

    text: str
    mark: str


class ChatTemplate:
    """A model's chat template, in a sandbox with a budget of output and time (see `template_sandbox`).

    Renders what transformers renders. Safe to use from several threads.

    Args:
        source: Jinja source.
        special_tokens: `bos_token`, `eos_token`, ...: variables of the template; None leaves one undefined.
        max_seconds: time budget of one rendering.

    Raises:
        ModelFileError: the template is malformed, too long, or uses what is not offered.
    """

    def __init__(self, source: str, *, max_seconds: float = MAX_SECONDS, **special_tokens: str | None) -> None:
        self._source = source
        self._max_seconds = max_seconds
        self._special_tokens = {name: token for name, token in special_tokens.items() if token is not None}
        self._environment = TemplateEnvironment()
        try:
            self._template = compile_template(self._environment, source)
        except (jinja2.TemplateError, BudgetExceededError) as error:
            raise _faulty(f"cannot be used: {error}") from None
        self._guards: dict[tuple[str, ...], LiteralGuard] = {}

    @property
    def variables(self) -> frozenset[str]:
        """The names that it reads and does not set itself."""
        return frozenset(meta.find_undeclared_variables(self._environment.parse(self._source)))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: object,
    ) -> str:
        """The conversation as text.

        Args:
            messages: mappings with `role` (one of ROLES) and `content`: text, or a list of parts of type "text", which
                are joined by line breaks. An assistant message with `tool_calls` may have content None.
            add_generation_prompt: ends with the opening of an assistant turn.
            tools: JSON-schema descriptions of functions.
            kwargs: switches of the template, of TEMPLATE_KWARGS.

        Raises:
            InvalidRequestError: malformed messages, or the template refuses them.
            ModelFileError: the template exceeds its budget, or does what the sandbox forbids.
        """
        return self._render(self._variables(messages, add_generation_prompt, tools, kwargs))

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_texts: Sequence[str],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: object,
    ) -> MarkedText:
        """`render`, with the special tokens that users wrote broken up. Same arguments and errors.

        Args:
            special_texts: spellings of the special tokens.
        """
        variables = self._variables(messages, add_generation_prompt, tools, kwargs)
        guard = self._guards.get(key := tuple(special_texts))
        if guard is None:
            guard = self._guards[key] = LiteralGuard(special_texts, self._literals())
        mark = unused_character(self._source + json.dumps(variables, ensure_ascii=False))
        # Roles are from a fixed list, and templates build special tokens from them.
        marked = {
            name: value if name in self._special_tokens else guard.mark(value, mark)
            for name, value in variables.items()
        }
        for original, message in zip(variables["messages"], marked["messages"], strict=True):
            message["role"] = original["role"]
        return MarkedText(self._render(marked, mark), mark)

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, object],
    ) -> dict[str, Any]:
        check_template_kwargs(kwargs)
        if tools is not None:
            _check_list(tools, "tools")
        return {
            **self._special_tokens,
            **{name: _plain(value, f"chat_template_kwargs.{name}") for name, value in kwargs.items()},
            "messages": check_messages(messages),
            "tools": None if tools is None else [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)],
            "add_generation_prompt": bool(add_generation_prompt),
        }

    def _render(self, variables: dict[str, Any], mark: str = "") -> str:
        budget = Budget(len(json.dumps(variables)), max_seconds=self._max_seconds)
        try:
            return render_template(self._environment, self._template, budget, mark, variables)
        except RefusedByTemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        except (BudgetExceededError, MemoryError, RecursionError) as error:
            raise _faulty(f"was stopped: {str(error) or 'it nests too deeply'}") from None
        except SecurityError as error:
            raise _faulty(f"does what the sandbox forbids: {error}") from None
        except Exception as error:
            raise InvalidRequestError(
                f"the chat template fails on these messages: {type(error).__name__}: {str(error)[:1000]}",
                param="messages",
            ) from None

    def _literals(self) -> list[str]:
        tree = self._environment.parse(self._source)
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        return literals + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def check_template_kwargs(kwargs: Mapping[str, object]) -> None:
    """Raises InvalidRequestError unless all are options that a request may give a template."""
    for name in kwargs.keys() - TEMPLATE_KWARGS:
        raise InvalidRequestError(
            f"{shown(name)} is not an option of chat templates; options are {', '.join(sorted(TEMPLATE_KWARGS))}",
            param=f"chat_template_kwargs.{name}",
        )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts, text parts joined. Raises InvalidRequestError naming what is wrong."""
    _check_list(messages, "messages")
    if not messages:
        raise InvalidRequestError("messages is empty; at least one message is needed", param="messages")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: object, param: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{param} is a {type(message).__name__}; a mapping with role and content is expected", param=param
        )
    for key in message.keys() - MESSAGE_KEYS:
        raise InvalidRequestError(
            f"{param} has the unknown key {key!r}; known are {', '.join(sorted(MESSAGE_KEYS))}", param=f"{param}.{key}"
        )
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(
            f"{param}.role is {role!r}; one of {', '.join(ROLES)} is expected", param=f"{param}.role"
        )
    checked = {key: _plain(value, f"{param}.{key}") for key, value in message.items() if key != "content"}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(checked.get(key), str | None):
            found = type(checked[key]).__name__
            raise InvalidRequestError(f"{param}.{key} is a {found}; text is expected", param=f"{param}.{key}")
    calls = checked.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InvalidRequestError(
            f"{param}.tool_calls must be a list of objects, one for each call", param=f"{param}.tool_calls"
        )
    if "content" in message or not message.get("tool_calls"):
        checked["content"] = _content(
            message.get("content"), f"{param}.content", optional=bool(message.get("tool_calls"))
        )
    return checked


def _content(content: object, param: str, *, optional: bool) -> str | None:
    if isinstance(content, str):
        check_text(content, param)
        return content
    if content is None and optional:
        return None
    if not isinstance(content, list | tuple):
        found = "missing" if content is None else f"a {type(content).__name__}"
        raise InvalidRequestError(f"{param} is {found}; text, or a list of text parts, is expected", param=param)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequestError(
                f'{param}[{index}] is of type {kind!r}; only {{"type": "text", "text": ...}} is supported',
                param=f"{param}[{index}]",
            )
        check_text(part["text"], f"{param}[{index}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_list(value: object, param: str) -> None:
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{param} is a {type(value).__name__}; a list is expected", param=param)


def _plain(value: object, param: str, depth: int = 0) -> Any:
    """A copy made of JSON types only, so that a template sees nothing else."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        check_text(value, param)
        return value
    if depth == _MAX_DEPTH:
        raise InvalidRequestError(f"{param} is nested more than {_MAX_DEPTH} deep", param=param)
    if isinstance(value, list | tuple):
        return [_plain(item, param, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_plain(key, param): _plain(item, param, depth + 1) for key, item in value.items()}
    raise InvalidRequestError(f"{param} holds a {type(value).__name__}, which is not JSON", param=param)


def _faulty(what: str) -> ModelFileError:
    return ModelFileError(f"the model's chat template {what}", param="tokenizer.chat_template")
