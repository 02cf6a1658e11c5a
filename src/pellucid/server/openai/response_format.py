"""What a request body asks its answer to look like: OpenAI's `response_format`, or vLLM's `structured_outputs` and the
`guided_*` that it had before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.validation import check_boolean
from pellucid.server.json_fields import check_fields, read_choice, read_object, read_schema, read_string, required

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
    given = read_object("structured_outputs", structured)
    check_fields("structured_outputs", given, {field.name for field in fields(StructuredOutputsParams)})
    return StructuredOutputsParams(**given)


def _of_response_format(response_format: Any) -> StructuredOutputsParams | None:
    fields = read_object("response_format", response_format)
    kind = read_choice("response_format.type", fields.get("type"), ("text", "json_object", "json_schema"))
    if kind != "json_schema":
        check_fields("response_format", fields, ("type",))
        return None if kind == "text" else StructuredOutputsParams(json_object=True)
    check_fields("response_format", fields, ("type", "json_schema"))
    path = "response_format.json_schema"
    described = read_object(path, required("response_format", fields, "json_schema"))
    check_fields(path, described, JSON_SCHEMA_FIELDS)
    read_string(f"{path}.name", required(path, described, "name"))
    check_boolean(f"{path}.strict", described.get("strict", True))
    return StructuredOutputsParams(json=read_schema(f"{path}.schema", required(path, described, "schema")))
