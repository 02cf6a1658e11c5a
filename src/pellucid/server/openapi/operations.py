"""What the document says of the routes that operators use, and of the models."""

from __future__ import annotations

from pellucid.core.errors import ModelNotFoundError
from pellucid.server.errors import NotReadyError
from pellucid.server.openapi.operation import JSON, Operation
from pellucid.server.openapi.schema import (
    INTEGER,
    NUMBER,
    STRING,
    Schema,
    answer_object,
    array,
    const,
    described,
    enum,
    ref,
)

HTML: dict[str, Schema | None] = {"text/html": None}


def schemas() -> dict[str, Schema]:
    """The components that these routes need, by name."""
    progress = answer_object({"stage": STRING, "done": INTEGER, "total": INTEGER})
    readiness = {
        "state": enum("loading", "ready", "draining", "failed"),
        "models": array(STRING),
        "progress": described(progress, "Of loading, in bytes; 0 where they are not known."),
        "error": described(STRING, "Why the model could not be loaded."),
        "load_seconds": described(NUMBER, "How long loading took."),
    }
    model = {
        "id": STRING,
        "object": const("model"),
        "created": described(INTEGER, "Seconds since 1970."),
        "owned_by": STRING,
        "root": described(STRING, "What was loaded."),
        "max_model_len": described(INTEGER, "Most tokens of a prompt and its continuation together."),
    }
    return {
        "Health": answer_object({"status": const("ok")}),
        "Readiness": answer_object(readiness, optional=("progress", "error", "load_seconds")),
        "Version": answer_object({"version": STRING}),
        "Model": answer_object(model),
        "ModelList": answer_object({"object": const("list"), "data": array(ref("Model"))}),
    }


OPERATIONS = {
    ("get", "/"): Operation(tag="Pages", summary="The page of the server", answer=HTML),
    ("get", "/docs"): Operation(tag="Pages", summary="This reference", answer=HTML),
    ("get", "/openapi.json"): Operation(tag="Pages", summary="This reference, as OpenAPI", answer={JSON: None}),
    ("get", "/health"): Operation(
        tag="Operation", summary="Whether the process answers at all", answer={JSON: ref("Health")}, is_open=True
    ),
    ("get", "/ready"): Operation(
        tag="Operation",
        summary="Whether the model can be used",
        answer={JSON: ref("Readiness")},
        other_answers={503: ("Not now: the model is loading, or the server ends.", ref("Readiness"))},
    ),
    ("get", "/version"): Operation(tag="Operation", summary="Which Pellucid this is", answer={JSON: ref("Version")}),
    ("get", "/metrics"): Operation(
        tag="Operation",
        summary="What the server and its engine have counted",
        description="For Prometheus; OpenMetrics for who asks for that in `Accept`.",
        answer={"text/plain": None, "application/openmetrics-text": None},
    ),
    ("get", "/v1/models"): Operation(
        tag="OpenAI", summary="The names of the model", answer={JSON: ref("ModelList")}, errors=(NotReadyError,)
    ),
    ("get", "/v1/models/{model}"): Operation(
        tag="OpenAI",
        summary="One of them",
        parameters={"model": "A name of the model."},
        answer={JSON: ref("Model")},
        errors=(NotReadyError, ModelNotFoundError),
    ),
}
