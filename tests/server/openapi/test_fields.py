"""Bodies of requests are described with the fields that their parsers know, all of them and no other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

from pellucid.server.anthropic import requests as anthropic_requests
from pellucid.server.openai import fields as openai_fields
from pellucid.server.openai import responses_api_requests
from pellucid.server.openai.embeddings import parse_embeddings
from pellucid.server.openai.requests import parse_chat_completion, parse_completion
from pellucid.server.openai.score import parse_score
from pellucid.server.openai.tokenization import detokenize, tokenize
from pellucid.server.openapi.document import all_operations, document
from pellucid.server.openapi.schema import Schema
from tests.support.served_models import served_model

PARSERS: dict[str, Callable[..., Any]] = {
    "/v1/chat/completions": parse_chat_completion,
    "/v1/completions": parse_completion,
    "/v1/embeddings": parse_embeddings,
    "/v1/messages": anthropic_requests.parse_messages,
    "/v1/messages/count_tokens": anthropic_requests.parse_count_tokens,
    "/v1/responses": responses_api_requests.parse_response,
    "/v1/score": parse_score,
    "/detokenize": detokenize,
    "/tokenize": tokenize,
}


class KnownFields(Exception):
    """What a parser would have refused a body by."""


@pytest.fixture(autouse=True)
def _parsers_tell_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(path: str, fields: Any, known: Collection[str], neutral: Collection[str] = ()) -> None:
        assert path == ""
        raise KnownFields({*known, *neutral})

    for module in (anthropic_requests, openai_fields, responses_api_requests):
        monkeypatch.setattr(module, "check_fields", tell)


def alternatives(path: str) -> Iterator[Schema]:
    """The schemas of a body, one for each form that it may have."""
    found = document(all_operations(), needs_key=False)
    content = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = found["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    yield from schema.get("anyOf", [schema])


def check(parse: Callable[..., Any], schema: Schema) -> None:
    """AssertionError unless the parser knows the fields of the schema."""
    with pytest.raises(KnownFields) as caught:
        parse(dict.fromkeys(schema["required"], "a"), served_model())
    (known,) = caught.value.args
    assert set(known) == set(schema["properties"])


@pytest.mark.parametrize("path", sorted(PARSERS))
def test_the_fields_are_those_of_the_parser(path: str) -> None:
    for schema in alternatives(path):
        check(PARSERS[path], schema)


def test_every_body_has_its_parser_here() -> None:
    assert PARSERS.keys() == {path for (_, path), operation in all_operations().items() if operation.body is not None}


def test_the_check_catches_a_field_more_and_one_less() -> None:
    (schema,) = alternatives("/v1/completions")
    properties = schema["properties"]
    with pytest.raises(AssertionError):
        check(parse_completion, {**schema, "properties": {**properties, "joy": {}}})
    with pytest.raises(AssertionError):
        check(parse_completion, {**schema, "properties": {name: {} for name in properties if name != "seed"}})
