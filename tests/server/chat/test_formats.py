"""The format of a model is known by its chat template and its vocabulary, and can be named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.chat.formats import REASONING_PARSERS, TOOL_CALL_PARSERS, chat_format_of
from pellucid.server.chat.template_support import NO_SUPPORT, TemplateSupport, generation_prompt
from pellucid.server.chat.tool_formats.mistral import MistralFormat
from pellucid.server.chat.tools import ChatTurn
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer

FULL = TemplateSupport("tools", True, True, "object")
EFFORT = "{% if not reasoning_effort is defined %}{% set reasoning_effort = 'low' %}{% endif %}{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("template", "special", "name", "reasoning", "support"),
    [
        (chat_templates.PLAIN, (), "hermes", None, NO_SUPPORT),
        (chat_templates.SMOLLM, (), "smollm", None, NO_SUPPORT),
        (chat_templates.HERMES, (), "hermes", None, FULL),
        (chat_templates.TEXT_ARGUMENTS, (), "hermes", None, TemplateSupport("tools", True, True, "text")),
        (chat_templates.XML_TOOLS + "{# SmolLM3 #}", (), "hermes", None, TemplateSupport("xml_tools", True, True)),
        (chat_templates.LLAMA, ("<|python_tag|>",), "llama3_json", None, TemplateSupport("tools", True, False)),
        (chat_templates.MISTRAL, ("[TOOL_CALLS]",), "mistral", None, FULL),
        (chat_templates.THINKING, (), "hermes", "qwen3", replace(FULL, thinking="enable_thinking")),
        (chat_templates.OTHER_CALLS + EFFORT, (), "hermes", None, TemplateSupport(effort=True)),
        (chat_templates.ALWAYS_THINKING, (), "hermes", "qwen3", NO_SUPPORT),
        (chat_templates.PLAIN, ("<think>", "</think>"), "hermes", "qwen3", NO_SUPPORT),
        (chat_templates.MISTRAL, ("[THINK]", "[/THINK]"), "mistral", "mistral", FULL),
        (chat_templates.OTHER_CALLS, (), "hermes", None, NO_SUPPORT),
        (None, (), "hermes", None, NO_SUPPORT),
        ("{{ nonsense(", (), "hermes", None, NO_SUPPORT),
    ],
)
def test_the_format_is_found(
    template: str | None, special: tuple[str, ...], name: str, reasoning: str | None, support: TemplateSupport
) -> None:
    found = chat_format_of(chat_tokenizer(template, *special))
    assert found.tools is not None
    assert found.tools.name == name
    assert (found.reasoning.name if found.reasoning else None) == reasoning
    assert found.template == support


@pytest.mark.parametrize(
    ("template", "form", "space"),
    [
        (chat_templates.MISTRAL, "list", " "),
        (chat_templates.MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS]["), "list", ""),
        (chat_templates.MISTRAL_ARGS, "args", " "),
        (chat_templates.MISTRAL_CALL_ID, "call_id", " "),
    ],
)
def test_each_form_of_mistral(template: str, form: Any, space: str) -> None:
    assert chat_format_of(chat_tokenizer(template)).tools == MistralFormat(form, space)


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS[2:])
def test_a_tool_call_parser_can_be_named(name: str) -> None:
    found = chat_format_of(chat_tokenizer(chat_templates.PLAIN), tool_call_parser=name).tools
    assert found is not None
    assert found.name == name


def test_a_parser_that_is_named_takes_what_the_template_takes() -> None:
    found = chat_format_of(chat_tokenizer(chat_templates.OTHER_CALLS), tool_call_parser="hermes")
    assert found.template == FULL


@pytest.mark.parametrize("name", REASONING_PARSERS[2:])
def test_a_reasoning_parser_can_be_named(name: str) -> None:
    found = chat_format_of(chat_tokenizer(chat_templates.PLAIN), reasoning_parser=name).reasoning
    assert found is not None
    assert found.name == name


def test_none_reads_nothing_but_text() -> None:
    found = chat_format_of(chat_tokenizer(chat_templates.THINKING), tool_call_parser="none", reasoning_parser="none")
    assert found.tools is found.reasoning is None
    text = "<think>a</think><tool_call>"
    parser = found.parser(ChatTurn(format=found))
    assert [event.text for event in parser.push(text)] == [text]  # type: ignore[union-attr]


@pytest.mark.parametrize("param", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused(param: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{param} must be one of auto, none, .*not 'pythonic'"):
        chat_format_of(chat_tokenizer(chat_templates.PLAIN), **{param: "pythonic"})


def test_what_opens_the_assistants_turn() -> None:
    tokenizer = chat_tokenizer(chat_templates.THINKING)
    assert generation_prompt(tokenizer) == "<|im_end|>\n<|im_start|>assistant\n"
    assert generation_prompt(tokenizer, enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert generation_prompt(chat_tokenizer(None)) == ""
