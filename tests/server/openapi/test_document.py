from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from starlette.routing import Route

from pellucid.server.app import routes
from pellucid.server.openapi.document import all_operations, document
from pellucid.server.routes.docs import described_routes


def check_document(found: dict[str, Any]) -> None:
    """AssertionError unless it is an OpenAPI document whose references lead somewhere and whose examples fit."""
    OPENAPI_31_VALIDATOR.validate(found)
    components = found["components"]["schemas"]
    for name in components:
        jsonschema.Draft202012Validator.check_schema(components[name])
    for pointer in references(found):
        kind, _, name = pointer.removeprefix("#/components/").partition("/")
        assert name in found["components"][kind], pointer
    for methods in found["paths"].values():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" in content:
                jsonschema.validate(content["example"], {**content["schema"], "components": found["components"]})
    identifiers = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(set(identifiers)) == len(identifiers)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def check_routes(of_app: list[Any]) -> None:
    """AssertionError unless exactly the routes there are are described."""
    described, there = set(all_operations()), set(described_routes(of_app))
    assert there - described == set(), "without a description in server/openapi"
    assert described - there == set(), "described, but not there"


def test_the_document_is_valid() -> None:
    check_document(document(all_operations(), needs_key=True))
    check_document(document(all_operations(), needs_key=False))


def test_every_route_is_described() -> None:
    check_routes(list(routes()))


def test_the_check_catches_a_route_without_a_description() -> None:
    more = Route("/v1/joy", endpoint=lambda request: None, methods=["POST"])
    with pytest.raises(AssertionError, match="without a description"):
        check_routes([*routes(), more])
    with pytest.raises(KeyError):
        document(described_routes([*routes(), more]), needs_key=False)
    with pytest.raises(AssertionError, match="not there"):
        check_routes(list(routes())[1:])


@pytest.mark.parametrize("defect", ["a reference", "an example", "a field", "a schema"])
def test_the_check_catches_a_defect_of_the_document(defect: str) -> None:
    found = copy.deepcopy(document(all_operations(), needs_key=False))
    body = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    if defect == "a reference":
        body["schema"]["$ref"] += "s"
    elif defect == "an example":
        body["example"] = {"prompt": 1}
    elif defect == "a field":
        found["paths"]["/v1/completions"]["post"]["body"] = {}
    else:
        found["components"]["schemas"]["Version"]["type"] = "text"
    with pytest.raises(Exception):  # noqa: B017, PT011  # each check has errors of its own
        check_document(found)


def test_keys_are_asked_for_where_they_are_needed() -> None:
    with_keys = document(all_operations(), needs_key=True)["paths"]
    without = document(all_operations(), needs_key=False)["paths"]
    assert with_keys["/v1/completions"]["post"]["security"] == [{"bearer": []}, {"basic": []}, {"x-api-key": []}]
    assert with_keys["/health"]["get"]["security"] == []
    assert not any(operation["security"] for methods in without.values() for operation in methods.values())


def test_objects_of_requests_take_nothing_unknown() -> None:
    schemas = document(all_operations(), needs_key=False)["components"]["schemas"]
    for name in [name for name in schemas if name.endswith("Request")]:
        for alternative in schemas[name].get("anyOf", [schemas[name]]):
            assert alternative["additionalProperties"] is False, name
