"""The prompts of one request body, with the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

from starlette.requests import Request

from pellucid.core.errors import EngineClosedError, InvalidRequestError, PellucidError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.engine.async_engine import AsyncEngine
from pellucid.engine.async_request import AsyncTokenStream
from pellucid.server.errors import DeadlineError
from pellucid.server.http.sse import EventBody, EventStream
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.serving import Serving, serving_of


class Generation:
    """Runs a request once, by `complete` or by `stream`. Cancelling either, or closing the stream, aborts it.

    Args:
        request_id: names its prompts in the engine.
        timeout: seconds that it may take from now on; None for as long as it takes.
        cache_salt: goes before that of the request.
        stream_interval: tokens of a continuation that come together, after the first one.

    Attributes:
        outputs: the whole answers, one a prompt, once they are there.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        request: GenerationRequest,
        request_id: str,
        *,
        timeout: float | None = None,
        cache_salt: str = "",
        stream_interval: int = 1,
    ) -> None:
        self.outputs: list[RequestOutput] = []
        self._engine = engine
        self._request = request
        self._timeout = timeout
        self._is_late = False
        self._cache_salt = cache_salt + request.cache_salt
        self._num_wanted = stream_interval * request.sampling_params.n
        self._streams: list[AsyncTokenStream] = []
        self._ids = [f"{request_id}-{place}" if place else request_id for place in range(len(request.prompts))]

    async def complete(self) -> list[RequestOutput]:
        """The whole answers, one a prompt.

        Raises:
            PellucidError: one of the prompts was refused or failed; the others were aborted.
            DeadlineError: the time was up.
        """
        try:
            async with asyncio.timeout(self._timeout):
                self.outputs = await self._complete_all()
        except TimeoutError:
            raise self._late() from None
        except InvalidRequestError as error:
            raise self._request.chat.blamed(error) from None
        return self.outputs

    async def _complete_all(self) -> list[RequestOutput]:
        if len(self._ids) == 1:
            return [await self._complete(0)]
        running = [asyncio.create_task(self._complete(place)) for place in range(len(self._ids))]
        try:
            return await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _complete(self, place: int) -> RequestOutput:
        request = self._request
        output = await self._engine.complete(
            request.prompts[place],
            request.sampling_params,
            request_id=self._ids[place],
            priority=request.priority,
            cache_salt=self._cache_salt,
        )
        self._check_whole(output)
        return output

    async def stream(self) -> AsyncIterator[list[tuple[int, TokenOutput]]]:
        """Tokens as they come, each with the index of its choice: the `n` continuations of the first prompt, then those
        of the next. A list has all that have come since the last one.

        Raises:
            As `complete`.
        """
        request = self._request
        streams = self._streams = [
            self._engine.generate(
                prompt,
                request.sampling_params,
                request_id=self._ids[place],
                priority=request.priority,
                cache_salt=self._cache_salt,
            )
            for place, prompt in enumerate(request.prompts)
        ]
        deadline = None
        if self._timeout is not None:
            deadline = asyncio.get_running_loop().call_later(self._timeout, self._give_up)
        try:
            if len(streams) == 1:
                num_wanted = 1
                while tokens := await streams[0].read(num_wanted):
                    self._check_tokens(tokens)
                    yield [(token.index, token) for token in tokens]
                    num_wanted = self._num_wanted
            else:
                async for place, tokens in _merged(streams, self._num_wanted):
                    self._check_tokens(tokens)
                    first = place * request.sampling_params.n
                    yield [(first + token.index, token) for token in tokens]
        except InvalidRequestError as error:
            raise self._request.chat.blamed(error) from None
        finally:
            if deadline is not None:
                deadline.cancel()
            for stream in streams:
                await stream.aclose()
        self.outputs = [stream.request_output for stream in streams if stream.request_output is not None]

    def pass_on(self, take: Callable[[list[tuple[int, TokenOutput]]], bool]) -> None:
        """Offer what comes while `stream` is waited for to `take` first, as `AsyncTokenStream.pass_on` does. Nothing is
        offered where several tokens are to come together."""
        if len(self._streams) == 1 and self._num_wanted == 1:
            self._streams[0].pass_on(lambda token: take([(token.index, token)]))

    def _give_up(self) -> None:
        self._is_late = True
        for request_id in self._ids:
            self._engine.abort(request_id)

    def _check_tokens(self, tokens: list[TokenOutput]) -> None:
        output = tokens[-1].request_output
        if output is not None:
            self._check_whole(output)

    def _check_whole(self, output: RequestOutput) -> None:
        """An answer that was aborted while somebody waits for it is no answer."""
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            raise self._late() if self._is_late else EngineClosedError("the server is shutting down")

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"the answer took longer than the {self._timeout:g} s that a request may take: ask for fewer tokens "
            "(max_tokens), or try again when less is going on"
        )


class AnswerEvents(Protocol):
    """Makes events of the tokens of a request, as an API has them."""

    def events(self, tokens: Iterable[tuple[int, TokenOutput]]) -> bytes:
        """Those that `tokens` make, each with the index of its choice."""
        ...

    def end(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last ones of the whole answers, the terminal one among them."""
        ...

    def tell(self, error: PellucidError) -> bytes:
        """The last ones where the request failed, the terminal one among them."""
        ...


async def answer_events(serving: Serving, generation: Generation, events: AnswerEvents) -> AsyncGenerator[bytes, None]:
    """The events of a request. Cancelling or closing it aborts the request.

    Raises:
        As `Generation.stream`.
    """
    async for tokens in generation.stream():
        if data := events.events(tokens):
            yield data
    yield await serving.run(events.end, generation.outputs)  # which takes as long as the answers are


def event_stream(serving: Serving, generation: Generation, events: AnswerEvents) -> EventStream:
    """The response that sends the events of a request as they come."""

    def on_open(body: EventBody) -> None:
        def take(tokens: list[tuple[int, TokenOutput]]) -> bool:
            if not body.is_free:
                return False
            if data := events.events(tokens):
                body.send_now(data)
            return True

        generation.pass_on(take)

    heartbeat = serving.settings.heartbeat_seconds
    waited = answer_events(serving, generation, events)
    return EventStream(waited, events.tell, heartbeat_seconds=heartbeat, on_open=on_open)


async def _merged(streams: list[AsyncTokenStream], num_wanted: int) -> AsyncIterator[tuple[int, list[TokenOutput]]]:
    """What comes of each, with its place: the first token, and then `num_wanted` at a time."""
    reading = {asyncio.create_task(stream.read()): place for place, stream in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=reading.__getitem__):
                place = reading.pop(task)
                if tokens := task.result():
                    reading[asyncio.create_task(streams[place].read(num_wanted))] = place
                    yield place, tokens
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def generation_of(request: Request, asked: GenerationRequest, name: str) -> Generation:
    """What runs `asked`, the body of `request`, under the settings of its server. `name` is unique.

    Raises:
        NotReadyError: the model is not loaded.
    """
    serving = serving_of(request)
    salt = request.state.api_key if serving.settings.per_key_cache_salt else ""
    generation = Generation(
        serving.engine,
        asked,
        name,
        timeout=serving.settings.request_timeout,
        cache_salt=salt,
        stream_interval=serving.settings.stream_interval,
    )
    request.state.generation = generation
    return generation
