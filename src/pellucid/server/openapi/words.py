"""JSON schemas in words, for people."""

from __future__ import annotations

import json

from pellucid.server.openapi.schema import Schema

_KINDS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "object": "object",
    "null": "null",
}
_LARGE = {2**31 - 1: "2^31 - 1", -(2**31) + 1: "-2^31 + 1", 2**64 - 1: "2^64 - 1"}


def in_words(schema: Schema) -> str:
    """What values a schema takes, in a line. That null is as good as nothing goes without saying."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(in_words(each) for each in schema["anyOf"] if each != {"type": "null"}))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        values = [json.dumps(value) for value in schema["enum"] if value is not None]
        return " or ".join(values) or "null"
    kinds = schema.get("type")
    kind = next((each for each in kinds if each != "null"), "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        return f"list of {_count(schema)}({in_words(schema.get('items', {}))})"
    if kind in ("integer", "number"):
        return _KINDS[kind] + _limits(schema)
    if kind == "string" and "maxLength" in schema:
        return f"text of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return _KINDS[kind] if kind else "anything"


def _count(schema: Schema) -> str:
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is not None:
        return f"{least or 'up'} to {most} "
    return f"at least {least} " if least else ""


def _limits(schema: Schema) -> str:
    low, high, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if high is None:
        return "" if low is None else f" from {low}"
    if above is not None:
        return f" over {above:g}, up to {_number(high)}"
    return f" up to {_number(high)}" if low is None else f", {_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return _LARGE.get(value, f"{value:g}") if isinstance(value, int) else f"{value:g}"
