"""`/v1/embeddings` and `/v1/score`."""

from __future__ import annotations

import time
from secrets import token_hex

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.embedding import embed_all, label_all
from pellucid.server.http.json_body import parse_body
from pellucid.server.http.replies import bytes_response, json_response
from pellucid.server.openai.embeddings import embeddings_body, parse_embeddings
from pellucid.server.openai.score import LabelRequest, label_body, parse_score, similarity_body
from pellucid.server.serving import serving_of


async def embeddings(request: Request) -> Response:
    """A vector for each input."""
    asked = await parse_body(request, parse_embeddings)
    outputs = await embed_all(request, asked.pooled)
    return bytes_response(await serving_of(request).run(embeddings_body, asked, outputs))


async def score(request: Request) -> Response:
    """How alike texts are, or how probable labels are to follow items."""
    serving = serving_of(request)
    asked = await parse_body(request, parse_score)
    if isinstance(asked, LabelRequest):
        return bytes_response(await serving.run(label_body, asked, await label_all(request, asked.pooled)))
    outputs = await embed_all(request, asked.pooled)
    name, created = token_hex(12), int(time.time())
    return json_response(await serving.run(similarity_body, asked, outputs, name=name, created=created))


ROUTES = [
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/score", score, methods=["POST"]),
]
