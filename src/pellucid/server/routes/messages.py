"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from secrets import token_hex

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.anthropic.requests import parse_count_tokens, parse_messages
from pellucid.server.anthropic.responses import message_body
from pellucid.server.anthropic.streams import MessageEvents, tell
from pellucid.server.generation import answer_events, generation_of
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.http.json_body import read_json
from pellucid.server.http.replies import MESSAGES_PATH, json_response
from pellucid.server.http.sse import EventStream
from pellucid.server.serving import serving_of


async def create_message(request: Request) -> Response:
    """`POST /v1/messages`. The headers `anthropic-version` and `anthropic-beta` change nothing."""
    serving = serving_of(request)
    body = await read_json(request, serving.settings.max_body_bytes)
    asked = await serving.run(parse_messages, body, serving.model)
    name, tokenizer = token_hex(12), serving.model.tokenizer
    generation = generation_of(request, asked, name)
    if asked.stream:
        events = MessageEvents(asked, tokenizer, name=name)
        heartbeat = serving.settings.heartbeat_seconds
        return EventStream(answer_events(serving, generation, events), tell, heartbeat_seconds=heartbeat)
    (output,) = await unless_disconnected(request, generation.complete())
    return json_response(await serving.run(message_body, asked, output, tokenizer, name=name))


async def count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`."""
    serving = serving_of(request)
    body = await read_json(request, serving.settings.max_body_bytes)
    return json_response({"input_tokens": await serving.run(parse_count_tokens, body, serving.model)})


ROUTES = [
    Route(MESSAGES_PATH, create_message, methods=["POST"]),
    Route(f"{MESSAGES_PATH}/count_tokens", count_tokens, methods=["POST"]),
]
