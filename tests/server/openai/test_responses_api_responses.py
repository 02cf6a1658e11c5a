"""Responses as the Responses API writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import Response

from pellucid.core.errors import EngineError, PellucidError, QueueFullError
from pellucid.server.errors import RequestTooLargeError
from pellucid.server.openai.responses_api_requests import ResponsesRequest, parse_response
from pellucid.server.openai.responses_api_responses import failed_response, response_body
from tests.support.scripted_formats import ANSWERS, SCRIPTED, TOKENIZER, answer
from tests.support.served_models import served_model


def request(**body: Any) -> ResponsesRequest:
    asked = parse_response({"model": "m", "input": "hi", **body}, served_model())
    return replace(asked, generation=replace(asked.generation, chat=SCRIPTED))


def body_of(said: str, asked: ResponsesRequest | None = None, **ending: Any) -> dict[str, Any]:
    output, _ = answer(said, **ending)
    body = response_body(asked or request(), output, TOKENIZER, name="0", created=17)
    json.dumps(body, allow_nan=False)
    Response.model_validate(body)
    return body


def test_a_response() -> None:
    body = body_of("hello", request(metadata={"a": "b"}))
    assert (body["id"], body["object"], body["created_at"], body["status"]) == ("resp_0", "response", 17, "completed")
    assert (body["error"], body["incomplete_details"], body["metadata"]) == (None, None, {"a": "b"})
    assert body["completed_at"] >= 17
    assert Response.model_validate(body).output_text == "hello"
    assert body["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 13,
    }


@pytest.mark.parametrize("said", ANSWERS)
def test_the_client_reads_every_kind(said: str) -> None:
    body_of(said)


def test_reasoning_and_calls() -> None:
    body = body_of('<so>[{"a": 1}]')
    assert [item["type"] for item in body["output"]] == ["reasoning", "function_call"]
    assert body["output"][1]["arguments"] == '{"a": 1}'
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}


def test_one_that_was_cut_short() -> None:
    body = body_of("hello", finish_reason="length")
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert body["completed_at"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("broken"), "server_error"),
        (QueueFullError("later"), "rate_limit_exceeded"),
        (RequestTooLargeError("long"), "invalid_prompt"),
    ],
)
def test_one_that_failed(error: PellucidError, code: str) -> None:
    body = failed_response(request(), error, [], name="0", created=17)
    Response.model_validate(body)
    assert (body["status"], body["error"]) == ("failed", {"code": code, "message": error.message})
