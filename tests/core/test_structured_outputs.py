"""StructuredOutputsParams takes exactly one thing, checked, immutable and hashable."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}, "né": {"const": "日本"}}}


def test_a_schema_is_kept_as_text_with_its_order() -> None:
    params = StructuredOutputsParams(json=SCHEMA)
    assert params.json == json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))
    assert params == StructuredOutputsParams(json=json.dumps(SCHEMA, indent=4))
    assert params == StructuredOutputsParams(json=MappingProxyType(SCHEMA))
    assert hash(params) == hash(StructuredOutputsParams(json=dict(SCHEMA)))
    assert params != StructuredOutputsParams(json={"type": "object", "properties": {"a": {}, "b": {}}})
    assert StructuredOutputsParams(json=True).json == StructuredOutputsParams(json={}).json == "{}"


def test_what_is_given_has_a_name() -> None:
    given: dict[str, Any] = {"json": {}, "json_object": True, "regex": "a", "choice": ["a"], "grammar": 'start: "a"'}
    for kind, value in given.items():
        assert StructuredOutputsParams(**{kind: value}).kind == kind


def test_choices_are_a_tuple_without_repetitions() -> None:
    assert StructuredOutputsParams(choice=iter(["b", "a", "b"])).choice == ("b", "a")


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        ({}, "", "none is given"),
        ({"regex": "a", "choice": ["a"]}, "", "not regex and choice together"),
        ({"json": {}, "json_object": True}, "", "not json and json_object together"),
        ({"json": False}, "json", "allows no answer"),
        ({"json": "false"}, "json", "allows no answer"),
        ({"json": 3}, "json", "a JSON schema: an object"),
        ({"json": "[]"}, "json", "a JSON schema: an object"),
        ({"json": "{"}, "json", "not valid JSON"),
        ({"json": '{"const": NaN}'}, "json", "NaN is no JSON"),
        ({"json": {"const": float("inf")}}, "json", "cannot be written as JSON"),
        ({"json": {"const": {1, 2}}}, "json", "a set is no JSON"),
        ({"json": '{"a":' * 100_000}, "json", "too large"),
        ({"json": '{"a":' * 10_000}, "json", "not valid JSON: .+"),
        ({"json": {"const": "x" * MAX_SCHEMA_BYTES}}, "json", f"at most {MAX_SCHEMA_BYTES:,}"),
        ({"json": {"const": "\ud800"}}, "json", "half a character"),
        ({"json_object": 1}, "json_object", "true or false"),
        ({"regex": ""}, "regex", "not empty"),
        ({"regex": 5}, "regex", "a string"),
        ({"regex": "é" * MAX_GRAMMAR_BYTES}, "regex", f"{2 * MAX_GRAMMAR_BYTES:,} bytes"),
        ({"grammar": "x" * (MAX_GRAMMAR_BYTES + 1)}, "grammar", "too large"),
        ({"grammar": "\ud800"}, "grammar", "half a character"),
        ({"choice": []}, "choice", "not 0 of them"),
        ({"choice": "ab"}, "choice", "not 'ab'"),
        ({"choice": ["a", ""]}, "choice", "not ''"),
        ({"choice": ["a", 5]}, "choice", "not 5"),
        ({"choice": [str(n) for n in range(MAX_CHOICES + 1)]}, "choice", f"not {MAX_CHOICES + 1} of them"),
        ({"choice": ["x" * MAX_SCHEMA_BYTES, "y"]}, "choice", "too large"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern", "needs json"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern", "not empty"),
    ],
)
def test_what_is_wrong_is_refused_by_name(params: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        StructuredOutputsParams(**params)
    assert refused.value.param == f"structured_outputs{'.' if param else ''}{param}"
    assert len(refused.value.message) < 400


def test_a_grammar_needs_the_end_that_ignore_eos_takes_away() -> None:
    params = StructuredOutputsParams(choice=["a"])
    assert SamplingParams(structured_outputs=params).structured_outputs is params
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        SamplingParams(structured_outputs=params, ignore_eos=True)
