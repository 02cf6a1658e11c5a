"""What the document says of a route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pellucid.core.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    PellucidError,
    QueueFullError,
)
from pellucid.server.errors import (
    AuthenticationError,
    DeadlineError,
    ForbiddenError,
    HeaderTooLargeError,
    NotReadyError,
    OverloadedError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)
from pellucid.server.openapi.schema import STRING, Schema, any_of, const, ref

JSON = "application/json"
EVENTS = "text/event-stream"

OF_ANY_ROUTE: tuple[type[PellucidError], ...] = (
    ForbiddenError,
    RequestTimeoutError,
    HeaderTooLargeError,
    OverloadedError,
    PellucidError,
)
OF_A_BODY: tuple[type[PellucidError], ...] = (
    InvalidRequestError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)
OF_THE_MODEL: tuple[type[PellucidError], ...] = (ModelNotFoundError, NotReadyError)
OF_GENERATION: tuple[type[PellucidError], ...] = (
    *OF_THE_MODEL,
    ContextLengthError,
    ModelFileError,
    QueueFullError,
    EngineClosedError,
    DeadlineError,
    CapacityError,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path, as the document has it.

    Attributes:
        tag: the group that it is in.
        summary: what it does, in a few words.
        answer: media type -> schema, of status 200; None where a media type needs none.
        description: more of that, in Markdown of which the reference shows paragraphs and `code` alone.
        body: schema of the JSON object that is sent; None for no body.
        example: a body that is answered.
        parameters: what the parameters in the path are, by name.
        other_answers: status -> (what it means, schema), where an answer that is no error has another status.
        errors: which there may be, beside those of any route.
        is_open: whether it needs no API key.
        has_anthropic_errors: whether errors have Anthropic's form.
    """

    tag: str
    summary: str
    answer: Mapping[str, Schema | None]
    description: str = ""
    body: Schema | None = None
    example: Mapping[str, object] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    other_answers: Mapping[int, tuple[str, Schema]] = field(default_factory=dict)
    errors: tuple[type[PellucidError], ...] = ()
    is_open: bool = False
    has_anthropic_errors: bool = False

    def all_errors(self) -> dict[int, list[type[PellucidError]]]:
        """Which errors there may be, by status."""
        kinds = [*OF_ANY_ROUTE, *self.errors]
        if self.body is not None:
            kinds += OF_A_BODY
        if not self.is_open:
            kinds.append(AuthenticationError)
        by_status: dict[int, list[type[PellucidError]]] = {}
        for kind in sorted(kinds, key=lambda kind: kind.status):
            by_status.setdefault(kind.status, []).append(kind)
        return by_status


def json_or_events(name: str, chunk: str) -> dict[str, Schema | None]:
    """What answers with the schema `name`, or with `stream` as events of the schema `chunk`, errors and `[DONE]`."""
    return {JSON: ref(name), EVENTS: event(any_of(const("[DONE]"), json_text(any_of(ref(chunk), ref("Error")))))}


def json_text(schema: Schema) -> Schema:
    """The text of a JSON value."""
    return {"type": "string", "contentMediaType": JSON, "contentSchema": schema}


def event(data: Schema) -> Schema:
    """Each of the events of a stream."""
    return {
        "type": "object",
        "description": "Of each server-sent event.",
        "properties": {"event": STRING, "data": data},
        "required": ["data"],
    }
