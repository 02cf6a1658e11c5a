"""What a format of tool calls is: how they are read, how they are constrained, and how a prompt shows them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from pellucid.core.structural_tag import Format
from pellucid.server.chat.call_reader import CallReader

Tool = dict[str, Any]
"""A function: `name`, and where they are given `description` and `parameters`, a JSON schema."""


class ToolFormat(ABC):
    """A format of tool calls.

    Attributes:
        name: as `--tool-call-parser` takes it; vLLM's where it has the format.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def markers(self) -> tuple[str, ...]:
        """What sets calls off from text, so far as it may be a special token of the vocabulary."""

    @abstractmethod
    def reader(self, names: Collection[str], *, apart: bool = False) -> CallReader:
        """Reads the text of one answer, in which these functions may be called; `apart` if it is either calls or text
        and never both (`either`)."""

    @abstractmethod
    def optional(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        """The structural tag's format of an answer that may hold calls: several if they may be `parallel`."""

    @abstractmethod
    def required(self, tools: Sequence[Tool], *, parallel: bool) -> Format:
        """The same of an answer that is nothing but calls, at least one."""

    def either(self, tools: Sequence[Tool], content: Format, *, parallel: bool) -> Format:
        """The same of an answer that is calls and nothing else, or `content`. What begins as a call does is no
        `content`.

        Raises:
            InvalidRequestError: the two cannot be told apart.
        """
        calls = self.required(tools, parallel=parallel)
        return {"type": "or", "elements": [with_lazy_begin(calls, self.markers[0]), content]}

    @abstractmethod
    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, each a name and the JSON text of the arguments, as the model would write them: for chat templates that
        do not know of calls."""

    @abstractmethod
    def instructions(self, tools: Sequence[Tool]) -> str:
        """What tells a model about its tools, and how to call them: for chat templates that do not."""

    def write_results(self, results: Sequence[tuple[str, str]]) -> str:
        """What functions gave back, each a name and a text, as a user's turn: for chat templates that do not know of
        results."""
        return "\n".join(f"<tool_response>\n{text}\n</tool_response>" for _, text in results)

    def call_id(self, call_id: str) -> str:
        """An id as the model's chat template takes it."""
        return call_id


def tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def json_call(tool: Tool, key: str = "arguments", *, before: str = "", after: str = "") -> Format:
    """The tag of a call that is a JSON object with the name and, under `key`, the arguments."""
    return tag(f'{before}{{"name": {json.dumps(tool["name"])}, "{key}": ', arguments_format(tool), f"}}{after}")


def arguments_format(tool: Tool) -> Format:
    return {"type": "json_schema", "json_schema": tool["parameters"]}


def triggered(triggers: Sequence[str], tags: Sequence[Format], *, once: bool) -> Format:
    """Text, and calls in it."""
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": list(tags), "stop_after_first": once}


def separated(tags: Sequence[Format], separator: str, *, at_least_one: bool, once: bool) -> Format:
    """Calls and nothing else."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": at_least_one,
        "stop_after_first": once,
    }


def with_lazy_begin(form: Format, begin: str) -> Format:
    """A tag, or several with a separator, that win over text from `begin` on, which they begin with."""
    if form["type"] == "tags_with_separator":
        return {**form, "tags": [with_lazy_begin(each, begin) for each in form["tags"]]}
    rest = {**form, "begin": form["begin"].removeprefix(begin)}
    return {**tag(begin, rest, ""), "lazy": True}


def call_object(name: str, arguments: str, key: str = "arguments") -> str:
    """A call as JSON: its name, and its arguments, which are JSON, under `key`. `json_call` is its format."""
    return f'{{"name": {json.dumps(name)}, "{key}": {arguments}}}'


def tool_lines(tools: Sequence[Tool]) -> str:
    """The tools in OpenAI's form, one a line, between `<tools>` and `</tools>`."""
    lines = [json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in tools]
    return "\n".join(["<tools>", *lines, "</tools>"])
