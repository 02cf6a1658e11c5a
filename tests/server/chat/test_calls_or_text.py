"""A response format beside tools: an answer is calls that hold to their schema, or text that has the form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.server.chat.call_reader import CallReader
from pellucid.server.chat.message import ChatMessage, joined
from pellucid.server.chat.parser import read_message
from pellucid.server.chat.tool_formats import base
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn, render_chat
from pellucid.server.served_model import ServedModel
from tests.server.chat.test_constraints import CITY, FORMATS, TOOLS, USER, allows, check_calls, random_answer, served
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer

pytest.importorskip("jsonschema")

LIKE_A_CALL = '(<tool_call>|\\[TOOL_CALLS\\]|\\{"name": "f", "parameters": )?[a-z{}:, "\\[\\]<_>]{0,20}'
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "json": ({"json": CITY}, lambda text: json.loads(text)["city"] in ("Paris", "Rome")),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "regex": ({"regex": LIKE_A_CALL}, re.compile(LIKE_A_CALL).fullmatch),
    "choice": ({"choice": ["yes", "no", "{}"]}, ("yes", "no", "{}").__contains__),
    "grammar": ({"grammar": 'start: "<" /[a-z]{1,9}/ ">"'}, re.compile("<[a-z]{1,9}>").fullmatch),
    "spaced": ({"json": CITY, "whitespace_pattern": "[ \\n]"}, json.loads),
}


def made(name: str) -> ServedModel:
    template, special, _ = FORMATS[name]
    return served(chat_tokenizer(template, *special))


def turn_of(model: ServedModel, choice: Any = "auto", parallel: bool = True, **kwargs: Any) -> ChatTurn:
    turn = parse_chat_turn(TOOLS, choice, parallel, model.chat_format, has_format=True)
    return render_chat(USER, turn, model, **kwargs)[1]


def read(model: ServedModel, turn: ChatTurn, text: str) -> ChatMessage:
    """The message, which must be the same however the text is cut."""
    message = read_message(model.chat_format.parser(turn), text)
    for size in (1, 3):
        parser = model.chat_format.parser(turn)
        pieces = [event for place in range(0, len(text), size) for event in parser.push(text[place : place + size])]
        cut = joined([*pieces, *parser.finish()])
        for ours, theirs in zip(message.tool_calls, cut.tool_calls, strict=True):
            theirs.call_id = ours.call_id  # drawn at random
        assert cut == message
    return message


def check(model: ServedModel, asked: StructuredOutputsParams, has_form: Callable[[str], Any], seed: int) -> int:
    """Answers drawn at random, a third of which begin as calls do; how many of them call."""
    turn = turn_of(model, parallel=seed % 2 == 0)
    assert model.chat_format.tools is not None
    marker = model.chat_format.tools.markers[0]
    text = random_answer(turn, model.tokenizer, marker if seed % 3 == 0 else "", seed, asked=asked)
    message = read(model, turn, text)
    if message.tool_calls:
        assert message.text == ""
        assert turn.parallel_tool_calls or len(message.tool_calls) == 1
        check_calls(message, TOOLS)
    else:
        assert message.text == text
        assert has_form(text), text
    return bool(message.tool_calls)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_is_calls_or_has_the_form(name: str, form: str) -> None:
    asked, has_form = FORMS[form]
    model, structured = made(name), StructuredOutputsParams(**asked)
    if name.startswith("llama") and form in ("grammar", "spaced"):
        with pytest.raises(InvalidRequestError, match="cannot be told from calls"):
            allows(turn_of(model), model.tokenizer, "", structured)
        return
    num_calls = sum(check(model, structured, has_form, seed) for seed in range(18))
    assert 6 <= num_calls < 18


@pytest.mark.parametrize("name", FORMATS)
def test_calls_alone_where_they_are_required_and_the_form_where_none_may_be(name: str) -> None:
    model, asked = made(name), StructuredOutputsParams(json=CITY)
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        turn = turn_of(model, choice)
        assert not allows(turn, model.tokenizer, '{"city": "Rome"}', asked)
        message = read(model, turn, random_answer(turn, model.tokenizer, "", 0, asked=asked))
        assert message.tool_calls
        check_calls(message, TOOLS)
    turn = turn_of(model, "none")
    assert not turn.callable_names
    assert not turn.is_constrained


def test_what_looks_like_a_call_within_a_text_is_text() -> None:
    model = made("hermes")
    turn, asked = turn_of(model), StructuredOutputsParams(json_object=True)
    for value in ("<tool_call>[]</tool_call>", '<tool_call>\n{"name": "f2", "arguments": {}}\n</tool_call>'):
        text = json.dumps({"a": value})
        assert allows(turn, model.tokenizer, text, asked)
        assert read(model, turn, text) == ChatMessage(text)
    for text in ("", "<", "<tool", "<tool_call> x", " <tool_call>"):
        assert read(model, turn, text) == ChatMessage(text)


def test_json_that_begins_like_a_call_of_llamas() -> None:
    model, call = made("llama"), '{"name": "f", "parameters": {"city": "Rome"}}'
    turn = turn_of(model)
    person = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"enum": [1, 2]}}}
    recursive = {"$ref": "#/$defs/p", "$defs": {"p": person}}
    for schema in (person, recursive, {"anyOf": [person, {"type": "array"}]}, {}, {"type": "object"}):
        asked = StructuredOutputsParams(json=schema)
        for text in ('{"name": "f", "age": 1}', '{"name": "Ada"}', '{"name": "f"}', "{}"):
            assert allows(turn, model.tokenizer, text, asked), (schema, text)
            assert read(model, turn, text) == ChatMessage(text)
        for text in (call, f"{call}; {call}"):
            assert allows(turn, model.tokenizer, text, asked)
            assert len(read(model, turn, text).tool_calls) == text.count("name")
        for text in (call.replace("Rome", "Oslo"), call.replace('"f"', '"f3"'), call.replace(": ", ":")):
            assert not allows(turn, model.tokenizer, text, asked), text
    kind = {"properties": {"parameters": {"type": "integer"}}, "required": ["parameters"]}
    closed = StructuredOutputsParams(json={"type": "object", "additionalProperties": False, **kind})
    assert allows(turn, model.tokenizer, '{"parameters": 1}', closed)
    with pytest.raises(InvalidRequestError, match="call them something else") as caught:
        allows(turn, model.tokenizer, "", StructuredOutputsParams(json=kind))
    assert caught.value.param == "response_format"
    for malformed in ({"allOf": 3}, {"required": 3}, {"properties": 3}):
        with pytest.raises(InvalidRequestError):
            allows(turn, model.tokenizer, "", StructuredOutputsParams(json=malformed))


CALL = '<tool_call>\n{"name": "f2", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "kwargs", "begins"),
    [
        (chat_templates.THINKING, {}, ["", "<think>\na <tool_call> {}\n</think>\n\n"]),
        (chat_templates.THINKING, {"enable_thinking": False}, [""]),
        (chat_templates.ALWAYS_THINKING, {}, ["a\n</think>\n\n"]),
    ],
)
def test_reasoning_comes_before_both(template: str, kwargs: dict[str, Any], begins: list[str]) -> None:
    model, asked = served(chat_tokenizer(template)), StructuredOutputsParams(json=CITY)
    turn = turn_of(model, **kwargs)
    for begin in begins:
        for rest, is_allowed in (('{"city": "Rome"}', True), (CALL, True), ("x", False), ("", False)):
            assert allows(turn, model.tokenizer, begin + rest, asked) == is_allowed
            message = read(model, turn, begin + rest)
            assert (message.text, len(message.tool_calls)) == (("", 1) if rest == CALL else (rest, 0))


# Mutants


def test_calls_that_text_swallows_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "with_lazy_begin", lambda form, begin: form)
    with pytest.raises(AssertionError):
        test_an_answer_is_calls_or_has_the_form("hermes", "regex")


def test_a_reader_that_looks_for_calls_in_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(self: CallReader) -> Any:
        yield from ()
        return True

    monkeypatch.setattr(CallReader, "_begins_with_call", found)
    with pytest.raises(AssertionError):
        test_what_looks_like_a_call_within_a_text_is_text()


def test_json_that_may_be_a_call_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.server.chat.tool_formats.llama3_json._no_call", dict)
    with pytest.raises(AssertionError):
        test_json_that_begins_like_a_call_of_llamas()
