"""`/v1/responses`, as far as it needs no memory of what was said before."""

from __future__ import annotations

import time
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.generation import Generation, answer_events, event_stream, generation_of
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.http.json_body import parse_body
from pellucid.server.http.replies import bytes_response, long_json_bytes
from pellucid.server.openai.responses_api_requests import parse_response
from pellucid.server.openai.responses_api_responses import response_body
from pellucid.server.openai.responses_api_streams import ResponseEvents
from pellucid.server.serving import Serving, serving_of


async def create_response(request: Request) -> Response:
    """`POST /v1/responses`."""
    asked = await parse_body(request, parse_response)
    serving, name, created = serving_of(request), token_hex(12), int(time.time())
    generation, tokenizer = generation_of(request, asked.generation, name), serving.model.tokenizer
    events = ResponseEvents(asked, tokenizer, name=name, created=created)
    if asked.generation.stream:
        return event_stream(serving, generation, events)
    if asked.generation.sampling_params.logprobs is not None:
        body = await unless_disconnected(request, _collected(serving, generation, events))
    else:
        (output,) = await unless_disconnected(request, generation.complete())
        body = await serving.run(response_body, asked, output, tokenizer, name=name, created=created)
    return bytes_response(await serving.run(long_json_bytes, body))


async def _collected(serving: Serving, generation: Generation, events: ResponseEvents) -> dict[str, Any]:
    """The response that the events of a stream end with."""
    async for _ in answer_events(serving, generation, events):
        pass
    assert events.response is not None
    return events.response


ROUTES = [Route("/v1/responses", create_response, methods=["POST"])]
