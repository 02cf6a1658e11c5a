"""Building blocks of JSON schemas (draft 2020-12, as OpenAPI 3.1 has it)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def ref(name: str) -> Schema:
    """The schema of that name among the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def described(schema: Schema, description: str) -> Schema:
    """`schema` with a description, if there is one to give."""
    return {**schema, "description": description} if description else schema


def array(items: Schema, *, least: int = 0, most: int | None = None) -> Schema:
    """A list of `least` to `most` items."""
    schema: Schema = {"type": "array", "items": items}
    if least:
        schema["minItems"] = least
    if most is not None:
        schema["maxItems"] = most
    return schema


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def enum(*values: object) -> Schema:
    return {"enum": list(values)}


def const(value: object) -> Schema:
    return {"const": value}


def nullable(schema: Schema) -> Schema:
    """`schema`, or null."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        return schema if None in schema["enum"] else {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], NULL]}
    if not schema.keys() - {"description"}:
        return schema
    description = {key: value for key, value in schema.items() if key == "description"}
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {"anyOf": [rest, NULL], **description}


def request_object(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    """An object of a request: no other properties, and null for one that is not required is as good as leaving it
    out."""
    required = sorted(required)
    schema: Schema = {
        "type": "object",
        "properties": {
            name: value if name in required else nullable(value) for name, value in sorted(properties.items())
        },
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    return schema


def answer_object(properties: Mapping[str, Schema], optional: Iterable[str] = ()) -> Schema:
    """An object of an answer: all its properties are there, but for the `optional` ones, and no other."""
    optional = frozenset(optional)
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def attribute_descriptions(documented: type) -> dict[str, str]:
    """What the docstring of a class says of each attribute, by name; nothing where Python runs without docstrings."""
    descriptions: dict[str, str] = {}
    names: list[str] = []
    depth = 0
    for line in (documented.__doc__ or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if begin := re.match(r" +([a-z_][a-z_0-9]*(?:, [a-z_0-9]+)*): (.+)", line):
            names, depth = begin[1].split(", "), indent
            descriptions.update(dict.fromkeys(names, begin[2]))
        elif not line.strip() or indent <= depth:
            names = []
        else:
            for name in names:
                descriptions[name] += f" {line.strip()}"
    return {name: _sentence(text) for name, text in descriptions.items()}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
