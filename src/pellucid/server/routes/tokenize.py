"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.http.json_body import read_json
from pellucid.server.http.replies import bytes_response
from pellucid.server.openai.tokenization import detokenize, tokenize
from pellucid.server.serving import serving_of

_ANSWERS = {"/tokenize": tokenize, "/detokenize": detokenize}


async def answer(request: Request) -> Response:
    """Answers a body of either endpoint, which takes the tokenizer and nothing else."""
    serving = serving_of(request)
    body = await read_json(request, serving.settings.max_body_bytes)
    return bytes_response(await serving.run(_ANSWERS[request.url.path], body, serving.model))


ROUTES = [Route(path, answer, methods=["POST"]) for path in _ANSWERS]
