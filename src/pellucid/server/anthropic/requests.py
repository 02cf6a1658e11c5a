"""Request bodies of the Anthropic API: checked, and rewritten as the chat completions that they are.

Nothing is ignored: a parameter that is not supported is refused by its name, unless its value asks for nothing. `null`
is as good as leaving a parameter out. (https://docs.anthropic.com/en/api/messages)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from pellucid.core.validation import INT32_MAX, check_boolean, check_integer, check_strings, shown
from pellucid.server.anthropic.conversation import read_conversation
from pellucid.server.anthropic.errors import ThreadsNotSupportedError
from pellucid.server.chat.conversation import check_cache_control
from pellucid.server.chat.effort import with_variables
from pellucid.server.json_fields import (
    Neutral,
    check_fields,
    check_neutral,
    read_choice,
    read_list,
    read_object,
    read_schema,
    read_string,
    required,
)
from pellucid.server.openai.chat_body import EXTENSION_FIELDS, extensions, parse_chat_body
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.served_model import ServedModel

LEAST_BUDGET_TOKENS = 1024
"""Of `thinking`."""
EFFORTS = ("low", "medium", "high", "xhigh", "max")
DEFAULT_EFFORT = "high"
"""What answers have that say nothing of effort."""

PROMPT_FIELDS = frozenset(("messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control"))
"""What the prompt is made of."""
_FIELDS = PROMPT_FIELDS | {"model", "max_tokens", "stop_sequences", "stream", "metadata", "user_profile_id"}
NEUTRAL: Neutral = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "output_format": (),
    "thread": (),
}
"""Parameters that are not supported, with the values that ask for nothing."""
NEUTRAL_OF_COUNTING: Neutral = {name: NEUTRAL[name] for name in ("mcp_servers", "context_management", "speed")}
NEUTRAL_OF_TOOLS: Neutral = {
    "type": ("custom",),
    "input_examples": ([],),
    "defer_loading": (False,),
    "allowed_callers": (["direct"],),
    "eager_input_streaming": (False, True),  # arguments come as they are written
}
_RENAMINGS = (
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
    (r"tool_choice\.function", "tool_choice"),
    (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
)


def parse_messages(body: Mapping[str, Any], model: ServedModel) -> GenerationRequest:
    """The body of `POST /v1/messages`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ThreadsNotSupportedError: it asks for a conversation to be kept.
        ModelNotFoundError: it asks for another model.
        ModelFileError: the model's chat template is faulty.
    """
    fields = read_object("body", body)
    if "thread" in fields:
        raise ThreadsNotSupportedError(
            "thread is not supported: nothing is stored here, send all messages", param="thread"
        )
    check_fields("", fields, (_FIELDS | EXTENSION_FIELDS) - {"stop"}, NEUTRAL)
    _check_labels(fields)
    chat = extensions(fields)
    chat["max_tokens"] = check_integer("max_tokens", required("", fields, "max_tokens"), 1, INT32_MAX)
    chat["stream"] = check_boolean("stream", fields.get("stream", False))
    if "stop_sequences" in fields:
        stop = read_list("stop_sequences", fields["stop_sequences"], "a list of strings")
        chat["stop"] = list(check_strings("stop_sequences", stop, MAX_STOP_STRINGS, MAX_STOP_CHARACTERS))
    return _parse(fields, chat, model)


def parse_count_tokens(body: Mapping[str, Any], model: ServedModel) -> int:
    """The body of `POST /v1/messages/count_tokens`: how many tokens the prompt of such a message has.

    Raises:
        As `parse_messages`.
    """
    fields = read_object("body", body)
    check_fields("", fields, PROMPT_FIELDS | {"model", "chat_template_kwargs"}, NEUTRAL_OF_COUNTING)
    return len(_parse(fields, extensions(fields), model).prompts[0])


def _parse(fields: dict[str, Any], chat: dict[str, Any], model: ServedModel) -> GenerationRequest:
    """The request that `chat`, of which `fields` have the prompt, is."""
    check_cache_control("cache_control", fields.get("cache_control"))
    conversation = read_conversation(fields.get("system"), required("", fields, "messages"))
    chat["model"] = read_string("model", required("", fields, "model"))
    chat["messages"] = conversation.messages
    if "tools" in fields:
        chat["tools"] = [
            _tool(f"tools[{index}]", tool) for index, tool in enumerate(read_list("tools", fields["tools"]))
        ]
    if "tool_choice" in fields:
        chat |= _tool_choice(read_object("tool_choice", fields["tool_choice"]))
    chat |= _output_config(read_object("output_config", fields.get("output_config", {})), chat, model)
    if "thinking" in fields:
        chat |= _thinking(read_object("thinking", fields["thinking"]), chat, model)
    request = parse_chat_body(chat, model, _RENAMINGS)
    if conversation.prefill:
        if request.chat.reasoning == "begun":
            raise InvalidRequestError(
                "messages cannot end with an assistant message: answers begin with thinking, unless it is disabled",
                param="messages",
            )
        prompt = request.prompts[0]
        assert isinstance(prompt, list)  # a chat's always is
        ids = model.tokenizer.encode(conversation.prefill, add_special_tokens=False)
        request = replace(request, prompts=[[*prompt, *ids]])
    return request


def _check_labels(fields: Mapping[str, Any]) -> None:
    """Strings that name the caller; no answer depends on them."""
    metadata = read_object("metadata", fields.get("metadata", {}))
    check_fields("metadata", metadata, ("user_id",))
    read_string("metadata.user_id", metadata.get("user_id", ""))
    read_string("user_profile_id", fields.get("user_profile_id", ""))


def _tool(path: str, tool: Any) -> dict[str, Any]:
    """A tool in the form of chat completions."""
    fields = read_object(path, tool)
    if fields.get("type", "custom") != "custom":
        raise InvalidRequestError(
            f"{path} is of type {shown(fields['type'])}, which is not supported: describe a tool by its input_schema",
            param=f"{path}.type",
        )
    check_fields(path, fields, ("name", "description", "input_schema", "strict", "cache_control"), NEUTRAL_OF_TOOLS)
    check_cache_control(f"{path}.cache_control", fields.get("cache_control"))
    function: dict[str, Any] = {
        "name": read_string(f"{path}.name", required(path, fields, "name")),
        "parameters": read_schema(f"{path}.input_schema", required(path, fields, "input_schema")),
    }
    if "description" in fields:
        function["description"] = read_string(f"{path}.description", fields["description"])
    if "strict" in fields:
        function["strict"] = check_boolean(f"{path}.strict", fields["strict"])
    return {"type": "function", "function": function}


def _tool_choice(fields: dict[str, Any]) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` of chat completions."""
    kind = read_choice("tool_choice.type", required("tool_choice", fields, "type"), ("auto", "any", "tool", "none"))
    own = {"auto": (), "any": (), "tool": ("name",), "none": ()}[kind]
    check_fields("tool_choice", fields, ("type", "disable_parallel_tool_use", *own))
    chat: dict[str, Any] = {"tool_choice": {"any": "required"}.get(kind, kind)}
    if kind == "tool":
        name = read_string("tool_choice.name", required("tool_choice", fields, "name"))
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    if "disable_parallel_tool_use" in fields:
        path = "tool_choice.disable_parallel_tool_use"
        chat["parallel_tool_calls"] = not check_boolean(path, fields["disable_parallel_tool_use"])
    return chat


def _thinking(fields: dict[str, Any], chat: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """`chat_template_kwargs` of chat completions: most templates of models that can think have a switch for it."""
    kind = read_choice("thinking.type", required("thinking", fields, "type"), ("enabled", "disabled", "adaptive"))
    check_fields("thinking", fields, {"enabled": ("type", "budget_tokens", "display")}.get(kind, ("type", "display")))
    check_neutral("thinking.display", fields.get("display", "summarized"), ("summarized",))
    if kind == "enabled":
        # It is a target, says Anthropic: nothing is cut off at it.
        budget = required("thinking", fields, "budget_tokens")
        most = chat.get("max_tokens", INT32_MAX) - 1
        what = f"an integer from {LEAST_BUDGET_TOKENS}, and less than max_tokens"
        check_integer("thinking.budget_tokens", budget, LEAST_BUDGET_TOKENS, most, what)
        if model.chat_format.reasoning is None:
            raise InvalidRequestError("thinking is not supported by this model: leave it out", param="thinking")
    if kind == "adaptive" or model.chat_format.reasoning is None:
        return {}
    switch = model.chat_format.template.thinking
    if kind == "disabled" and switch is None:
        raise InvalidRequestError("thinking cannot be disabled: this model has no switch for it", param="thinking")
    return _with_variables("thinking", {} if switch is None else {switch: kind == "enabled"}, chat)


def _with_variables(param: str, variables: dict[str, Any], chat: Mapping[str, Any]) -> dict[str, Any]:
    given = read_object("chat_template_kwargs", chat.get("chat_template_kwargs", {}))
    return {"chat_template_kwargs": with_variables(param, variables, given)}


def _output_config(fields: dict[str, Any], chat: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """`response_format` and `chat_template_kwargs` of chat completions."""
    check_fields("output_config", fields, ("format", "effort"))
    told: dict[str, Any] = {}
    if "effort" in fields:
        path = "output_config.effort"
        effort = read_choice(path, fields["effort"], EFFORTS)
        if model.chat_format.template.effort:
            told |= _with_variables(path, {"reasoning_effort": effort}, chat)
        elif effort != DEFAULT_EFFORT:
            raise InvalidRequestError(
                f"{path} is not supported: the chat template of this model does not read it", param=path
            )
    if "format" in fields:
        path = "output_config.format"
        form = read_object(path, fields["format"])
        check_fields(path, form, ("type", "schema"))
        read_choice(f"{path}.type", required(path, form, "type"), ("json_schema",))
        schema = read_schema(f"{path}.schema", required(path, form, "schema"))
        told["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    return told
