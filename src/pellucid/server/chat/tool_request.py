"""What a request says about its tools: `tools` and `tool_choice` of OpenAI's chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import MAX_SCHEMA_BYTES
from pellucid.core.validation import check_boolean, refusal, shown
from pellucid.server.chat.conversation import checked_object
from pellucid.server.chat.tool_formats.base import Tool

MAX_TOOLS = 128
NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"
_NO_PARAMETERS = {"type": "object", "properties": {}}
_CHOICES = '"none", "auto", "required", a function, or allowed_tools'
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def parse_tools(tools: Any) -> list[Tool]:
    """The functions of `tools`, each with `parameters`; none for None.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise refusal("tools", tools, "a list of tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools must be up to {MAX_TOOLS} tools, not {len(tools)} of them", param="tools")
    parsed = [_parse_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    seen: set[str] = set()
    for index, tool in enumerate(parsed):
        if tool["name"] in seen:
            raise InvalidRequestError(
                f"tools[{index}].function.name {tool['name']!r} is that of another tool",
                param=f"tools[{index}].function.name",
            )
        seen.add(tool["name"])
    return parsed


def _parse_tool(tool: Any, path: str) -> Tool:
    tool = checked_object(tool, path, ("type", "function"))
    if tool.get("type") != "function":
        raise refusal(f"{path}.type", tool.get("type"), '"function"')
    path, function = f"{path}.function", checked_object(tool.get("function"), f"{path}.function", _FUNCTION_FIELDS)
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN[1:-1], name):
        raise refusal(f"{path}.name", name, f"a string that matches {NAME_PATTERN}")
    parsed: Tool = {"name": name}
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str):
            raise refusal(f"{path}.description", description, "a string")
        parsed["description"] = description
    if function.get("strict") is not None:
        check_boolean(f"{path}.strict", function["strict"])
    parsed["parameters"] = _parse_parameters(function.get("parameters"), f"{path}.parameters")
    return parsed


def _parse_parameters(parameters: Any, path: str) -> Mapping[str, Any]:
    if parameters is None:
        return _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise refusal(path, parameters, "a JSON schema: an object")
    if parameters.get("type", "object") not in ("object", ["object"]):
        raise refusal(f"{path}.type", parameters["type"], '"object"')
    try:
        size = len(json.dumps(parameters, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{path} cannot be written as JSON: {error}", param=path) from None
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{path} is too large: {size:,} bytes, and at most {MAX_SCHEMA_BYTES:,} are taken", param=path
        )
    return parameters or _NO_PARAMETERS


def parse_choice(choice: Any, names: Sequence[str]) -> tuple[str, list[str]]:
    """ "none", "auto" or "required", and the names of the functions that may be called."""
    if choice is None:
        choice = "auto" if names else "none"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise refusal("tool_choice", choice, _CHOICES)
        mode, chosen = choice, list(names)
    else:
        mode, chosen = _parse_named(choice)
    if mode == "required" and not names:
        raise InvalidRequestError("tool_choice needs tools: none are given", param="tool_choice")
    for name in chosen:
        if name not in names:
            raise InvalidRequestError(
                f"tool_choice names {shown(name)}, which is not among tools: {', '.join(names) or 'there are none'}",
                param="tool_choice",
            )
    return (mode, chosen) if names else ("none", [])


def _parse_named(choice: Any) -> tuple[str, list[str]]:
    if not isinstance(choice, Mapping):
        raise refusal("tool_choice", choice, _CHOICES)
    kind = choice.get("type")
    if kind == "function":
        return "required", [_parse_reference(choice, "tool_choice")]
    if kind != "allowed_tools":
        raise refusal("tool_choice.type", kind, '"function" or "allowed_tools"')
    checked_object(choice, "tool_choice", ("type", "allowed_tools"))
    path = "tool_choice.allowed_tools"
    allowed = checked_object(choice.get("allowed_tools"), path, ("mode", "tools"))
    if allowed.get("mode") not in ("auto", "required"):
        raise refusal(f"{path}.mode", allowed.get("mode"), '"auto" or "required"')
    tools = allowed.get("tools")
    if not isinstance(tools, list | tuple) or not tools:
        raise refusal(f"{path}.tools", tools, "a list of functions that is not empty")
    return allowed["mode"], [_parse_reference(tool, f"{path}.tools[{index}]") for index, tool in enumerate(tools)]


def _parse_reference(reference: Any, path: str) -> str:
    reference = checked_object(reference, path, ("type", "function"))
    if reference.get("type") != "function":
        raise refusal(f"{path}.type", reference.get("type"), '"function"')
    name = checked_object(reference.get("function"), f"{path}.function", ("name",)).get("name")
    if not isinstance(name, str):
        raise refusal(f"{path}.function.name", name, "a string")
    return name
