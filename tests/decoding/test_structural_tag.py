"""Answers follow their structural tag: text up to a trigger is free, what follows is not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.decoding import grammar_compiler, structural_tag
from tests.support.grammars import allowed, compiled, random_texts
from tests.support.mutants import mutant
from tests.support.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
SPECIAL = "<|im_start|>"
TEXT = {"type": "any_text"}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": SCHEMA}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: dict[str, Any] = JSON, end: str = "") -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(trigger: str, **options: bool) -> dict[str, Any]:
    tags = [tag(f"{trigger}f", end="!"), tag(f"{trigger}g", const("x"), end="!")]
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags, **options}


def separated(**options: bool) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [tag("f"), tag("g", const("x"))], "separator": ", ", **options}


def verdict(form: dict[str, Any], text: str) -> str:
    """Whether an answer may be `text`: "whole"; "begun", where it has to go on; or "no"."""
    matcher = compiled(TOKENIZER, structural_tag={"format": form}).matcher()
    token_ids = TOKENIZER.encode(text, add_special_tokens=False, parse_special=True)
    try:
        mask = matcher.masks(token_ids)[0]
    except InvalidRequestError:
        return "no"
    return "whole" if set(allowed(mask)) & TOKENIZER.eos_token_ids else "begun"


def check(form: dict[str, Any], **verdicts: list[str]) -> None:
    for expected, texts in verdicts.items():
        for text in texts:
            assert verdict(form, text) == expected, text


def test_each_kind_of_format() -> None:
    check(const('a"\\\n'), whole=['a"\\\n'], begun=["", "a"], no=["b"])
    check(JSON, whole=['{"a": 1}', '{"a": 1, "b": "x"}'], no=['{"a":1}', '{"a": 1,"b"', "[", '{"a": "1"'])
    check({"type": "regex", "pattern": "a/b+|é"}, whole=["a/b", "a/bb", "é"], begun=["a/"], no=["b"])
    check({"type": "grammar", "grammar": 'root ::= "x" | "y" root'}, whole=["x", "yyx"], no=["z"])
    check({"type": "grammar", "grammar": 'start: "x" start?'}, whole=["x", "xx"], begun=[""])
    check({"type": "sequence", "elements": [const("a"), JSON, const("b")]}, whole=['a{"a": 1}b'], begun=["a"], no=["b"])
    check({"type": "or", "elements": [const("a"), JSON]}, whole=["a", '{"a": 1}'], no=["b"])
    check(tag("<t>", TEXT, "</t>"), whole=["<t></t>", "<t>\na < b</t>"], begun=["<t>x</t"], no=["x", "<t></t>x"])
    check(tag("<t>", TEXT, ""), whole=["<t>", "<t>x\n"], begun=["<t"])
    check(TEXT, whole=["", "a\n<é"], no=[SPECIAL])


@pytest.mark.parametrize("trigger", ["<c>", SPECIAL])
def test_triggered_tags(trigger: str) -> None:
    one, other = f'{trigger}f{{"a": 1}}!', f"{trigger}gx!"
    wrong = [f"{trigger}h", f"hi {trigger}h", f"{trigger}gy", f'{trigger}f{{"b"']
    check(triggered(trigger), whole=["", "hi", one, f"hi {one}", f"{one}\n{other} bye"], begun=[trigger], no=wrong)
    check(triggered(trigger, at_least_one=True), whole=[one, f"{one} and {other}."], begun=["", trigger], no=["hi"])
    check(triggered(trigger, stop_after_first=True), whole=["", "hi", f"hi {one}"], no=[f"{one} ", f"{one}{other}"])
    both = triggered(trigger, at_least_one=True, stop_after_first=True)
    check(both, whole=[one, other], begun=["", trigger], no=["hi", f"{one} ", f"{one}{other}"])


def test_separated_tags() -> None:
    one, other = 'f{"a": 1}', "gx"
    check(separated(), whole=["", one, f"{one}, {other}, {one}"], begun=[f"{one}, "], no=[", ", f"{one} "])
    check(separated(at_least_one=True), whole=[one, f"{one}, {other}"], begun=[""])
    check(separated(stop_after_first=True), whole=["", one], no=[f"{one},"])
    check(separated(at_least_one=True, stop_after_first=True), whole=[other], begun=[""], no=[f"{other},"])
    check({**separated(), "separator": ""}, whole=["", f"{one}{other}{other}"])


def test_a_trigger_in_a_string_or_in_reasoning_is_none() -> None:
    schema = {"type": "object", "properties": {"t": {"type": "string"}}, "additionalProperties": False}
    form = {**triggered("<c>"), "tags": [tag("<c>", {"type": "json_schema", "json_schema": schema}, "</c>")]}
    check(form, whole=['<c>{"t": "</c><c>x"}</c>'], no=['<c>{"t": "</c><c>x"}</c><c>x'])
    thought = {"type": "sequence", "elements": [tag("<think>", TEXT, "</think>"), form]}
    either = {"type": "or", "elements": [thought, form]}
    check(
        either,
        whole=["x", "a <think>", "<think><c>x</think>y", "<think>a</think><c>{}</c>", "<c>{}</c>"],
        begun=["<think>", "<think><c>x"],
        no=["<c>x", "<think>a</think><c>x"],
    )


def test_several_triggers() -> None:
    form = {"type": "triggered_tags", "triggers": ["<a>", SPECIAL], "tags": [tag("<a>f", const("1")), tag(SPECIAL)]}
    check(form, whole=[f'hi <a>f1{SPECIAL}{{"a": 1}} <a>f1'], no=[f"{SPECIAL}f1", '<a>{"a": 1}'])


@pytest.mark.parametrize("once", [False, True])
def test_text_goes_on_where_no_tag_does(once: bool) -> None:
    tags = [tag('{"n": "f", '), tag('{"n": "f2", '), tag("<c>")]
    triggers = ['{"n": "', "<c>"]
    form = {"type": "triggered_tags", "triggers": triggers, "tags": tags, "or_text": triggers[:1]}
    call, text = '{"n": "f2", {"a": 1}', 'a {"n": "g", {"n": "f3" {"n": "f", '
    check(
        {**form, "stop_after_first": once},
        whole=["", call, f'{{"n": "{call}', 'a {"n": "g"} b', f'{{"n": "f3{call}', '<c>{"a": 1}', '{"n": "f'],
        no=["<c>x", '{"n": "f", x', '{"n": "f", {"b"', text + "x"],
    )
    assert verdict({**form, "stop_after_first": once}, f"{call} {call}") == ("no" if once else "whole")
    check({**form, "at_least_one": True}, whole=[call, f"{call} x"], begun=[""], no=["x"])


def test_a_lazy_tag_wins_over_text_that_begins_like_it() -> None:
    for content in (TEXT, {"type": "regex", "pattern": "(.|\\n)*"}):
        form = {"type": "or", "elements": [{**tag("<c>"), "lazy": True}, content]}
        check(form, whole=['<c>{"a": 1}', "<c", "x<c>"], begun=["<c>"], no=["<c>x"])
        eager = {"type": "or", "elements": [tag("<c>"), content]}
        check(eager, whole=["<c>x"])


def test_the_white_space_of_json_may_be_said() -> None:
    form = {"type": "json_schema", "json_schema": SCHEMA, "whitespace_pattern": "[ \\n]"}
    check(form, whole=['{"a":1}', '{ "a" : 1\n}'], no=['{  "a"'])


def test_random_answers_follow_their_tag() -> None:
    form = {**separated(at_least_one=True)}
    one = r'(f\{"a": -?[0-9]+(, "b": "x")?\}|gx)'
    for text in random_texts(TOKENIZER, structural_tag={"format": form}):
        assert re.fullmatch(f"{one}(, {one})*", text), text


def check_schemas_are_written_once() -> None:
    form = {"type": "triggered_tags", "triggers": ["x"], "tags": [tag(f"x{number}") for number in range(50)]}
    text = json.dumps({"type": "structural_tag", "format": form})
    grammar = structural_tag.structural_tag_grammar(text, TOKENIZER, grammar_compiler.lark_of)
    assert grammar.count("%json") == 1


def test_schemas_are_written_once() -> None:
    check_schemas_are_written_once()


def test_a_schema_cannot_say_how_it_is_compiled() -> None:
    own = {"type": "json_schema", "json_schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": True}}}
    check(own, whole=['{"a": 1}'], no=['{  "a"'])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_schema", "json_schema": {"not": {}}}, "not"),
        (
            {"type": "json_schema", "json_schema": {"type": "object", "required": ["a"], "maxProperties": 0}},
            "structural_tag",
        ),
        ({"type": "regex", "pattern": "("}, "structural_tag"),
        ({"type": "grammar", "grammar": "start: x"}, "structural_tag"),
        ({"type": "grammar", "grammar": "root ::= ((("}, "as GBNF"),
    ],
)
def test_what_cannot_be_compiled_is_refused(form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compiled(TOKENIZER, structural_tag={"format": {"type": "sequence", "elements": [const("x"), form]}})
    assert caught.value.param == "structured_outputs.structural_tag"


def test_a_defect_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = mutant(structural_tag._Writer._rule, "self._names[options + body] = ", "")
    monkeypatch.setattr(structural_tag._Writer, "_rule", defect)
    with pytest.raises(AssertionError):
        check_schemas_are_written_once()
