"""Conversations with tool calls, as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, check_integer, refusal
from pellucid.server.chat.template_support import TemplateSupport
from pellucid.server.chat.tool_formats.base import Tool, ToolFormat
from pellucid.server.json_fields import check_fields, read_choice, read_list, read_object, read_string, required
from pellucid.tokenizer.chat_template import check_messages

_EMPTY_EXTRAS = ("annotations", "tool_calls")
"""What clients send back from an answer, and may be an empty list."""
ECHOES = ("parsed", "provider_specific_fields")
"""What clients (openai, litellm) add to an answer, made of what it says, and send back with it."""


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked: the content of each is text; of a call in them, `arguments` is an object; a result has the
    `name` of its function. What is null is left out.

    Raises:
        InvalidRequestError: `param` names what is wrong.
    """
    names: dict[str, str] = {}
    read = []
    for index, message in enumerate(read_list("messages", messages)):
        path = f"messages[{index}]"
        if isinstance(message, Mapping):
            message = _read_message(message, path, names)
        read.append(message)
    return check_messages(read)


def _read_message(message: Mapping[str, Any], path: str, names: dict[str, str]) -> dict[str, Any]:
    message = {
        name: value
        for name, value in message.items()
        if value is not None and not (name in _EMPTY_EXTRAS and isinstance(value, list) and not value)
    }
    if message.get("role") == "assistant":
        message = {name: value for name, value in message.items() if name not in ECHOES}
        if "reasoning" in message:  # as it is called in answers of vLLM
            message.setdefault("reasoning_content", message.pop("reasoning"))
    if isinstance(message.get("content"), list):
        message["content"] = [
            _read_part(f"{path}.content[{number}]", part) for number, part in enumerate(message["content"])
        ]
    if "tool_calls" in message:
        if message.get("role") != "assistant":
            raise InvalidRequestError(
                f"{path}.tool_calls is of the assistant's messages only", param=f"{path}.tool_calls"
            )
        message["tool_calls"] = [
            _read_call(call, f"{path}.tool_calls[{number}]", names)
            for number, call in enumerate(read_list(f"{path}.tool_calls", message["tool_calls"]))
        ]
        message.setdefault("content", "")
    if message.get("role") == "tool":
        call_id = read_string(f"{path}.tool_call_id", required(path, message, "tool_call_id"))
        if call_id not in names:
            raise InvalidRequestError(
                f"{path}.tool_call_id {call_id!r} is of none of the calls before it", param=f"{path}.tool_call_id"
            )
        message["name"] = names[call_id]
    return message


def _read_part(path: str, part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        return part  # refused with the message
    fields = read_object(path, part)
    check_fields(path, fields, ("type", "text", "cache_control"))
    check_cache_control(f"{path}.cache_control", fields.pop("cache_control", None))
    return fields


def check_cache_control(path: str, value: Any) -> None:
    """Checks what asks for nothing here: prefixes are cached and found without being told.

    Raises:
        InvalidRequestError: it is malformed.
    """
    if value is None:
        return
    fields = read_object(path, value)
    check_fields(path, fields, ("type", "ttl"))
    read_choice(f"{path}.type", required(path, fields, "type"), ("ephemeral",))
    if "ttl" in fields:
        read_choice(f"{path}.ttl", fields["ttl"], ("5m", "1h"))


def _read_call(call: Any, path: str, names: dict[str, str]) -> dict[str, Any]:
    call = read_object(path, call)
    check_fields(path, call, ("id", "type", "function", "index"))
    check_integer(f"{path}.index", call.get("index", 0), 0, INT32_MAX)  # of the pieces that a client joined
    read_choice(f"{path}.type", call.get("type", "function"), ("function",))
    function = read_object(f"{path}.function", required(path, call, "function"))
    check_fields(f"{path}.function", function, ("name", "arguments", "parsed_arguments"))
    name = read_string(f"{path}.function.name", required(f"{path}.function", function, "name"))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what is no JSON is refused below
            arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise refusal(f"{path}.function.arguments", function.get("arguments"), "the text of a JSON object")
    call_id = read_string(f"{path}.id", required(path, call, "id"))
    names[call_id] = name
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def for_template(
    messages: Sequence[Mapping[str, Any]], tools: ToolFormat, support: TemplateSupport
) -> list[dict[str, Any]]:
    """Messages of `read_messages`, as a template that takes calls wants them."""
    adapted = []
    for message in _one_call_a_turn(messages) if not support.several_calls else messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [_adapted_call(call, support, tools) for call in message["tool_calls"]]
        if message["role"] == "tool":
            message["tool_call_id"] = tools.call_id(message["tool_call_id"])
        adapted.append(message)
    return adapted


def _adapted_call(call: Mapping[str, Any], support: TemplateSupport, tools: ToolFormat) -> dict[str, Any]:
    function = call["function"]
    if support.arguments == "text":
        function = {**function, "arguments": json_text(function["arguments"])}
    return {**call, "id": tools.call_id(call["id"]), "function": function}


def _one_call_a_turn(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every call in a turn of its own, with its result after it."""
    parted: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            after = next(
                place + 1
                for place in range(len(parted) - 1, -1, -1)
                if any(call["id"] == message["tool_call_id"] for call in parted[place].get("tool_calls", ()))
            )
            parted.insert(after, message)
        elif len(calls := message.get("tool_calls", ())) > 1:
            parted.append({**message, "tool_calls": calls[:1]})
            parted += [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls[1:]]
        else:
            parted.append(message)
    return parted


def as_plain_turns(messages: Sequence[Mapping[str, Any]], tools: ToolFormat) -> list[dict[str, Any]]:
    """Messages of `read_messages` for a template that knows nothing of calls: they are text of the assistant's, and
    results are a turn of the user's."""
    plain: list[dict[str, Any]] = []
    order: dict[str, int] = {}  # of all calls so far
    results: list[Mapping[str, Any]] = []

    def close_results() -> None:
        if results:
            results.sort(key=lambda result: order[result["tool_call_id"]])  # they say nothing of what they answer
            written = tools.write_results([(result["name"], result["content"]) for result in results])
            plain.append({"role": "user", "content": written})
            results.clear()

    for message in messages:
        if message["role"] == "tool":
            results.append(message)
            continue
        after_results = bool(results)
        close_results()
        message = dict(message)
        calls = message.pop("tool_calls", ())
        if calls:
            order.update((call["id"], len(order) + place) for place, call in enumerate(calls))
            written = tools.write_calls(
                [(call["function"]["name"], json_text(call["function"]["arguments"])) for call in calls]
            )
            message["content"] = "\n".join(filter(None, (message["content"], written)))
        if after_results and message["role"] == "user":  # two turns of the user's in a row are one
            plain[-1]["content"] += "\n" + message["content"]
        else:
            plain.append(message)
    close_results()
    return plain


def with_instructions(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """`messages`, whose system message tells of the tools too."""
    instructions = tool_format.instructions(tools)
    first = messages[0]
    if first["role"] in ("system", "developer"):
        content = "\n\n".join(filter(None, (first["content"], instructions)))
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
