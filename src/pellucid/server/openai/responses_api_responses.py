"""Responses of the Responses API. (https://platform.openai.com/docs/api-reference/responses/object)"""

from __future__ import annotations

import time
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import RequestOutput
from pellucid.server.chat.usage import num_reasoning_tokens
from pellucid.server.openai.responses_api_output import OutputEvents
from pellucid.server.openai.responses_api_requests import ResponsesRequest
from pellucid.tokenizer.tokenizer import Tokenizer


def response_body(
    request: ResponsesRequest, output: RequestOutput, tokenizer: Tokenizer, *, name: str, created: int
) -> dict[str, Any]:
    """The response that answers `request`, which asks for no log-probabilities.

    Args:
        output: the answer, which did not fail.
        name: unique; the `id`s of the response and of its items are made from it.
        created: seconds since 1970.
    """
    parser = request.generation.chat.format.parser(request.generation.chat)
    items = OutputEvents(name)
    for piece in [*parser.push(output.outputs[0].text), *parser.finish()]:
        items.push(piece, [])
    items.end(status=status(output))
    return ended_response(request, output, items.items, tokenizer, name=name, created=created)


def new_response(request: ResponsesRequest, *, name: str, created: int) -> dict[str, Any]:
    """The response before anything of it is there."""
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **request.echo,
    }


def ended_response(
    request: ResponsesRequest,
    output: RequestOutput,
    items: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str,
    created: int,
) -> dict[str, Any]:
    """The response at its end, whole or cut short."""
    is_whole = status(output) == "completed"
    return {
        **new_response(request, name=name, created=created),
        "status": status(output),
        "completed_at": int(time.time()) if is_whole else None,
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "output": items,
        "usage": _usage(request, output, items, tokenizer),
    }


def failed_response(
    request: ResponsesRequest, error: PellucidError, items: list[dict[str, Any]], *, name: str, created: int
) -> dict[str, Any]:
    """The response that `error` ended."""
    code = "rate_limit_exceeded" if error.status == 429 else "invalid_prompt" if error.status < 500 else "server_error"
    return {
        **new_response(request, name=name, created=created),
        "status": "failed",
        "error": {"code": code, "message": error.message},
        "output": items,
    }


def status(output: RequestOutput) -> str:
    """Of a response, and of its last item."""
    return "incomplete" if output.outputs[0].finish_reason == "length" else "completed"


def _usage(
    request: ResponsesRequest, output: RequestOutput, items: list[dict[str, Any]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """How many tokens it took. Which tokens are kept in the prefix cache is nobody's request: none count as written."""
    metrics, reasoning_tokens = output.metrics, 0
    if any(item["type"] == "reasoning" for item in items):
        chat = request.generation
        reasoning_tokens = num_reasoning_tokens(output.outputs[0].token_ids, chat.chat, chat.sampling_params, tokenizer)
    return {
        "input_tokens": metrics.prompt_tokens,
        "input_tokens_details": {"cached_tokens": metrics.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": metrics.output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": metrics.prompt_tokens + metrics.output_tokens,
    }
