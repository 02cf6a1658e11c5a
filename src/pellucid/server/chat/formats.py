"""How a model writes what is not plain text: tool calls and reasoning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import shown
from pellucid.server.chat.parser import ChatParser
from pellucid.server.chat.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningReader
from pellucid.server.chat.template_support import NO_SUPPORT, TemplateSupport, template_support
from pellucid.server.chat.tool_formats.base import ToolFormat
from pellucid.server.chat.tool_formats.hermes import HermesFormat
from pellucid.server.chat.tool_formats.llama3_json import PYTHON_TAG, Llama3JsonFormat
from pellucid.server.chat.tool_formats.mistral import ARGS, CALL_ID, TOOL_CALLS, MistralFormat
from pellucid.server.chat.tool_formats.smollm import SmolLMFormat
from pellucid.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pellucid.server.chat.tools import ChatTurn


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model writes what is not plain text.

    Attributes:
        tools: the format of its tool calls; None if none are read.
        reasoning: how it sets off what it thinks; None if nothing is parted from the text.
        template: what its chat template takes.
        special: spellings of its special tokens.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    template: TemplateSupport = NO_SUPPORT
    special: frozenset[str] = frozenset()

    def parser(self, turn: ChatTurn) -> ChatParser:
        """For one answer (one choice) of `turn`."""
        reasoning = None if self.reasoning is None else ReasoningReader(self.reasoning, begun=turn.reasoning == "begun")
        names = turn.callable_names
        calls = self.tools.reader(names, apart=turn.has_format) if self.tools is not None and names else None
        dropped = (
            () if turn.skips_special_tokens or turn.is_constrained else self.special - self.special_in(self.markers)
        )
        return ChatParser(reasoning, calls, dropped)

    @property
    def markers(self) -> tuple[str, ...]:
        """What sets off calls and reasoning."""
        formats = [each for each in (self.tools, self.reasoning) if each is not None]
        return tuple(marker for each in formats for marker in each.markers)

    def special_in(self, markers: Iterable[str]) -> set[str]:
        """The special tokens that are written in `markers`."""
        return {token for token in self.special for marker in markers if token in marker}


PLAIN_TEXT = ChatFormat()
"""Neither tool calls nor reasoning."""

_TOOL_FORMATS: dict[str, Callable[[str], ToolFormat]] = {
    "hermes": lambda template: HermesFormat(),
    "llama3_json": lambda template: Llama3JsonFormat(),
    "mistral": lambda template: _mistral(template),
    "smollm": lambda template: SmolLMFormat(),
}
_WRITTEN_AS = {
    "hermes": r'(?s)<tool_call>.*"name\\?": ',
    "llama3_json": r'"parameters\\?": ',
    "mistral": re.escape(TOOL_CALLS),
    "smollm": "<tool_call>",
}
"""What a chat template holds that writes calls in the format."""
TOOL_CALL_PARSERS = ("auto", "none", *_TOOL_FORMATS)
REASONING_PARSERS = ("auto", "none", *REASONING_FORMATS)


def chat_format_of(
    tokenizer: Tokenizer, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto"
) -> ChatFormat:
    """The format of a model, from its chat template and its vocabulary (docs/tool-calling.md says how).

    Args:
        tool_call_parser: one of TOOL_CALL_PARSERS.
        reasoning_parser: one of REASONING_PARSERS.

    Raises:
        InvalidRequestError: no such parser.
    """
    for param, value, known in (
        ("tool_call_parser", tool_call_parser, TOOL_CALL_PARSERS),
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
    ):
        if value not in known:
            raise InvalidRequestError(f"{param} must be one of {', '.join(known)}, not {shown(value)}", param=param)
    template, support = tokenizer.chat_template or "", template_support(tokenizer)
    if tool_call_parser == "auto":
        tool_call_parser = _tool_call_parser(template, tokenizer)
        if not re.search(_WRITTEN_AS[tool_call_parser], template):
            support = support.without_tools  # it shows calls of another form
    if reasoning_parser == "auto":
        reasoning_parser = _reasoning_parser(template, tokenizer)
    return ChatFormat(
        _TOOL_FORMATS[tool_call_parser](template) if tool_call_parser != "none" else None,
        REASONING_FORMATS.get(reasoning_parser),
        support,
        frozenset(tokenizer.id_to_token(token_id) for token_id in tokenizer.special_ids) - {""},
    )


def _tool_call_parser(template: str, tokenizer: Tokenizer) -> str:
    for marker, parser in ((TOOL_CALLS, "mistral"), (PYTHON_TAG, "llama3_json")):
        if marker in template or tokenizer.token_to_id(marker) is not None:
            return parser
    if "<tool_call>" not in template and "SmolLM" in template:
        return "smollm"
    return "hermes"


def _reasoning_parser(template: str, tokenizer: Tokenizer) -> str:
    for name, reasoning in REASONING_FORMATS.items():
        written = reasoning.open in template or reasoning.close in template
        if written or tokenizer.token_to_id(reasoning.close) is not None:
            return name
    return "none"


def _mistral(template: str) -> MistralFormat:
    if ARGS in template:
        return MistralFormat("call_id" if CALL_ID in template else "args")
    return MistralFormat("list", "" if f"{TOOL_CALLS}[" in template else " ")
