"""Errors in Anthropic's form: of the types that its client knows."""

from __future__ import annotations

import pytest
from anthropic.types import ErrorResponse

from pellucid.core.errors import EngineError, InvalidRequestError, ModelNotFoundError, PellucidError, QueueFullError
from pellucid.server.anthropic.errors import error_body
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
