"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import time
from secrets import token_hex

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.core.outputs import RequestOutput
from pellucid.server.generation import event_stream, generation_of
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.http.json_body import parse_body
from pellucid.server.http.replies import bytes_response, long_json_bytes
from pellucid.server.openai.requests import ENDPOINTS, GenerationRequest
from pellucid.server.openai.responses import response_body
from pellucid.server.openai.streams import CompletionEvents
from pellucid.server.serving import serving_of
from pellucid.tokenizer.tokenizer import Tokenizer


async def complete(request: Request) -> Response:
    """Answers a body of either endpoint."""
    asked = await parse_body(request, ENDPOINTS[request.url.path])
    serving, name, created = serving_of(request), token_hex(12), int(time.time())
    generation, tokenizer = generation_of(request, asked, name), serving.model.tokenizer
    if asked.stream:
        return event_stream(serving, generation, CompletionEvents(asked, tokenizer, name=name, created=created))
    outputs = await unless_disconnected(request, generation.complete())
    return bytes_response(await serving.run(_answer, asked, outputs, tokenizer, name, created))


def _answer(
    asked: GenerationRequest, outputs: list[RequestOutput], tokenizer: Tokenizer, name: str, created: int
) -> bytes:
    return long_json_bytes(response_body(asked, outputs, tokenizer, name=name, created=created))


ROUTES = [Route(path, complete, methods=["POST"]) for path in ENDPOINTS]
