"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from secrets import token_hex

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.core.outputs import RequestOutput
from pellucid.server.generation import Generation, generation_of
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.http.json_body import read_json
from pellucid.server.http.replies import bytes_response, long_json_bytes
from pellucid.server.http.sse import EventStream
from pellucid.server.openai.requests import ENDPOINTS, GenerationRequest
from pellucid.server.openai.responses import response_body
from pellucid.server.openai.streams import CompletionEvents, tell
from pellucid.server.serving import Serving, serving_of
from pellucid.tokenizer.tokenizer import Tokenizer


async def complete(request: Request) -> Response:
    """Answers a body of either endpoint."""
    serving = serving_of(request)
    body = await read_json(request, serving.settings.max_body_bytes)
    asked = await serving.run(ENDPOINTS[request.url.path], body, serving.model)
    name, created, tokenizer = token_hex(12), int(time.time()), serving.model.tokenizer
    generation = generation_of(request, asked, name)
    if asked.stream:
        events = CompletionEvents(asked, tokenizer, name=name, created=created)
        heartbeat = serving.settings.heartbeat_seconds
        return EventStream(_events(serving, generation, events), tell, heartbeat_seconds=heartbeat)
    outputs = await unless_disconnected(request, generation.complete())
    return bytes_response(await serving.run(_answer, asked, outputs, tokenizer, name, created))


def _answer(
    asked: GenerationRequest, outputs: list[RequestOutput], tokenizer: Tokenizer, name: str, created: int
) -> bytes:
    return long_json_bytes(response_body(asked, outputs, tokenizer, name=name, created=created))


async def _events(serving: Serving, generation: Generation, events: CompletionEvents) -> AsyncGenerator[bytes, None]:
    async for tokens in generation.stream():
        if data := events.events(tokens):
            yield data
    yield await serving.run(events.end, generation.outputs)  # which may count tokens


ROUTES = [Route(path, complete, methods=["POST"]) for path in ENDPOINTS]
