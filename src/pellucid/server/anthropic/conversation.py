"""Conversations of the Anthropic API, as messages of a chat: content blocks to texts, tool calls and tool results.

(https://docs.anthropic.com/en/api/messages)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_boolean, refusal, shown
from pellucid.server.chat.conversation import check_cache_control
from pellucid.server.json_fields import (
    check_fields,
    check_neutral,
    read_choice,
    read_list,
    read_object,
    read_string,
    required,
)

_CONTENT = "a string or a list of content blocks"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model is to answer.

    Attributes:
        messages: as /v1/chat/completions takes them.
        prefill: how the answer begins, given by the caller; "" for an answer from its beginning.
    """

    messages: list[dict[str, Any]]
    prefill: str


@dataclass(slots=True)
class _Turn:
    """Messages of one role in a row, which are one turn."""

    role: str
    texts: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": _joined(self.texts)}
        if self.thinking:
            message["reasoning_content"] = "\n".join(self.thinking)
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
            if not self.texts:
                message["content"] = None
        return message


def read_conversation(system: Any, messages: Any) -> Conversation:
    """The parameters `system` (None where it is not given) and `messages`.

    Messages of one role that follow one another are one turn. A last turn of the assistant is how its answer begins.

    Raises:
        InvalidRequestError: `param` names the block that is malformed, or of a kind that is not supported.
    """
    reader = _Reader()
    if system is not None:
        reader.add_system(system)
    for index, message in enumerate(read_list("messages", messages, "a list of messages")):
        reader.add_message(f"messages[{index}]", message)
    return reader.conversation()


class _Reader:
    def __init__(self) -> None:
        self._turns: list[_Turn | dict[str, Any]] = []
        self._open_calls: set[str] = set()

    def add_system(self, system: Any) -> None:
        texts = _texts("system", system, "a string or a list of text blocks")
        if texts or isinstance(system, str):
            self._turns.append(_Turn("system", texts))

    def add_message(self, path: str, message: Any) -> None:
        fields = read_object(path, message)
        check_fields(path, fields, ("role", "content"))
        role = read_choice(f"{path}.role", required(path, fields, "role"), ("user", "assistant", "system"))
        content = required(path, fields, "content")
        self._turn(role)  # which is there even if it holds nothing
        if isinstance(content, str):
            self._turn(role).texts.append(read_string(f"{path}.content", content))
            return
        for index, block in enumerate(read_list(f"{path}.content", content, _CONTENT)):
            self._add_block(f"{path}.content[{index}]", role, block)

    def conversation(self) -> Conversation:
        prefill = self._take_prefill()
        if not any(not isinstance(turn, _Turn) or turn.role != "system" for turn in self._turns):
            raise InvalidRequestError(
                "messages has nothing to answer: a message of the user is needed", param="messages"
            )
        return Conversation([turn.message() if isinstance(turn, _Turn) else turn for turn in self._turns], prefill)

    def _take_prefill(self) -> str:
        last = self._turns[-1] if self._turns else None
        if not isinstance(last, _Turn) or last.role != "assistant":
            return ""
        if last.tool_calls or last.thinking:
            kind = "tool_use" if last.tool_calls else "thinking"
            raise InvalidRequestError(
                f"messages ends with an assistant message that has a {kind} block: only text can be continued",
                param="messages",
            )
        del self._turns[-1]
        return "\n".join(last.texts)

    def _turn(self, role: str) -> _Turn:
        """The turn that a block of `role` belongs to."""
        if self._turns and isinstance(last := self._turns[-1], _Turn) and last.role == role:
            return last
        turn = _Turn(role)
        self._turns.append(turn)
        return turn

    def _add_block(self, path: str, role: str, block: Any) -> None:
        fields = read_object(path, block)
        kind = required(path, fields, "type")
        readers: dict[str, Callable[[str, str, dict[str, Any]], None]] = {"text": self._add_text}
        if role == "assistant":
            readers |= {"tool_use": self._add_tool_use, "thinking": self._add_thinking}
        if role == "user":
            readers |= {"tool_result": self._add_tool_result}
        if not isinstance(kind, str) or kind not in readers:
            raise InvalidRequestError(
                f"{path} is of type {shown(kind)}; messages of the {role} may have {', '.join(readers)}", param=path
            )
        check_cache_control(f"{path}.cache_control", fields.pop("cache_control", None))
        readers[kind](path, role, fields)

    def _add_text(self, path: str, role: str, fields: dict[str, Any]) -> None:
        self._turn(role).texts.append(_text(path, fields))

    def _add_thinking(self, path: str, role: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "thinking", "signature"))
        read_string(f"{path}.signature", fields.get("signature", ""))
        self._turn(role).thinking.append(read_string(f"{path}.thinking", required(path, fields, "thinking")))

    def _add_tool_use(self, path: str, role: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "id", "name", "input", "caller"))
        check_neutral(f"{path}.caller", fields.get("caller", {"type": "direct"}), ({"type": "direct"},))
        call_id = read_string(f"{path}.id", required(path, fields, "id"))
        name = read_string(f"{path}.name", required(path, fields, "name"))
        arguments = required(path, fields, "input")
        if not isinstance(arguments, dict):
            raise refusal(f"{path}.input", arguments, "an object")
        self._open_calls.add(call_id)
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        self._turn(role).tool_calls.append({"id": call_id, "type": "function", "function": function})

    def _add_tool_result(self, path: str, role: str, fields: dict[str, Any]) -> None:
        check_fields(path, fields, ("type", "tool_use_id", "content", "is_error"))
        call_id = read_string(f"{path}.tool_use_id", required(path, fields, "tool_use_id"))
        if call_id not in self._open_calls:
            raise InvalidRequestError(
                f"{path}.tool_use_id is {shown(call_id)}, and no earlier tool_use block without a result has that id",
                param=f"{path}.tool_use_id",
            )
        self._open_calls.remove(call_id)
        text = _joined(_texts(f"{path}.content", fields.get("content", ""), "a string or a list of text blocks"))
        if check_boolean(f"{path}.is_error", fields.get("is_error", False)):
            text = f"Error: {text}"  # what a chat has for it: a result that says so
        last = self._turns[-1]
        if isinstance(last, _Turn) and last.role == role and not last.texts:
            del self._turns[-1]  # results are turns of their own
        self._turns.append({"role": "tool", "tool_call_id": call_id, "content": text})


def _texts(path: str, content: Any, what: str) -> list[str]:
    """The texts of a string or of text blocks."""
    if isinstance(content, str):
        return [read_string(path, content)]
    texts = []
    for index, block in enumerate(read_list(path, content, what)):
        where = f"{path}[{index}]"
        fields = read_object(where, block)
        if fields.get("type") != "text":
            raise InvalidRequestError(f"{where} is of type {shown(fields.get('type'))}; only text is read", param=where)
        check_cache_control(f"{where}.cache_control", fields.pop("cache_control", None))
        texts.append(_text(where, fields))
    return texts


def _text(path: str, fields: dict[str, Any]) -> str:
    check_fields(path, fields, ("type", "text", "citations"))
    check_neutral(f"{path}.citations", fields.get("citations", []), ([],))
    return read_string(f"{path}.text", required(path, fields, "text"))


def _joined(texts: list[str]) -> str:
    return "\n".join(texts)
