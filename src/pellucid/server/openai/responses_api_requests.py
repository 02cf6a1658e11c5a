"""Request bodies of the Responses API: checked, and rewritten as the chat completions that they are.

Nothing is stored, so whatever refers to what was stored is refused. Nothing is ignored: a parameter that is not
supported is refused by its name, unless its value asks for nothing. `null` is as good as leaving a parameter out.
(https://platform.openai.com/docs/api-reference/responses/create)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import MAX_LOGPROBS
from pellucid.core.validation import INT32_MAX, check_boolean, check_integer, shown
from pellucid.server.json_fields import (
    Neutral,
    check_fields,
    check_neutral,
    read_choice,
    read_list,
    read_object,
    read_string,
    required,
)
from pellucid.server.openai.chat_body import EXTENSION_FIELDS, extensions, parse_chat_body
from pellucid.server.openai.fields import CACHE_RETENTIONS, LABELS, check_cache_options, metadata
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.openai.responses_api_items import read_input
from pellucid.server.served_model import ServedModel

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",  # reasoning comes in the clear, and is taken back so
    # Parts of what built-in tools return, and of images: there are none.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What `include` may name."""

FIELDS = frozenset(
    (
        "model",
        "input",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "include",
        "top_logprobs",
        "stream",
        "stream_options",
        "store",
        "metadata",
        "prompt_cache_options",
        *LABELS,
    )
)
NEUTRAL: Neutral = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_retention": CACHE_RETENTIONS,
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
}
_STORED = ("conversation", "previous_response_id", "prompt")
"""What refers to something that was stored."""
NEUTRAL_OF_TOOLS: Neutral = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "output_schema": (),
}
NEUTRAL_OF_REASONING: Neutral = {
    "summary": ("auto",),  # as the model can: its reasoning comes whole
    "generate_summary": ("auto",),
    "context": ("auto",),
    "mode": ("standard",),
}
"""Parameters that are not supported, with the values that ask for nothing."""
_RENAMINGS = (
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"max_completion_tokens|max_tokens", "max_output_tokens"),
    (r"(tools\[\d+\])\.function", r"\1"),
    (r"tool_choice\.function", "tool_choice"),
    (r"tool_choice\.allowed_tools", "tool_choice"),
)


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """What a body asks for.

    Attributes:
        generation: the chat that it is.
        echo: the fields of the response that say what was asked for.
    """

    generation: GenerationRequest
    echo: dict[str, Any]


def parse_response(body: Mapping[str, Any], model: ServedModel) -> ResponsesRequest:
    """The body of `POST /v1/responses`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ModelNotFoundError: it asks for another model.
        ModelFileError: the model's chat template is faulty.
    """
    fields = read_object("body", body)
    for name in _STORED:
        if name in fields:
            raise InvalidRequestError(
                f"{name} is not supported: nothing is stored here, so send all that was said before as input",
                param=name,
            )
    check_fields("", fields, FIELDS | EXTENSION_FIELDS, NEUTRAL)
    for name in LABELS:
        read_string(name, fields.get(name, ""))
    check_cache_options(fields)
    check_boolean("store", fields.get("store", False))
    stream = check_boolean("stream", fields.get("stream", False))
    _check_stream_options(fields, stream=stream)
    chat = extensions(fields)
    chat["stream"] = stream
    chat["messages"] = read_input(fields.get("instructions"), required("", fields, "input"))
    if "model" in fields:
        chat["model"] = read_string("model", fields["model"])
    if "max_output_tokens" in fields:
        chat["max_tokens"] = check_integer("max_output_tokens", fields["max_output_tokens"], 1, INT32_MAX)
    if "tools" in fields:
        chat["tools"] = [
            _tool(f"tools[{index}]", tool) for index, tool in enumerate(read_list("tools", fields["tools"]))
        ]
    if "tool_choice" in fields:
        chat["tool_choice"] = _tool_choice(fields["tool_choice"])
    if "parallel_tool_calls" in fields:
        chat["parallel_tool_calls"] = fields["parallel_tool_calls"]
    chat |= _text(read_object("text", fields.get("text", {})))
    chat |= _reasoning(read_object("reasoning", fields.get("reasoning", {})))
    chat |= _logprobs(fields)
    request = parse_chat_body(chat, model, _RENAMINGS)
    return ResponsesRequest(request, _echo(fields, request))


def _check_stream_options(fields: Mapping[str, Any], *, stream: bool) -> None:
    if "stream_options" not in fields:
        return
    if not stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    options = read_object("stream_options", fields["stream_options"])
    check_fields("stream_options", options, ("include_obfuscation",))
    check_neutral("stream_options.include_obfuscation", options.get("include_obfuscation", False), (False,))


def _tool(path: str, tool: Any) -> dict[str, Any]:
    """A tool in the form of chat completions."""
    fields = read_object(path, tool)
    if required(path, fields, "type") != "function":
        raise InvalidRequestError(
            f"{path} is of type {shown(fields['type'])}, which is not supported: only functions are",
            param=f"{path}.type",
        )
    check_fields(path, fields, ("type", "name", "description", "parameters", "strict"), NEUTRAL_OF_TOOLS)
    function: dict[str, Any] = {"name": read_string(f"{path}.name", required(path, fields, "name"))}
    function |= {name: fields[name] for name in ("description", "parameters", "strict") if name in fields}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    """`tool_choice` of chat completions."""
    if isinstance(choice, str):
        return read_choice("tool_choice", choice, ("none", "auto", "required"))
    fields = read_object("tool_choice", choice)
    kind = required("tool_choice", fields, "type")
    if kind == "function":
        return _function_reference("tool_choice", fields)
    if kind == "allowed_tools":
        check_fields("tool_choice", fields, ("type", "mode", "tools"))
        path = "tool_choice.tools"
        tools = read_list(path, required("tool_choice", fields, "tools"))
        allowed = [_function_reference(f"{path}[{index}]", tool) for index, tool in enumerate(tools)]
        return {"type": kind, kind: {"mode": required("tool_choice", fields, "mode"), "tools": allowed}}
    raise InvalidRequestError(
        f'tool_choice is of type {shown(kind)}, which is not supported: "none", "auto", "required", a function and '
        "allowed_tools are",
        param="tool_choice",
    )


def _function_reference(path: str, reference: Any) -> dict[str, Any]:
    """What names a function in `tool_choice` of chat completions."""
    fields = read_object(path, reference)
    check_fields(path, fields, ("type", "name"))
    read_choice(f"{path}.type", required(path, fields, "type"), ("function",))
    return {"type": "function", "function": {"name": required(path, fields, "name")}}


def _text(fields: dict[str, Any]) -> dict[str, Any]:
    """`response_format` of chat completions."""
    check_fields("text", fields, ("format", "verbosity"))
    check_neutral("text.verbosity", fields.get("verbosity", "medium"), ("medium",))
    if "format" not in fields:
        return {}
    form = read_object("text.format", fields["format"])
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return {"response_format": form}


def _reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    """`reasoning_effort` of chat completions."""
    check_fields("reasoning", fields, ("effort",), NEUTRAL_OF_REASONING)
    if "effort" not in fields:
        return {}
    return {"reasoning_effort": read_string("reasoning.effort", fields["effort"])}


def _logprobs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`logprobs` and `top_logprobs` of chat completions."""
    includes = read_list("include", fields.get("include", []), "a list of strings")
    for index, name in enumerate(includes):
        read_choice(f"include[{index}]", name, INCLUDABLE)
    top_logprobs = check_integer("top_logprobs", fields.get("top_logprobs", 0), 0, MAX_LOGPROBS)
    if LOGPROBS in includes:
        return {"logprobs": True, "top_logprobs": top_logprobs}
    if top_logprobs:
        raise InvalidRequestError(f'top_logprobs needs include: ["{LOGPROBS}"]', param="top_logprobs")
    return {}


def _echo(fields: Mapping[str, Any], request: GenerationRequest) -> dict[str, Any]:
    params = request.sampling_params
    text = {"format": {"type": "text"}, **read_object("text", fields.get("text", {}))}
    return {
        "background": False,
        "conversation": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": _max_tool_calls(fields),
        "metadata": metadata(fields),
        "model": request.model,
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": fields.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None, **read_object("reasoning", fields.get("reasoning", {}))},
        "safety_identifier": fields.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": text,
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.get("tools", []),
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": fields.get("user"),
    }


def _max_tool_calls(fields: Mapping[str, Any]) -> int | None:
    """The most calls of built-in tools, of which there are none."""
    return (
        None
        if "max_tool_calls" not in fields
        else check_integer("max_tool_calls", fields["max_tool_calls"], 1, INT32_MAX)
    )
