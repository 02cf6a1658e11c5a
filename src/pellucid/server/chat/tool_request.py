"""What a request says about its tools: `tools` and `tool_choice` of OpenAI's chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import MAX_SCHEMA_BYTES
from pellucid.core.validation import check_boolean, refusal, shown
from pellucid.server.chat.tool_formats.base import Tool
from pellucid.server.json_fields import check_fields, read_choice, read_list, read_object, read_string, required

MAX_TOOLS = 128
NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"
_NO_PARAMETERS = {"type": "object", "properties": {}}
_MODES = ("none", "auto", "required")


def parse_tools(tools: Any) -> list[Tool]:
    """The functions of `tools`, each with `parameters`; none for None.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
    """
    if tools is None:
        return []
    tools = read_list("tools", tools)
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools must be up to {MAX_TOOLS} tools, not {len(tools)} of them", param="tools")
    parsed = [
        _parse_tool(f"tools[{index}].function", _function(f"tools[{index}]", tool)) for index, tool in enumerate(tools)
    ]
    seen: set[str] = set()
    for index, tool in enumerate(parsed):
        if tool["name"] in seen:
            path = f"tools[{index}].function.name"
            raise InvalidRequestError(f"{path} {tool['name']!r} is that of another tool", param=path)
        seen.add(tool["name"])
    return parsed


def _function(path: str, tool: Any) -> dict[str, Any]:
    """What an object of the type "function" holds under that name."""
    tool = read_object(path, tool)
    read_choice(f"{path}.type", required(path, tool, "type"), ("function",))
    check_fields(path, tool, ("type", "function"))
    return read_object(f"{path}.function", required(path, tool, "function"))


def _parse_tool(path: str, function: dict[str, Any]) -> Tool:
    check_fields(path, function, ("name", "description", "parameters", "strict"))
    name = required(path, function, "name")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN[1:-1], name):
        raise refusal(f"{path}.name", name, f"a string that matches {NAME_PATTERN}")
    parsed: Tool = {"name": name}
    if "description" in function:
        parsed["description"] = read_string(f"{path}.description", function["description"])
    if "strict" in function:
        check_boolean(f"{path}.strict", function["strict"])
    parsed["parameters"] = _parse_parameters(f"{path}.parameters", function.get("parameters", {}))
    return parsed


def _parse_parameters(path: str, parameters: Any) -> Mapping[str, Any]:
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
    """What `tool_choice` asks for: one of "none", "auto" and "required", and the functions that may be called.

    Args:
        choice: None where it is not given.
        names: of the functions there are. Without any, none may be called.

    Raises:
        InvalidRequestError: it is malformed, or names what is not there.
    """
    if choice is None:
        choice = "auto" if names else "none"
    mode, chosen = (choice, list(names)) if isinstance(choice, str) else _parse_named(choice)
    if mode not in _MODES:
        raise _refused(choice)
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
        raise _refused(choice)
    if read_choice("tool_choice.type", choice.get("type"), ("function", "allowed_tools")) == "function":
        return "required", [_parse_reference("tool_choice", choice)]
    check_fields("tool_choice", choice, ("type", "allowed_tools"))
    path = "tool_choice.allowed_tools"
    allowed = read_object(path, required("tool_choice", choice, "allowed_tools"))
    check_fields(path, allowed, ("mode", "tools"))
    mode = read_choice(f"{path}.mode", required(path, allowed, "mode"), ("auto", "required"))
    tools = read_list(f"{path}.tools", required(path, allowed, "tools"))
    if not tools:
        raise refusal(f"{path}.tools", tools, "a list of functions that is not empty")
    return mode, [_parse_reference(f"{path}.tools[{index}]", tool) for index, tool in enumerate(tools)]


def _parse_reference(path: str, reference: Any) -> str:
    function = _function(path, reference)
    check_fields(f"{path}.function", function, ("name",))
    return read_string(f"{path}.function.name", required(f"{path}.function", function, "name"))


def _refused(choice: Any) -> InvalidRequestError:
    return refusal("tool_choice", choice, '"none", "auto", "required", a function, or allowed_tools')
