"""The calls of the OpenAI API that Pellucid's own commands make, to any server that has it.

(https://platform.openai.com/docs/api-reference)
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pellucid.client.errors import ApiError, ConnectionLostError, ProtocolError
from pellucid.client.event_stream import EventStreamParser, ServerSentEvent
from pellucid.client.http import Headers, HttpClient, HttpResponse, Origin
from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import shown

Endpoint = Literal["chat", "completions"]

PATHS: dict[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}
MAX_BODY_BYTES = 4 * 2**20
MAX_MESSAGE_CHARACTERS = 500


class Usage(NamedTuple):
    """Tokens, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class StreamChunk:
    """What one event of a streamed answer adds. Of several choices, the first.

    Attributes:
        text: of the answer.
        reasoning: text that came before the answer, where the server keeps it apart.
        has_tool_call: whether there is a piece of a tool call.
        finish_reason: where this ends the answer.
        usage: where the server tells it.
    """

    text: str = ""
    reasoning: str = ""
    has_tool_call: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None

    @property
    def has_output(self) -> bool:
        """Whether the model has said something here."""
        return bool(self.text or self.reasoning or self.has_tool_call)


class OpenAIClient:
    """A server with the OpenAI API.

    Args:
        url: the server's; `/v1` is added where it has no path of its own.
        api_key: sent as a bearer token.
        headers: sent with every request; they come before the key's.
        connect_timeout, read_timeout: as `HttpClient` has them.

    Raises:
        InvalidRequestError: `url`, `api_key`, a header or a timeout cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        headers: Headers = (),
        connect_timeout: float = 10.0,
        read_timeout: float = 600.0,
    ) -> None:
        if not Origin(url).path:
            url = f"{url.rstrip('/')}/v1"
        headers = list(headers)
        if api_key is not None and not any(name.lower() == "authorization" for name, _ in headers):
            if not api_key.isascii() or not api_key.isprintable():
                raise InvalidRequestError("the API key has characters that no header may have", param="api_key")
            headers.append(("Authorization", f"Bearer {api_key}"))
        self._http = HttpClient(url, headers=headers, connect_timeout=connect_timeout, read_timeout=read_timeout)

    @property
    def origin(self) -> str:
        """Of the server, such as `http://127.0.0.1:8000`."""
        return str(self._http.origin)

    async def models(self) -> list[str]:
        """The names of the models that the server has.

        Raises:
            ServerError: it gave no such list.
        """
        async with self._http.request("GET", "/models") as response:
            body = await response.read(MAX_BODY_BYTES)
            _check_status(response, body, self.origin)
        try:
            names = [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ProtocolError(f"{self.origin} answered with no list of models to GET /models") from None
        if not names or not all(isinstance(name, str) for name in names):
            raise ProtocolError(f"{self.origin} has no model")
        return names

    @asynccontextmanager
    async def stream(self, endpoint: Endpoint, body: Mapping[str, Any]) -> AsyncIterator[ChunkStream]:
        """Ask for an answer, and give what comes of it, piece by piece, once it begins. Leaving early disconnects.

        Args:
            body: of the request but for `stream`, which is set here.

        Raises:
            ApiError: the server refuses, or fails while it answers.
            ServerError: anything else went wrong, or the stream ends without its terminal event.
        """
        data = json.dumps({**body, "stream": True}).encode()
        headers = (("Content-Type", "application/json"), ("Accept", "text/event-stream"))
        async with self._http.request("POST", PATHS[endpoint], headers=headers, body=data) as response:
            if response.status != 200:
                _check_status(response, await response.read(MAX_BODY_BYTES), self.origin)
            content_type = response.headers.get("content-type", "")
            if not content_type.startswith("text/event-stream"):
                raise ProtocolError(f"{self.origin} answered with {shown(content_type)} instead of an event stream")
            yield ChunkStream(response, self.origin)

    async def aclose(self) -> None:
        """Close the connections that no request uses."""
        await self._http.aclose()


class ChunkStream:
    """The pieces of one answer, as they come."""

    def __init__(self, response: HttpResponse, origin: str) -> None:
        self._response = response
        self._origin = origin
        self._parser = EventStreamParser()
        self._events: deque[ServerSentEvent] = deque()

    def __aiter__(self) -> ChunkStream:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self._events:
            piece = await self._response.read_some()
            if not piece:
                raise ConnectionLostError(f"{self._origin} ended its answer without the event that ends a stream")
            self._events += self._parser.feed(piece)
        data = self._events.popleft().data
        if data == "[DONE]":
            await self._response.read(MAX_BODY_BYTES)  # its end, so that the connection can be used again
            raise StopAsyncIteration
        return read_chunk(data, self._origin)


def read_chunk(data: str, origin: str) -> StreamChunk:
    """What the data of an event says.

    Raises:
        ApiError: that the server failed.
        ProtocolError: nothing that the API has.
    """
    chunk = StreamChunk()
    try:
        event = json.loads(data)
        if "error" in event or event.get("object") == "error":
            raise _api_error(event, 200, f"{origin} failed")
        if event.get("choices"):
            choice = event["choices"][0]
            delta = choice.get("delta")
            if delta is None:
                chunk.text = choice.get("text") or ""
            else:
                chunk.text = delta.get("content") or ""
                chunk.reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
                chunk.has_tool_call = bool(delta.get("tool_calls"))
            chunk.finish_reason = choice.get("finish_reason")
        if event.get("usage"):
            chunk.usage = Usage(int(event["usage"]["prompt_tokens"]), int(event["usage"]["completion_tokens"]))
        if isinstance(chunk.text, str) and isinstance(chunk.reasoning, str):
            return chunk
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    raise ProtocolError(f"{origin} sent an event that is no piece of an answer: {shown(data)}")


def _check_status(response: HttpResponse, body: bytes, origin: str) -> None:
    """Raises ApiError where the status is not 200."""
    if response.status == 200:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = body.decode(errors="replace")
    error = _api_error(content, response.status, f"{origin} answered with status {response.status}")
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdigit():
        error.retry_after = float(retry_after)
    raise error


def _api_error(content: Any, status: int, what_happened: str) -> ApiError:
    """The error that an answer holds: OpenAI's object, what some servers give in its place, or plain text."""
    details = content
    if isinstance(content, dict):
        details = content.get("error") or content.get("detail") or content
    if not isinstance(details, dict):
        details = {"message": details}
    message = details.get("message") or ""
    message = " ".join((message if isinstance(message, str) else json.dumps(message)).split())
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + "..."

    def text(name: str) -> str | None:
        value = details.get(name)
        return value if isinstance(value, str) else None

    return ApiError(
        f"{what_happened}: {message}" if message else what_happened,
        http_status=status,
        param=text("param"),
        error_code=text("code"),
        error_type=text("type"),
    )
