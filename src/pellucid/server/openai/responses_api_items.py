"""Input items of the Responses API, as messages of a chat.

(https://platform.openai.com/docs/api-reference/responses/create)
"""

from __future__ import annotations

from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import refusal, shown
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

ROLES = ("user", "assistant", "system", "developer")
STATUSES = ("in_progress", "completed", "incomplete")
NEUTRAL: Neutral = {
    "caller": ({"type": "direct"},),
    "namespace": (),
    "phase": (),
    "encrypted_content": (),
}
"""Fields of items that are not supported, with the values that ask for nothing."""


def read_input(instructions: Any, items: Any) -> list[dict[str, Any]]:
    """The parameters `instructions` (None where it is not given) and `input`, as `messages` of chat completions.

    Items that make up one answer of the assistant, its reasoning, its text and its calls, become one message.

    Raises:
        InvalidRequestError: `param` names the item that is malformed, or of a kind that is not supported.
    """
    reader = _Reader()
    if instructions is not None:
        reader.messages.append({"role": "system", "content": read_string("instructions", instructions)})
    if isinstance(items, str):
        reader.messages.append({"role": "user", "content": read_string("input", items)})
        return reader.messages
    for index, item in enumerate(read_list("input", items, "a string or a list of items")):
        reader.add(f"input[{index}]", item)
    if not items:
        raise InvalidRequestError("input is empty; at least one item is needed", param="input")
    return reader.finished()


class _Reader:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None

    def add(self, path: str, item: Any) -> None:
        fields = read_object(path, item)
        kind = fields.get("type", "message" if "role" in fields else "item_reference")
        readers = {
            "message": self._add_message,
            "reasoning": self._add_reasoning,
            "function_call": self._add_call,
            "function_call_output": self._add_output,
        }
        if kind == "item_reference":
            raise InvalidRequestError(
                f"{path} refers to an item, and none are stored here: send the item itself", param=path
            )
        if not isinstance(kind, str) or kind not in readers:
            raise InvalidRequestError(
                f"{path} is of type {shown(kind)}, which is not supported: {', '.join(readers)} are", param=path
            )
        for name in NEUTRAL.keys() & fields.keys():
            check_neutral(f"{path}.{name}", fields.pop(name), NEUTRAL[name])
        read_string(f"{path}.id", fields.pop("id", ""))
        read_choice(f"{path}.status", fields.pop("status", "completed"), STATUSES)
        readers[kind](path, fields)

    def finished(self) -> list[dict[str, Any]]:
        self._end_answer()
        return self.messages

    def _begun_answer(self) -> dict[str, Any]:
        if self._answer is None:
            self._answer = {"role": "assistant", "content": None}
        return self._answer

    def _end_answer(self) -> None:
        if self._answer is not None:
            if self._answer["content"] is None and "tool_calls" not in self._answer:
                self._answer["content"] = ""
            self.messages.append(self._answer)
            self._answer = None

    def _add_message(self, path: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "role", "content"))
        role = read_choice(f"{path}.role", required(path, fields, "role"), ROLES)
        content = required(path, fields, "content")
        if role != "assistant":
            self._end_answer()
            self.messages.append({"role": role, "content": _text(f"{path}.content", content, ("input_text",))})
            return
        text = _text(f"{path}.content", content, ("output_text", "input_text"))
        if self._answer is not None and (self._answer["content"] is not None or "tool_calls" in self._answer):
            self._end_answer()
        self._begun_answer()["content"] = text

    def _add_reasoning(self, path: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "summary", "content"))
        content = _texts(f"{path}.content", fields.get("content", []), ("reasoning_text",))
        summary = _texts(f"{path}.summary", fields.get("summary", []), ("summary_text",))
        self._end_answer()
        if content or summary:
            self._begun_answer()["reasoning_content"] = "\n".join(content or summary)

    def _add_call(self, path: str, fields: dict[str, Any]) -> None:
        fields.pop("parsed_arguments", None)  # which the openai client made of the arguments
        check_fields(path, fields, ("type", "call_id", "name", "arguments"))
        call = {
            "id": read_string(f"{path}.call_id", required(path, fields, "call_id")),
            "type": "function",
            "function": {
                "name": read_string(f"{path}.name", required(path, fields, "name")),
                "arguments": read_string(f"{path}.arguments", required(path, fields, "arguments")),
            },
        }
        self._begun_answer().setdefault("tool_calls", []).append(call)

    def _add_output(self, path: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "call_id", "output", "name"))
        self._end_answer()
        read_string(f"{path}.name", fields.get("name", ""))
        call_id = read_string(f"{path}.call_id", required(path, fields, "call_id"))
        output = _text(f"{path}.output", required(path, fields, "output"), ("input_text", "output_text"))
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})


def _text(path: str, content: Any, kinds: tuple[str, ...]) -> str:
    """A string, or parts of these kinds."""
    if isinstance(content, str):
        return read_string(path, content)
    if not isinstance(content, list):
        raise refusal(path, content, f"a string or a list of {kinds[0]} parts")
    return "\n".join(_texts(path, content, kinds))


def _texts(path: str, parts: Any, kinds: tuple[str, ...]) -> list[str]:
    texts = []
    for index, part in enumerate(read_list(path, parts, f"a list of {kinds[0]} parts")):
        where = f"{path}[{index}]"
        fields = read_object(where, part)
        kind = required(where, fields, "type")
        if kind not in kinds:
            raise InvalidRequestError(
                f"{where} is of type {shown(kind)}, which is not supported: {' and '.join(kinds)} is", param=where
            )
        if kind == "output_text":
            check_neutral(f"{where}.annotations", fields.pop("annotations", []), ([],))
            read_list(f"{where}.logprobs", fields.pop("logprobs", []))  # of what is said already
            fields.pop("parsed", None)  # which the openai client made of the text
        if "prompt_cache_breakpoint" in fields:  # asks for nothing: prefixes are found without being told
            breakpoint_path = f"{where}.prompt_cache_breakpoint"
            check_neutral(breakpoint_path, fields.pop("prompt_cache_breakpoint"), ({"mode": "explicit"},))
        check_fields(where, fields, ("type", "text"))
        texts.append(read_string(f"{where}.text", required(where, fields, "text")))
    return texts
