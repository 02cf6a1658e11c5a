"""What a request body asks its answer to look like: OpenAI's `response_format`, or vLLM's `structured_outputs` and the
`guided_*` that it had before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.validation import check_boolean, refusal, shown

GUIDED_FIELDS = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")}
RESPONSE_FORMAT_FIELDS = frozenset(("response_format", "structured_outputs", *GUIDED_FIELDS))
JSON_SCHEMA_FIELDS = frozenset(("name", "description", "schema", "strict"))


def structured_outputs(body: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """What `body` asks for; None for anything.

    A schema is always held to, whether it says `strict` or not; `name` and `description` change nothing.

    Raises:
        InvalidRequestError: several are given, or one is malformed.
    """
    response_format, structured = body.get("response_format"), body.get("structured_outputs")
    asked = None if response_format is None else _of_response_format(response_format)
    guided = {field: body[name] for name, field in GUIDED_FIELDS.items() if body.get(name) is not None}
    if structured is None and not guided:
        return asked
    if asked is not None or (structured is not None and guided):
        name = "structured_outputs" if structured is not None else f"guided_{next(iter(guided))}"
        other = "response_format" if asked is not None else f"guided_{next(iter(guided))}"
        raise InvalidRequestError(f"{other} and {name} ask for two things: give one", param=name)
    if guided:
        return StructuredOutputsParams(**guided)
    if not isinstance(structured, dict):
        raise refusal("structured_outputs", structured, "an object")
    _check_fields("structured_outputs", structured, {field.name for field in fields(StructuredOutputsParams)})
    return StructuredOutputsParams(**{name: value for name, value in structured.items() if value is not None})


def _of_response_format(response_format: Any) -> StructuredOutputsParams | None:
    if not isinstance(response_format, dict):
        raise refusal("response_format", response_format, "an object")
    kind = response_format.get("type")
    if kind == "text":
        _check_fields("response_format", response_format, {"type"})
        return None
    if kind == "json_object":
        _check_fields("response_format", response_format, {"type"})
        return StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        raise refusal("response_format.type", kind, '"text", "json_object" or "json_schema"')
    _check_fields("response_format", response_format, {"type", "json_schema"})
    described = response_format.get("json_schema")
    if not isinstance(described, dict):
        raise refusal("response_format.json_schema", described, "an object with a name and a schema")
    _check_fields("response_format.json_schema", described, JSON_SCHEMA_FIELDS)
    if not isinstance(described.get("name"), str):
        raise refusal("response_format.json_schema.name", described.get("name"), "a string")
    if described.get("strict") is not None:
        check_boolean("response_format.json_schema.strict", described["strict"])
    schema = described.get("schema")
    if not isinstance(schema, dict):
        raise refusal("response_format.json_schema.schema", schema, "a JSON schema, an object")
    return StructuredOutputsParams(json=schema)


def _check_fields(name: str, found: Mapping[str, Any], known: frozenset[str] | set[str]) -> None:
    for field in found:
        if field not in known:
            raise InvalidRequestError(f"{shown(field)} is not a field of {name}", param=f"{name}.{field}")
