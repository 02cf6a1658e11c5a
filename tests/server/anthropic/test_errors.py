"""Errors in Anthropic's form: of the types that its client knows."""

from __future__ import annotations

import pytest
from anthropic.types import ErrorResponse

from pellucid.core.errors import EngineError, InvalidRequestError, ModelNotFoundError, PellucidError, QueueFullError
from pellucid.server.anthropic.errors import ThreadsNotSupportedError, error_body
from pellucid.server.errors import AuthenticationError, DeadlineError, ForbiddenError, NotReadyError, OverloadedError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError, "invalid_request_error"),
        (AuthenticationError, "authentication_error"),
        (ForbiddenError, "permission_error"),
        (ModelNotFoundError, "not_found_error"),
        (QueueFullError, "rate_limit_error"),
        (EngineError, "api_error"),
        (NotReadyError, "overloaded_error"),
        (OverloadedError, "overloaded_error"),
        (DeadlineError, "timeout_error"),
    ],
)
def test_types(error: type[PellucidError], kind: str) -> None:
    body = error_body(error("what happened", param="x"))
    assert ErrorResponse.model_validate(body).error.type == kind
    assert body["error"]["message"] == "what happened"
    assert "details" not in body["error"]


def test_the_client_is_told_to_go_on_without_threads() -> None:
    body = error_body(ThreadsNotSupportedError("no", param="thread"))
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
