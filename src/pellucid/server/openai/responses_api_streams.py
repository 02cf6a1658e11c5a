"""The events of a streamed response of the Responses API: what `response_body` says at once, as it comes.

(https://platform.openai.com/docs/api-reference/responses-streaming)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.server.chat.events import ChatEvent
from pellucid.server.http.replies import long_json_bytes
from pellucid.server.http.sse import event
from pellucid.server.openai.logprobs import chat_logprobs
from pellucid.server.openai.responses_api_output import Logprobs, OutputEvents
from pellucid.server.openai.responses_api_requests import ResponsesRequest
from pellucid.server.openai.responses_api_responses import ended_response, failed_response, new_response, status
from pellucid.tokenizer.tokenizer import Tokenizer


class ResponseEvents:
    """Makes events of tokens.

    A piece of text has the log-probabilities of all tokens since the piece before it.

    Args:
        name: unique; the `id`s of the response and of its items are made from it.
        created: seconds since 1970.

    Attributes:
        response: as it ended; None before.
    """

    def __init__(self, request: ResponsesRequest, tokenizer: Tokenizer, *, name: str, created: int) -> None:
        self.response: dict[str, Any] | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._names: dict[str, Any] = {"name": name, "created": created}
        self._parser = request.generation.chat.format.parser(request.generation.chat)
        self._output = OutputEvents(name)
        self._logprobs: Logprobs = []
        self._num_events = 0

    def events(self, tokens: Iterable[tuple[int, TokenOutput]]) -> bytes:
        """The events that `tokens` make, all of the only choice."""
        events = self._begin()
        if self._request.generation.sampling_params.logprobs is None:
            events += self._push(self._parser.push("".join(token.text for _, token in tokens)))
        else:
            for _, token in tokens:
                if token.token_id is not None and token.logprobs is not None:
                    self._logprobs.append(chat_logprobs(token.token_id, token.logprobs, self._tokenizer))
                events += self._push(self._parser.push(token.text))
        return self._written(events)

    def end(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last events, the terminal one among them."""
        (output,) = outputs
        events = self._begin()
        events += self._push(self._parser.finish())
        events += self._output.end(status=status(output), logprobs=self._logprobs)
        self.response = ended_response(self._request, output, self._output.items, self._tokenizer, **self._names)
        events.append({"type": f"response.{status(output)}", "response": self.response})
        return self._written(events)

    def tell(self, error: PellucidError) -> bytes:
        """The last events of a stream that failed."""
        events = self._begin()
        events += self._output.end(status="incomplete")
        self.response = failed_response(self._request, error, self._output.items, **self._names)
        return self._written([*events, {"type": "response.failed", "response": self.response}])

    def _begin(self) -> list[dict[str, Any]]:
        if self._num_events:
            return []
        response = new_response(self._request, **self._names)
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _push(self, pieces: Iterable[ChatEvent]) -> list[dict[str, Any]]:
        events = []
        for piece in pieces:
            events += self._output.push(piece, self._logprobs)
            self._logprobs = []
        return events

    def _written(self, events: Iterable[dict[str, Any]]) -> bytes:
        written = []
        for each in events:
            written.append(event(long_json_bytes({**each, "sequence_number": self._num_events}), each["type"]))
            self._num_events += 1
        return b"".join(written)
