"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from secrets import token_hex

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.anthropic.requests import parse_count_tokens, parse_messages
from pellucid.server.anthropic.responses import message_body
from pellucid.server.anthropic.streams import MessageEvents
from pellucid.server.generation import event_stream, generation_of
from pellucid.server.http.disconnect import unless_disconnected
from pellucid.server.http.json_body import parse_body
from pellucid.server.http.replies import MESSAGES_PATH, json_response
from pellucid.server.serving import serving_of


async def create_message(request: Request) -> Response:
    """`POST /v1/messages`. The headers `anthropic-version` and `anthropic-beta` change nothing."""
    asked = await parse_body(request, parse_messages)
    serving, name = serving_of(request), token_hex(12)
    generation, tokenizer = generation_of(request, asked, name), serving.model.tokenizer
    if asked.stream:
        return event_stream(serving, generation, MessageEvents(asked, tokenizer, name=name))
    (output,) = await unless_disconnected(request, generation.complete())
    return json_response(await serving.run(message_body, asked, output, tokenizer, name=name))


async def count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`."""
    return json_response({"input_tokens": await parse_body(request, parse_count_tokens)})


ROUTES = [
    Route(MESSAGES_PATH, create_message, methods=["POST"]),
    Route(f"{MESSAGES_PATH}/count_tokens", count_tokens, methods=["POST"]),
]
