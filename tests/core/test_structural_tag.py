"""Structural tags are checked before anyone works on them, and refused by the place that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structural_tag import parts
from pellucid.core.structured_outputs import MAX_STRUCTURAL_TAG_BYTES, StructuredOutputsParams

TEXT = {"type": "any_text"}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": {"b": 1, "a": 2}}, "end": ""}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG], "at_least_one": True}
EVERYTHING = {
    "type": "sequence",
    "elements": [
        {"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "regex", "pattern": "a+"}]},
        {"type": "grammar", "grammar": "start: /b/"},
        {"type": "tags_with_separator", "tags": [TAG, TAG], "separator": ""},
        TRIGGERED,
        TEXT,
    ],
}


def checked(form: Any) -> Any:
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": form})
    assert params.kind == "structural_tag"
    assert isinstance(params.structural_tag, str)
    return json.loads(params.structural_tag)["format"]


def test_a_tag_is_kept_as_text_properties_in_order() -> None:
    assert checked(EVERYTHING) == EVERYTHING
    assert len(list(parts(EVERYTHING))) == 14
    params = StructuredOutputsParams(structural_tag={"format": TAG})
    assert params == StructuredOutputsParams(structural_tag=json.dumps({"format": TAG})) == replace(params)
    assert '{"b":1,"a":2}' in str(params.structural_tag)
    assert hash(params)


def test_the_older_form_means_triggered_tags() -> None:
    structure = {"begin": "<a>", "schema": {"b": 1, "a": 2}, "end": ""}
    old = StructuredOutputsParams(structural_tag={"triggers": ["<"], "structures": [structure]})
    assert json.loads(str(old.structural_tag))["format"] == {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG]}


def test_the_type_of_a_tag_in_a_list_may_be_left_out() -> None:
    bare = {name: value for name, value in TAG.items() if name != "type"}
    assert checked({**TRIGGERED, "tags": [bare]}) == TRIGGERED


def test_the_schema_true_allows_any_json() -> None:
    assert checked({"type": "json_schema", "json_schema": True}) == {"type": "json_schema", "json_schema": {}}


def nested(depth: int) -> Any:
    return TEXT if depth == 0 else {"type": "sequence", "elements": [nested(depth - 1)]}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (None, "format must be an object with a type, not None"),
        ([], "format must be an object"),
        ({}, "format.type must be one of const_string"),
        ({"type": "xml"}, "format.type must be one of .*not 'xml'"),
        ({"type": ["tag"]}, "format.type must be one of"),
        ({"type": "any_text", "excluded_str": ["a"]}, "format.excluded_str is not supported"),
        ({"type": "const_string"}, "format.value is missing"),
        ({"type": "const_string", "value": ""}, "format.value must be a string that is not empty"),
        ({"type": "const_string", "value": 1}, "format.value must be a string"),
        ({"type": "json_schema", "json_schema": False}, "format.json_schema must be a JSON schema"),
        ({"type": "json_schema", "json_schema": "{}"}, "format.json_schema must be a JSON schema"),
        ({"type": "sequence", "elements": []}, "format.elements must be a list that is not empty"),
        ({"type": "sequence", "elements": [TEXT, 3]}, r"format.elements\[1\] must be an object"),
        ({**TAG, "content": "text"}, "format.content must be an object"),
        ({**TAG, "end": None}, "format.end must be a string"),
        ({**TAG, "lazy": 1}, "format.lazy must be true or false"),
        ({"type": "json_schema", "json_schema": {}, "whitespace_pattern": ""}, "format.whitespace_pattern must be a"),
        ({**TRIGGERED, "tags": [TEXT]}, r'format.tags\[0\].type must be "tag"'),
        ({**TRIGGERED, "triggers": ["b"]}, r"format.tags\[0\].begin must begin with exactly one .*none does"),
        ({**TRIGGERED, "triggers": ["<", "<a"]}, "exactly one of the triggers: 2 do"),
        ({**TRIGGERED, "triggers": "<"}, "format.triggers must be a list"),
        ({**TRIGGERED, "or_text": ["x"]}, "format.or_text must be some of the triggers, not 'x'"),
        ({**TRIGGERED, "or_text": []}, "format.or_text must be a list that is not empty"),
        ({**TRIGGERED, "at_least_one": 1}, "format.at_least_one must be true or false"),
        (nested(16), "nested more than 16 deep"),
        ({"type": "const_string", "value": "\ud800"}, "half a character"),
        ({"type": "const_string", "value": "x" * MAX_STRUCTURAL_TAG_BYTES}, "structural_tag is too large"),
        ({"type": "json_schema", "json_schema": {"const": "x" * 70_000}}, "structural_tag is too large"),
        ({"type": "regex", "pattern": "x" * 20_000}, "structural_tag is too large"),
        ({"type": "grammar", "grammar": "x" * 20_000}, "structural_tag is too large"),
        ({"type": "json_schema", "json_schema": {}, "whitespace_pattern": "x" * 20_000}, "structural_tag is too large"),
        ({"type": "json_schema", "json_schema": {"const": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_what_is_wrong_is_named(form: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        checked(form)
    assert str(caught.value.param).startswith("structured_outputs.structural_tag")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (3, "structural_tag must be a structural tag"),
        ("{", "structural_tag is not valid JSON"),
        ("[" * 100_000, "structural_tag is not valid JSON"),
        ("[]", "structural_tag must be a structural tag"),
        ({}, "must hold format, or structures and triggers, not nothing"),
        ({"type": "tag", "format": TEXT}, 'type must be "structural_tag"'),
        ({"format": TEXT, "x": 1}, "must hold format"),
        ({"structures": []}, "structures, a list of objects, and triggers"),
        ({"structures": [], "triggers": ["a"]}, "tags must be a list that is not empty"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, r"structures\[0\] must be an object with begin, schema"),
    ],
)
def test_malformed_tags_are_refused(tag: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        StructuredOutputsParams(structural_tag=tag)


def test_white_space_is_not_of_tags() -> None:
    with pytest.raises(InvalidRequestError, match="whitespace_pattern is of JSON"):
        StructuredOutputsParams(structural_tag={"format": TEXT}, whitespace_pattern=" ")
