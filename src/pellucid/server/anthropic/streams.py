"""The events of a streamed message of the Anthropic API: what `message_body` says at once, as it comes.

(https://docs.anthropic.com/en/api/messages-streaming)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.server.anthropic.content import ContentEvents
from pellucid.server.anthropic.errors import error_body
from pellucid.server.anthropic.responses import ending, new_message
from pellucid.server.http.replies import json_bytes
from pellucid.server.http.sse import event
from pellucid.server.openai.requests import GenerationRequest
from pellucid.tokenizer.tokenizer import Tokenizer


class MessageEvents:
    """Makes events of tokens.

    Args:
        name: unique; the message's `id` is made from it.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, *, name: str) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._parser = request.chat.format.parser(request.chat)
        self._name = name
        self._content = ContentEvents()
        self._has_begun = False

    def events(self, tokens: Iterable[tuple[int, TokenOutput]]) -> bytes:
        """The events that `tokens` make, all of the only choice."""
        events = self._begin()
        for piece in self._parser.push("".join(token.text for _, token in tokens)):
            events += self._content.push(piece)
        return _written(events)

    def end(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last events, the terminal one among them."""
        (output,) = outputs
        events = self._begin()
        for piece in self._parser.finish():
            events += self._content.push(piece)
        events += self._content.end()
        delta = ending(self._request, output, self._content, self._tokenizer)
        events.append({"type": "message_delta", "usage": delta.pop("usage"), "delta": delta})
        events.append({"type": "message_stop"})
        return _written(events)

    def tell(self, error: PellucidError) -> bytes:
        """The last event of a stream that failed."""
        return _written([error_body(error)])

    def _begin(self) -> list[dict[str, Any]]:
        if self._has_begun:
            return []
        self._has_begun = True
        start = {"type": "message_start", "message": new_message(self._request, name=self._name)}
        return [start, {"type": "ping"}]


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(event(json_bytes(each), each["type"]) for each in events)
