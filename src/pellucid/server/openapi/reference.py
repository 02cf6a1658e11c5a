"""The OpenAPI document as a page to read: no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pellucid.server.openapi.operation import JSON
from pellucid.server.openapi.schema import Schema
from pellucid.server.openapi.words import in_words

FOLDER = Path(__file__).parent
STYLE = (FOLDER / "reference.css").read_text(encoding="utf-8")
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of the page: its own style, and nothing else."""


@dataclass(frozen=True, slots=True)
class Field:
    """A row of a table of fields."""

    name: str
    kind: str
    description: str
    default: str
    is_required: bool


def reference(document: dict[str, Any]) -> str:
    """The page, as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.loader = jinja2.FileSystemLoader(FOLDER)
    environment.filters["code"] = _code
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return environment.get_template("reference.html").render(
        info=document["info"],
        style=Markup(STYLE),
        groups=[(tag, list(_of_tag(document, tag["name"]))) for tag in document["tags"]],
        objects=[(name, _fields(schema)) for name, schema in _objects(document)],
        needs_key=any(
            operation["security"] for methods in document["paths"].values() for operation in methods.values()
        ),
    )


def _of_tag(document: dict[str, Any], tag: str) -> Iterator[dict[str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if tag in operation["tags"]:
                yield {**operation, "path": path, "method": method.upper(), **_body(document, operation)}


def _body(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    if "requestBody" not in operation:
        return {"fields": [], "example": None}
    content = operation["requestBody"]["content"][JSON]
    return {"fields": _fields(_resolved(document, content["schema"])), "example": content.get("example")}


def _resolved(document: dict[str, Any], schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    found: Schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _objects(document: dict[str, Any]) -> Iterator[tuple[str, Schema]]:
    """The components but the bodies of requests, which stand with their route."""
    bodies = {
        operation["requestBody"]["content"][JSON]["schema"].get("$ref", "").rpartition("/")[2]
        for methods in document["paths"].values()
        for operation in methods.values()
        if "requestBody" in operation
    }
    for name, schema in document["components"]["schemas"].items():
        if name not in bodies:
            yield name, schema


def _fields(schema: Schema) -> list[Field]:
    """The fields of an object, those that must be there first; those of what it holds after it, as in `a.b[].c`."""
    rows: dict[str, Field] = {}
    for _, alternative in _objects_in(schema):
        for name, each in alternative.get("properties", {}).items():
            default = json.dumps(each["default"]) if "default" in each else ""
            is_required = name in alternative.get("required", ()) and (name not in rows or rows[name].is_required)
            rows[name] = Field(name, in_words(each), each.get("description", ""), default, is_required)
            for place, held in _objects_in(each):
                for inner in _fields(held):
                    rows.setdefault(f"{name}{place}.{inner.name}", replace(inner, name=f"{name}{place}.{inner.name}"))
    required = {name for name, row in rows.items() if row.is_required}
    return sorted(rows.values(), key=lambda row: re.split(r"[.\[]", row.name)[0] not in required)


def _objects_in(schema: Schema, place: str = "") -> Iterator[tuple[str, Schema]]:
    """The objects that a value may be or hold, and where: `[]` is each item of a list."""
    if "properties" in schema:
        yield place, schema
    if "items" in schema:
        yield from _objects_in(schema["items"], f"{place}[]")
    for alternative in schema.get("anyOf", ()):
        yield from _objects_in(alternative, place)


def _code(text: str) -> Markup:
    """Text with `code` marked up."""
    pieces = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
