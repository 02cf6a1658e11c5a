"""What bodies ask their answers to look like, in OpenAI's and in vLLM's words; nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.server.openai.requests import parse_chat_completion, parse_completion
from pellucid.server.openai.response_format import structured_outputs
from tests.support.served_models import served_model

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
JSON_SCHEMA = {"name": "thing", "schema": SCHEMA}
MODEL = served_model()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA}}, {"json": SCHEMA}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {**JSON_SCHEMA, "description": "of a thing", "strict": True},
                }
            },
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}}, {"regex": "a+"}),
        ({"guided_json": SCHEMA, "guided_regex": None}, {"json": SCHEMA}),
        ({"guided_json": True, "guided_whitespace_pattern": " ?"}, {"json": True, "whitespace_pattern": " ?"}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "start: WORD\nWORD: /a/"}, {"grammar": "start: WORD\nWORD: /a/"}),
    ],
)
def test_what_is_asked_for(body: dict[str, Any], expected: dict[str, Any] | None) -> None:
    params = None if expected is None else StructuredOutputsParams(**expected)
    assert structured_outputs(body) == params
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body}
    assert parse_chat_completion(chat, MODEL).sampling_params.structured_outputs == params
    completion = {"model": "m", "prompt": "hi", **body}
    assert parse_completion(completion, MODEL).sampling_params.structured_outputs == params


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "structured_outputs"),
        ({"guided_choice": "b"}, "structured_outputs.choice"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**JSON_SCHEMA, "strict": "yes"}}},
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**JSON_SCHEMA, "more": 1}}},
            "response_format.json_schema.more",
        ),
        ({"structured_outputs": ["a"]}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"guided": "a"}}, "structured_outputs.guided"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        structured_outputs(body)
    assert refused.value.param == param
