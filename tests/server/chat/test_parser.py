"""What a model writes becomes events, however it is cut into pieces."""

from __future__ import annotations

import random

import pytest

from pellucid.server.chat.events import ReasoningDelta, TextDelta, ToolCallBegin
from pellucid.server.chat.formats import PLAIN_TEXT, ChatFormat, chat_format_of
from pellucid.server.chat.message import ChatMessage, ToolCall
from pellucid.server.chat.parser import ChatParser, read_message
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn
from tests.support import chat_templates
from tests.support.answer_pieces import same_however_cut
from tests.support.chat_templates import chat_tokenizer
from tests.support.mutants import mutant

THINKING = chat_format_of(chat_tokenizer(chat_templates.THINKING))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</think>"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def turn_of(model_format: ChatFormat) -> ChatTurn:
    return parse_chat_turn(TOOLS, None, None, model_format)


def test_plain_text_is_text_at_once() -> None:
    parser = PLAIN_TEXT.parser(ChatTurn())
    assert parser.push("a<") == [TextDelta("a<")]
    assert parser.push("") == parser.finish() == []
    assert read_message(PLAIN_TEXT.parser(ChatTurn()), "a<think>") == ChatMessage("a<think>")


def test_reasoning_text_and_calls() -> None:
    text = f"<think>\nI could {CALL}.\n</think>\n\nLet me see.\n{CALL}\n"
    message = same_however_cut(lambda: THINKING.parser(turn_of(THINKING)), text)
    reasoning = f"I could {CALL}.".partition("</think>")
    assert message.reasoning == reasoning[0]
    text = text.replace('</think>"}}\n</tool_call>.', 'x"}}\n</tool_call>.')
    message = same_however_cut(lambda: THINKING.parser(turn_of(THINKING)), text)
    assert message.reasoning == f"I could {CALL.replace('</think>', 'x')}."
    assert message.text == "Let me see."
    assert message.tool_calls == [ToolCall("0", "f", '{"a": "</think>"}')]


def test_without_tools_calls_are_text() -> None:
    turn = parse_chat_turn(None, None, None, THINKING)
    assert same_however_cut(lambda: THINKING.parser(turn), f"<think>a</think>{CALL}") == ChatMessage(CALL, "a")


def test_events_come_in_the_order_of_the_text() -> None:
    parser = THINKING.parser(turn_of(THINKING))
    events = [event for character in f"<think>a</think>b{CALL}c" for event in parser.push(character)]
    kinds = [type(event) for event in events]
    assert kinds[:3] == [ReasoningDelta, TextDelta, ToolCallBegin]
    assert kinds[-1] is TextDelta
    assert parser.finish() == []


def test_markers_that_are_special_tokens_are_read_and_others_dropped() -> None:
    tokenizer = chat_tokenizer(chat_templates.MISTRAL, "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[INST]")
    mistral = chat_format_of(tokenizer)
    text = "[THINK]a[INST][/THINK]b[INST]c<|im_end|>"
    turn = parse_chat_turn(None, None, None, mistral)
    assert same_however_cut(lambda: mistral.parser(turn), text) == ChatMessage("bc", "a")
    call = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "[INST]"}}]'
    message = same_however_cut(lambda: mistral.parser(turn_of(mistral)), f"[THINK]a[/THINK]b{call}")
    assert message == ChatMessage("b", "a", [ToolCall("0", "f", '{"a": "[INST]"}')])


def test_random_texts() -> None:
    rng = random.Random(6)
    fragments = ["<think>", "</think>", "<", CALL, "<tool_call>", "</tool_call>", "a", " ", "\n", "é", '{"name": "f"}']
    for _ in range(100):
        text = "".join(rng.choice(fragments) for _ in range(rng.randint(0, 6)))
        message = same_however_cut(lambda: THINKING.parser(turn_of(THINKING)), text)
        assert all(call.arguments in ('{"a": "</think>"}', "{}") for call in message.tool_calls)


def test_a_defect_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = mutant(ChatParser._without_dropped, " - dropped.held(text[position:])", "")
    monkeypatch.setattr(ChatParser, "_without_dropped", defect)
    with pytest.raises(AssertionError):
        test_markers_that_are_special_tokens_are_read_and_others_dropped()
