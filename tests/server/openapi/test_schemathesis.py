"""Requests made from the OpenAPI document, valid ones and invalid ones, to a server that listens: it keeps its word."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from pellucid.server.openapi.document import all_operations
from pellucid.server.openapi.operation import JSON
from tests.support.server_process import MODEL, SECONDS, ServerProcess, ready_server

pytestmark = pytest.mark.slow

EXAMPLES = 4
"""Of each operation and few of its fields."""
FIELDS = 5
"""So many at a time: of more, some contradict each other, and a request with 80 takes long to make."""
SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(chat_model: str) -> Iterator[ServerProcess]:
    """One that takes small requests alone, so that none takes long."""
    with ready_server(chat_model, "--max-model-len", "128", "--max-output-tokens", "64") as server:
        yield server


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    """The document, with the one name of the model that there is: another is refused before all else."""
    _, found = server.get("/openapi.json")
    for component in objects(found):
        if component.get("additionalProperties") is False and "model" in component["properties"]:
            component["properties"]["model"] = {"const": MODEL}
    return dict(found)


def objects(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of its components; where one has alternatives, these."""
    for component in document["components"]["schemas"].values():
        yield from component.get("anyOf", [component])


def of_few_fields(document: dict[str, Any], method: str, path: str) -> Iterator[dict[str, Any]]:
    """Documents of one operation, each with the fields that a body must have and a few of the others."""
    operation = document["paths"][path][method]
    alone = {**document, "paths": {path: {method: operation}}}
    if "requestBody" not in operation:
        yield alone
        return
    name = operation["requestBody"]["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
    components = document["components"]
    body = components["schemas"][name]
    if "properties" not in body:
        yield alone
        return
    required = body.get("required", ())
    optional = sorted(body["properties"].keys() - set(required))
    num_pieces = -(-len(optional) // FIELDS)
    for piece in range(num_pieces):
        kept = {*required, *optional[piece::num_pieces]}
        properties = {field: schema for field, schema in body["properties"].items() if field in kept}
        schemas = {**components["schemas"], name: {**body, "properties": properties}}
        yield {**alone, "components": {**components, "schemas": schemas}}


def check(url: str, document: dict[str, Any], method: str, path: str, mode: GenerationMode) -> Counter[int]:
    """Send requests of one operation; an exception where the answer is not what the document promises.

    Returns:
        How often each status came.
    """
    expected = [checks.negative_data_rejection] if mode.is_negative else []
    statuses: Counter[int] = Counter()

    def run(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        response = case.call_and_validate(checks=[*CHECKS, *expected], timeout=SECONDS)
        statuses[response.status_code] += 1

    for few in of_few_fields(document, method, path):
        schema = schemathesis.openapi.from_dict(few, config=SchemathesisConfig())
        schema.config.update(base_url=url)
        operation = schema[path][method]
        SETTINGS(given(st.data())(run))()
    return statuses


@pytest.mark.parametrize(("method", "path"), sorted(all_operations()))
def test_valid_requests(server: ServerProcess, document: dict[str, Any], method: str, path: str) -> None:
    document = copy.deepcopy(document)
    for component in objects(document):
        if component.get("additionalProperties") is False and "max_tokens" in component["properties"]:
            component["properties"]["max_tokens"]["maximum"] = 8  # of those that are valid, what this server takes
    statuses = check(server.url, document, method, path, GenerationMode.POSITIVE)
    assert statuses[200] or path == "/v1/models/{model}"


@pytest.mark.parametrize(("method", "path"), sorted(key for key, each in all_operations().items() if each.body))
def test_invalid_requests(server: ServerProcess, document: dict[str, Any], method: str, path: str) -> None:
    statuses = check(server.url, document, method, path, GenerationMode.NEGATIVE)
    assert not statuses[200]


@pytest.mark.parametrize("defect", ["an answer", "a status", "a media type"])
def test_the_check_catches_a_document_that_promises_something_else(
    server: ServerProcess, document: dict[str, Any], defect: str
) -> None:
    document = copy.deepcopy(document)
    responses = document["paths"]["/version"]["get"]["responses"]
    if defect == "an answer":
        document["components"]["schemas"]["Version"]["properties"]["version"] = {"type": "integer"}
    elif defect == "a status":
        responses["201"] = responses.pop("200")
    else:
        responses["200"]["content"] = {"text/html": {}}
    with pytest.raises(FailureGroup):
        check(server.url, document, "get", "/version", GenerationMode.POSITIVE)
