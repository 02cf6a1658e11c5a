"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid.server.http.json_body import parse_body
from pellucid.server.http.replies import bytes_response
from pellucid.server.openai.tokenization import detokenize, tokenize

_ANSWERS = {"/tokenize": tokenize, "/detokenize": detokenize}


async def answer(request: Request) -> Response:
    """Answers a body of either endpoint, which takes the tokenizer and nothing else."""
    return bytes_response(await parse_body(request, _ANSWERS[request.url.path]))


ROUTES = [Route(path, answer, methods=["POST"]) for path in _ANSWERS]
