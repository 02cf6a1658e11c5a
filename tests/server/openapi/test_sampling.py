from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from pellucid.core import sampling_params as tables
from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.validation import RealRange
from pellucid.server.openai.requests import SAMPLING_FIELDS
from pellucid.server.openai.response_format import RESPONSE_FORMAT_FIELDS, structured_outputs
from pellucid.server.openapi.sampling import sampling_properties, structured_properties
from pellucid.server.openapi.schema import Schema

LIMITS = sorted(
    {limit for reals in tables.REALS.values() for limit in (reals.low, reals.high)}
    | {limit for limits in (*tables.INTEGERS.values(), *tables.OPTIONAL_INTEGERS.values()) for limit in limits}
    | {tables.MIN_TEMPERATURE, tables.MAX_TEMPERATURE, 100, -100, 2**31 - 1}
)
INTEGERS = sorted({int(limit) + step for limit in LIMITS for step in (-1, 0, 1)})
REALS = [limit + step for limit in LIMITS for step in (-0.25, 0.25)]
TEXTS = ["", "a", "low", "never", "raw", "a" * 1024, "a" * 1025]
LISTS: list[Any] = [
    *([], [""], ["a"], ["a", 1], ["a" * 1025], [1], [0], [-1], [2**31 - 1], [2**31], [1.5], [None], [[1]], ["a"] * 64),
    *(["a"] * 65, ["a"] * 1025, [1] * 1024, [1] * 1025),
]
OBJECTS = [{}, {"1": 1}, {"1": 101}, {"a": 1}, {"1": "a"}]
VALUES: list[Any] = [*INTEGERS, *REALS, True, False, *TEXTS, *LISTS, *OBJECTS]
"""What JSON may hold, around every limit. No 1.0: JSON schemas take it for an integer, and SamplingParams does not."""


def is_taken(name: str, value: Any) -> bool:
    if name == "logit_bias" and isinstance(value, dict):  # as the parsers do: JSON's keys are strings
        value = {int(key) if key.isdigit() else key: bias for key, bias in value.items()}
    try:
        SamplingParams(**{name: value})
    except InvalidRequestError:
        return False
    return True


def check_schema(name: str, schema: Schema) -> None:
    """AssertionError unless the schema takes exactly what SamplingParams takes."""
    validator = jsonschema.Draft202012Validator(schema)
    for value in VALUES:
        if name == "logit_bias" and not isinstance(value, dict):
            continue  # what else SamplingParams takes here is for Python
        assert validator.is_valid(value) == is_taken(name, value), (name, value if len(str(value)) < 99 else "...")


@pytest.fixture(autouse=True)
def _each_field_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingParams, "_check_together", lambda params: None)


@pytest.mark.parametrize("name", sorted(sampling_properties()))
def test_a_schema_takes_what_sampling_params_takes(name: str) -> None:
    check_schema(name, sampling_properties()[name])


@pytest.mark.parametrize("name", ["top_p", "mirostat", "seed", "echo", "stop", "stop_token_ids"])
def test_the_check_catches_a_table_that_is_not_the_one_in_use(name: str) -> None:
    wrong: Mapping[str, Schema] = {
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "mirostat": {"type": "integer", "minimum": 0, "maximum": 3},
        "seed": {"type": "integer", "minimum": 0},
        "echo": {},
        "stop": {"type": "array", "items": {"type": "string"}},
        "stop_token_ids": {"type": "array", "items": {"type": "integer"}},
    }
    with pytest.raises(AssertionError):
        check_schema(name, wrong[name])


def test_a_changed_table_changes_the_schema_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.REALS, "top_p", RealRange(0, 0.5, open=True))
    with pytest.raises(AssertionError):
        check_schema("top_p", sampling_properties()["top_p"])


def test_every_field_is_described() -> None:
    properties = sampling_properties()
    assert {field.name for field in dataclasses.fields(SamplingParams)} - properties.keys() == {
        "structured_outputs",
        "logits_processors",
    }
    assert properties.keys() >= SAMPLING_FIELDS
    assert not [name for name, schema in properties.items() if not schema.get("description")]
    for name, schema in properties.items():
        if "default" in schema:
            jsonschema.validate(schema["default"], schema)
            assert getattr(SamplingParams(), name) == schema["default"]


STRUCTURED_BODIES: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": None}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "more": 1}}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
    {"response_format": {"type": "xml"}},
    {"response_format": {}},
    {"response_format": "json_object"},
    {"structured_outputs": {"json": {"type": "object"}}},
    {"structured_outputs": {"json": True}},
    {"structured_outputs": {"json": "{}"}},
    {"structured_outputs": {"json": 1}},
    {"structured_outputs": {"regex": "a+"}},
    {"structured_outputs": {"regex": ""}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"choice": [""]}},
    {"structured_outputs": {"grammar": "start: /a/", "json": None}},
    {"structured_outputs": {"more": 1}},
    {"structured_outputs": []},
    {"guided_json": {"type": "object"}},
    {"guided_regex": "a+"},
    {"guided_regex": 1},
    {"guided_choice": ["a"]},
]


@pytest.mark.parametrize("body", STRUCTURED_BODIES)
def test_the_form_of_answers_is_described_as_it_is_read(body: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": structured_properties(), "additionalProperties": False}
    try:
        structured_outputs(body)
        taken = True
    except InvalidRequestError:
        taken = False
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == taken


def test_every_field_of_structured_outputs_is_described() -> None:
    properties = structured_properties()
    assert properties.keys() == RESPONSE_FORMAT_FIELDS
    fields = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    assert properties["structured_outputs"]["properties"].keys() == fields
