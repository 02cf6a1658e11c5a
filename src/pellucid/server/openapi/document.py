"""The OpenAPI document of the server. (https://spec.openapis.org/oas/v3.1.1.html)"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from pellucid import __version__
from pellucid.core import errors as core_errors
from pellucid.core.errors import PellucidError
from pellucid.server import errors as server_errors
from pellucid.server.openapi import completions, embeddings, messages, operations, responses_api
from pellucid.server.openapi.operation import JSON, Operation
from pellucid.server.openapi.schema import STRING, Schema, answer_object, const, described, enum, nullable, ref

DESCRIBED: tuple[ModuleType, ...] = (completions, embeddings, messages, operations, responses_api)
"""The modules that describe routes: each has OPERATIONS, by method and path, and the schemas that these refer to."""

TAGS = {
    "OpenAI": "Names and meanings of OpenAI's API, and beyond it of vLLM's.",
    "Anthropic": "Names and meanings of Anthropic's API.",
    "vLLM": "Names and meanings of vLLM's API.",
    "Operation": "For operators.",
    "Pages": "For people.",
}


def all_operations() -> dict[tuple[str, str], Operation]:
    """Every operation that is described, by method and path."""
    return {key: operation for module in DESCRIBED for key, operation in module.OPERATIONS.items()}


def document(routes: Iterable[tuple[str, str]], *, needs_key: bool) -> dict[str, Any]:
    """The document of the server that has these routes.

    Args:
        routes: method in lower case, and path, of each.
        needs_key: whether requests need an API key.

    Raises:
        KeyError: a route is not described.
    """
    described_operations = all_operations()
    paths: dict[str, dict[str, Any]] = {}
    for method, path in routes:
        paths.setdefault(path, {})[method] = _operation(method, path, described_operations[method, path], needs_key)
    used = {operation["tags"][0] for methods in paths.values() for operation in methods.values()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pellucid",
            "version": __version__,
            "description": "An LLM inference engine you can see through. A field that is not supported is refused by "
            "its name, never ignored; null is as good as leaving a field out.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items() if name in used],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": _security_schemes()},
    }


def _security_schemes() -> dict[str, Any]:
    return {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, as OpenAI's clients send it."},
        "basic": {"type": "http", "scheme": "basic", "description": "An API key as the password, for browsers."},
        "x-api-key": {
            "type": "apiKey",
            "in": "header",
            "name": "x-api-key",
            "description": "An API key, as Anthropic's clients send it.",
        },
    }


def _operation(method: str, path: str, operation: Operation, needs_key: bool) -> dict[str, Any]:
    form = "AnthropicError" if operation.has_anthropic_errors else "Error"
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": _content(operation.answer)}}
    for status, (meaning, schema) in operation.other_answers.items():
        responses[str(status)] = {"description": meaning, "content": _content({JSON: schema})}
    for status, kinds in operation.all_errors().items():
        meanings = dict.fromkeys(f"`{kind.code}`: {_first_sentence(kind)}" for kind in kinds)
        if str(status) in responses:  # an answer that is no error, or one
            of_both = {"anyOf": [operation.other_answers[status][1], ref(form)]}
            text = " ".join([responses[str(status)]["description"], *meanings])
            responses[str(status)] = {"description": text, "content": _content({JSON: of_both})}
        else:
            responses[str(status)] = {"description": " ".join(meanings), "content": _content({JSON: ref(form)})}
        if status in (429, 503):
            responses[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
            }
    described_operation: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": _operation_id(method, path),
        "responses": dict(sorted(responses.items())),
        "security": [{name: []} for name in _security_schemes()] if needs_key and not operation.is_open else [],
    }
    if operation.description:
        described_operation["description"] = operation.description
    if operation.parameters:
        described_operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": STRING}
            for name, text in operation.parameters.items()
        ]
    if operation.body is not None:
        content: dict[str, Any] = {"schema": operation.body}
        if operation.example is not None:
            content["example"] = operation.example
        described_operation["requestBody"] = {"required": True, "content": {JSON: content}}
    return described_operation


def _operation_id(method: str, path: str) -> str:
    words = path.translate(str.maketrans("/.{}_", "     ")).split()
    return "_".join([method, *words])


def _content(by_media_type: Any) -> dict[str, Any]:
    return {kind: {} if schema is None else {"schema": schema} for kind, schema in by_media_type.items()}


def _first_sentence(kind: type[PellucidError]) -> str:
    """The first sentence of a docstring; nothing where Python runs without these."""
    if kind is PellucidError:
        return "A defect of the server, which has logged it."
    text = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return f"{text.partition('. ')[0].rstrip('.')}."


def _schemas() -> dict[str, Schema]:
    components = {name: schema for module in DESCRIBED for name, schema in module.schemas().items()}
    return dict(sorted({**components, **_error_schemas()}.items()))


def _error_schemas() -> dict[str, Schema]:
    kinds = [
        kind
        for module in (core_errors, server_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, PellucidError)
    ]
    codes = enum(*sorted({kind.code for kind in kinds}))
    error = {
        "message": described(STRING, "What was found, and what would work."),
        "type": STRING,
        "param": described(nullable(STRING), "The field at fault."),
        "code": described(codes, "Stable, to be read by machines."),
    }
    anthropic = answer_object({"type": STRING, "message": STRING})
    return {
        "Error": answer_object({"error": answer_object(error)}),
        "AnthropicError": answer_object(
            {"type": const("error"), "error": anthropic, "request_id": STRING}, optional=("request_id",)
        ),
    }
