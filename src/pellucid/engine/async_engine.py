"""A model for asyncio: requests of many tasks share the batch of one engine thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from traceback import format_tb
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, Unpack

from pellucid.core.capture import CaptureParams
from pellucid.core.config import EngineOptions, engine_config
from pellucid.core.errors import EngineClosedError, EngineError, InvalidRequestError, PellucidError
from pellucid.core.outputs import EmbeddingOutput, LabelOutput, RequestOutput
from pellucid.core.pooling_params import Pooling, PoolingParams, labelling
from pellucid.core.processors import usable_processors
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.trace import TraceSink
from pellucid.core.validation import INT32_MAX, check_integer
from pellucid.decoding.grammar import Grammar
from pellucid.decoding.grammar_compiler import COMPILE_SECONDS
from pellucid.engine.async_request import AsyncRequest, AsyncTokenStream, Item
from pellucid.engine.loaded_model import LoadedModel, with_engine_options
from pellucid.engine.output_processor import StepOutput
from pellucid.engine.pooling import embedding_output, label_output
from pellucid.engine.request_intake import Message, Prompt, PromptLike, RequestParams
from pellucid.engine.step_guard import guard_steps, let_forks_pass

if TYPE_CHECKING:
    from pellucid.weights.cache import Progress

NUM_TOKENIZER_THREADS = 2
MIN_AWAITED = 8
"""Streams that are passed on and for which the next step waits. With one or four it loses as much as it gains."""
MAX_AWAITING_SECONDS = 0.003
"""Sixteen take a loop 0.7 ms; one that is busy with something else is not waited for."""

logger = logging.getLogger(__name__)

Command: TypeAlias = Callable[[], None]


class AsyncEngine(LoadedModel):
    """One model, loaded, and a thread that computes while there is something to compute and sleeps otherwise.

    Requests may come from any number of event loops, each in a thread of its own; a request is read in the loop that
    began it. `abort` and `metrics` may be called from any thread. A forked child cannot use its parent's engine.

    Every request that was begun ends in one terminal reply: its last token, its RequestOutput, or an error raised.

    Attributes: those of LoadedModel.
    """

    @with_engine_options
    def __init__(
        self,
        model: str | Path,
        *,
        max_waiting: int | None = None,
        max_queue_seconds: float | None = None,
        max_unread_tokens: int = 64,
        progress: Progress | None = None,
        trace: TraceSink | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Find, fetch where needed, and load a model. That takes a while: `asyncio.to_thread(AsyncEngine, ...)` keeps a
        running loop free for others.

        Args:
            max_waiting: most requests that wait to be scheduled; more are refused. None for no limit.
            max_queue_seconds: longest a request may wait to be first scheduled. None for no limit.
            max_unread_tokens: a streamed request with so many tokens that were not read is paused until half of them
                were: its reader holds up nobody else, and takes no more memory than that.
            The others: as for LLM.

        Raises:
            As LLM.
        """
        check_integer("max_unread_tokens", max_unread_tokens, 1, INT32_MAX)
        config = engine_config(str(model), options, max_waiting=max_waiting, max_queue_seconds=max_queue_seconds)
        super().__init__(config, progress, trace)
        self._max_unread_tokens = max_unread_tokens
        self._computes_everywhere = self.backend.threads >= usable_processors()
        self._request_numbers = itertools.count()
        self._process = os.getpid()

        self._requests_lock = threading.Lock()  # guards the next four; held for moments only
        self._requests: dict[str, AsyncRequest] = {}
        self._num_coming = 0  # requests that the engine does not know yet
        self._refusal: str | None = None  # why no more are taken
        self._drains: list[Future[None]] = []

        # The inbox must be safe to put into from a finalizer, which may run anywhere, in the engine thread too.
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._batches: dict[asyncio.AbstractEventLoop, list[tuple[AsyncRequest, Item]]] = {}
        self._is_stopping = False
        self._ended: Future[None] = Future()
        self._tokenizers = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, "pellucid-tokenizer")
        self._step_lock = threading.RLock()
        guard_steps(self._step_lock)
        threading.Thread(target=self._run, name="pellucid-engine", daemon=True).start()

    # Requests

    def generate(
        self,
        prompt: PromptLike | ListLike[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        capture: CaptureParams | None = None,
    ) -> AsyncTokenStream:
        """Continue a prompt or answer a conversation, token by token.

        Args:
            prompt: text, token ids, or messages with `role` and `content`. It is tokenized in a thread of its own.
            sampling_params: None is SamplingParams().
            request_id: not in use by another unfinished request; None makes one up.
            priority: lower runs first, within -2^31 .. 2^31 - 1.
            cache_salt: prefix-cache entries are shared only between requests of the same salt.
            capture: what it asks to see of the model at work; None for nothing.

        Yields:
            One TokenOutput a token; the last one has `request_output`, the whole answer.

        Raises:
            InvalidRequestError: at once for what is wrong with the parameters; from the stream, before anything is
                queued, for what is wrong with the prompt, the grammar or the request_id. It is of this request alone.
            ContextLengthError: from the stream: the prompt leaves no room for a token.
            QueueFullError: from the stream: too many requests wait or grammars are being compiled, or this one waited
                too long.
            CapacityError: from the stream: what it would capture may take more memory than there is.
            EngineClosedError: from the stream: the engine is draining or was shut down.
            BackendError, EngineError: from the stream: computing failed.
        """
        params = self._checked_params(sampling_params, capture, stream=True)
        request = self._new_request(params, request_id, priority, cache_salt, capture, stream=True)
        return AsyncTokenStream(self, request, prompt)

    async def complete(
        self,
        prompt: PromptLike | ListLike[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        capture: CaptureParams | None = None,
    ) -> RequestOutput:
        """The whole answer at once, without any work for single tokens. Cancelling the call aborts the request.

        Args and Raises: as `generate`.
        """
        params = self._checked_params(sampling_params, capture, stream=False)
        request = self._new_request(params, request_id, priority, cache_salt, capture)
        return await self._reply(request, prompt)

    async def embed(
        self,
        prompt: PromptLike | ListLike[Message],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> EmbeddingOutput:
        """One vector for a prompt: its hidden states after the final norm, pooled. Cancelling the call aborts the
        request.

        Args:
            pooling, normalize: as for PoolingParams.
            The others: as `generate`.

        Returns:
            What `LLM.embed` gives, to the bit.

        Raises:
            ContextLengthError: the prompt does not fit in the context.
            EngineClosedError: the engine is draining or was shut down; or the request was aborted.
            As `generate`.
        """
        request = self._new_request(PoolingParams(pooling, normalize), request_id, priority, cache_salt)
        return embedding_output(await self._reply(request, prompt))

    async def label_logprobs(
        self,
        prompt: PromptLike | ListLike[Message],
        label_token_ids: Iterable[int],
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> LabelOutput:
        """How probable tokens are to come after a prompt, as classifiers and rerankers ask it. Nothing is generated.
        Cancelling the call aborts the request.

        Args:
            label_token_ids: 1 to 128 tokens.
            The others: as `generate`.

        Returns:
            What `LLM.label_logprobs` gives, to the bit.

        Raises:
            As `embed`.
        """
        params = labelling(label_token_ids)
        self._engine.intake.check_pooling(params)
        request = self._new_request(params, request_id, priority, cache_salt)
        return label_output(await self._reply(request, prompt))

    def abort(self, request_id: str) -> None:
        """End a request after this step; its terminal reply has the tokens until then. No effect on one that is unknown
        or has ended. From any thread."""
        request = self._requests.get(request_id)
        if request is not None:
            self._inbox.put(partial(self._abort, request))

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those that were begun have ended.

        Args:
            timeout: seconds; None waits as long as it takes, which a reader that does not read can make for ever.

        Returns:
            Whether they have. Those that have not go on; `shutdown` aborts them.
        """
        self._require_own_process()
        done: Future[None] = Future()
        with self._requests_lock:
            self._refusal = self._refusal or "this engine is draining and takes no more requests"
            if not self._requests:
                return True
            self._drains.append(done)
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), timeout)
        except TimeoutError:
            return False
        return True

    async def shutdown(self) -> None:
        """Abort the requests that are left and free weights, KV cache and threads. Every request has its terminal reply
        then; later ones are refused with EngineClosedError."""
        self._require_own_process()
        with self._requests_lock:
            self._refusal = "this engine was shut down"
        self._inbox.put(self._stop)
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Returns when the engine thread has ended: after `shutdown`, or of a defect that it could not contain."""
        await asyncio.shield(asyncio.wrap_future(self._ended))

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    # In an event loop

    def _checked_params(
        self, sampling_params: SamplingParams | None, capture: CaptureParams | None, *, stream: bool
    ) -> SamplingParams:
        if sampling_params is None:
            sampling_params = SamplingParams()
        self._engine.intake.check_params(sampling_params, capture, stream=stream)
        return sampling_params

    def _new_request(
        self,
        params: RequestParams,
        request_id: str | None,
        priority: int,
        cache_salt: str,
        capture: CaptureParams | None = None,
        *,
        stream: bool = False,
    ) -> AsyncRequest:
        self._engine.intake.check_options(priority, cache_salt)
        if request_id is None:
            request_id = f"request-{next(self._request_numbers)}"
        elif not isinstance(request_id, str):
            raise InvalidRequestError("request_id must be a string", param="request_id")
        return AsyncRequest(request_id, params, priority, cache_salt, capture, stream=stream)

    async def _reply(self, request: AsyncRequest, prompt: PromptLike | ListLike[Message]) -> RequestOutput:
        """The terminal reply of a request that is not streamed; raises its error, if it has one."""
        await self._submit(request, prompt)
        try:
            reply = await request.take()
        except BaseException:
            self._drop(request)
            raise
        if isinstance(reply, PellucidError):
            raise reply
        assert isinstance(reply, RequestOutput)  # only a stream can be dropped while it is read
        if reply.error is not None:
            raise reply.error
        return reply

    async def _submit(self, request: AsyncRequest, prompt: PromptLike | ListLike[Message]) -> None:
        """Tokenize the prompt and hand the request to the engine thread. Raises as `generate` says."""
        request.loop = asyncio.get_running_loop()
        request.arrival_time = self._engine.now()
        prepared = self._register(request, prompt)
        try:
            checked = await asyncio.wrap_future(prepared)
            params = request.params
            if isinstance(params, SamplingParams) and params.structured_outputs is not None:
                checked = replace(checked, grammar=await self._compile(params.structured_outputs))
            with self._requests_lock:
                if self._is_stopping:
                    raise EngineClosedError("this engine was shut down")
                self._inbox.put(partial(self._add, request, checked))
        except BaseException:
            with self._requests_lock:
                if self._requests.get(request.request_id) is request:  # else it was ended with all others
                    self._num_coming -= 1
                    self._unregister(request.request_id)
            raise

    async def _compile(self, structured_outputs: StructuredOutputsParams) -> Grammar:
        """The grammar of a request. Neither the loop nor the tokenizer threads wait for it."""
        grammars = self._engine.intake.grammars
        await asyncio.shield(asyncio.wrap_future(grammars.prepare()))
        compiling = grammars.submit(structured_outputs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(compiling), COMPILE_SECONDS)
        except TimeoutError:
            raise grammars.too_slow(compiling, COMPILE_SECONDS) from None

    def _has_read(self, request: AsyncRequest) -> None:
        """Let a paused request go on, if enough of it was read."""
        if not request.resume_asked and request.num_unread <= self._max_unread_tokens // 2:
            request.resume_asked = True
            self._inbox.put(partial(self._resume, request))

    def _receive(self, batch: list[tuple[AsyncRequest, Item]], received: threading.Event | None) -> None:
        """Give each request what has come for it, and say so."""
        try:
            num_items = Counter(request for request, _ in batch)
            for request, item in batch:
                request.receive(item, is_alone=num_items[request] == 1)
                if request.is_paused:
                    self._has_read(request)  # if it was passed on
        finally:
            if received is not None:
                received.set()

    def _drop(self, request: AsyncRequest) -> None:
        """Abort a request that was submitted and that nobody reads any more. From any thread, and from finalizers."""
        request.is_dropped = True
        self._inbox.put(partial(self._abort, request))

    def _register(self, request: AsyncRequest, prompt: PromptLike | ListLike[Message]) -> Future[Prompt]:
        self._require_own_process()
        with self._requests_lock:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            if request.request_id in self._requests:
                raise InvalidRequestError(f"request_id {request.request_id!r} is in use", param="request_id")
            self._engine.scheduler.check_queue(self._num_coming)
            prepared = self._tokenizers.submit(self._engine.intake.prepare, prompt, request.params)
            self._requests[request.request_id] = request
            self._num_coming += 1
        return prepared

    def _unregister(self, request_id: str) -> AsyncRequest:
        """Under `_requests_lock`: a request has its terminal reply."""
        request = self._requests.pop(request_id)
        if not self._requests:
            drains, self._drains = self._drains, []
            for done in drains:
                with suppress(InvalidStateError):  # whoever waited has left
                    done.set_result(None)
        return request

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineClosedError("this engine runs in the process that was forked; load one here, after the fork")

    # In the engine thread

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
            self._abort_all()
        except BaseException as defect:
            self._fail_all(defect)
        finally:
            with self._step_lock:
                self._loaded.close()
            self._tokenizers.shutdown(wait=False)
            self._ended.set_result(None)

    def _turn(self) -> None:
        """What has come in, and a step; sleeps where neither is there."""
        command = None if self._engine.has_work() else self._inbox.get()
        let_forks_pass()
        with self._step_lock:
            if command is not None:
                command()
            while not self._inbox.empty():
                self._inbox.get()()
            if self._engine.has_work() and not self._is_stopping:
                self._contain(self._engine.step)
        self._flush()

    def _contain(self, call: Callable[[], StepOutput | None]) -> None:
        """Pass on what `call` has to tell. If it raises, every request fails, and the engine goes on."""
        try:
            output = call()
        except Exception as defect:
            # Its message may quote a prompt; those whose requests fail get it.
            where = "".join(format_tb(defect.__traceback__)).rstrip()
            logger.error("the engine failed, and begins anew: %s\n%s", type(defect).__name__, where)
            output = self._engine.reset(defect)
        if output is None:
            return
        unread: list[AsyncRequest] = []
        for token in output.tokens:
            request = self._requests[token.request_id]
            self._send(request, token)
            if request.num_unread >= self._max_unread_tokens and token.request_output is None:
                unread.append(request)
        if output.finished:
            with self._requests_lock:
                for reply in output.finished:
                    request = self._unregister(reply.request_id)
                    if not request.stream:  # else it came with the last token
                        self._send(request, reply)
        for request in unread:
            self._pause(request)

    def _send(self, request: AsyncRequest, item: Item) -> None:
        if request.is_dropped:
            return
        assert request.loop is not None
        request.num_sent += 1
        self._batches.setdefault(request.loop, []).append((request, item))

    def _flush(self) -> None:
        """Wake every loop that something is for, once.

        Where the model computes on every processor, many streams that are passed on are waited for: a loop that takes
        a processor in the midst of a step holds up the other threads of the model too, at every barrier.
        """
        batches, self._batches = self._batches, {}
        for loop, batch in batches.items():
            num_offered = sum(request.offer is not None for request, _ in batch) if self._computes_everywhere else 0
            received = threading.Event() if num_offered >= MIN_AWAITED else None
            try:
                loop.call_soon_threadsafe(self._receive, batch, received)
            except RuntimeError:  # the loop is closed: nobody will read
                for request in {request for request, _ in batch}:
                    self._drop(request)
                continue
            if received is not None:
                received.wait(MAX_AWAITING_SECONDS)

    def _add(self, request: AsyncRequest, prompt: Prompt) -> None:
        with self._requests_lock:
            self._num_coming -= 1
        try:
            self._engine.add_request(
                request.request_id,
                prompt,
                request.params,
                priority=request.priority,
                cache_salt=request.cache_salt,
                stream=request.stream,
                capture=request.capture,
                arrival_time=request.arrival_time,
            )
        except Exception as error:
            with self._requests_lock:
                self._unregister(request.request_id)
            self._send(request, error if isinstance(error, PellucidError) else _engine_error(error))
            return
        request.is_added = True
        if request.is_aborted:
            self._abort(request)

    def _abort(self, request: AsyncRequest) -> None:
        request.is_aborted = True
        if request.is_added and self._requests.get(request.request_id) is request:
            self._contain(partial(self._engine.abort, request.request_id))

    def _pause(self, request: AsyncRequest) -> None:
        if not request.is_paused:
            request.resume_asked = False
            request.is_paused = True  # before what was read is looked at again: the reader does the reverse
            if request.num_unread > self._max_unread_tokens // 2:
                self._contain(partial(self._engine.pause, request.request_id))
            else:
                request.is_paused = False

    def _resume(self, request: AsyncRequest) -> None:
        if request.is_paused:
            request.is_paused = False
            if self._requests.get(request.request_id) is request:
                self._contain(partial(self._engine.resume, request.request_id))

    def _stop(self) -> None:
        with self._requests_lock:  # whoever submits sees it, or is in the inbox before `_abort_all`
            self._is_stopping = True

    def _abort_all(self) -> None:
        with self._step_lock:
            while not self._inbox.empty():
                self._inbox.get()()
            for request in list(self._requests.values()):
                self._abort(request)
        self._flush()
        with self._requests_lock:
            self._forget_all()  # what is left is in tokenization, and refused when that ends

    def _fail_all(self, defect: BaseException) -> None:
        """Not even a reset went well: the engine is at its end, and no request may wait for ever."""
        error = _engine_error(defect)
        with self._requests_lock:
            self._is_stopping = True
            kind = type(defect).__name__  # and not its message, which may quote a prompt
            self._refusal = f"this engine has failed ({kind}) and takes no more requests; it must be loaded anew"
            for request in self._forget_all():
                self._send(request, error)
        self._flush()

    def _forget_all(self) -> list[AsyncRequest]:
        """Under `_requests_lock`: no request is left, not even on its way here."""
        self._num_coming = 0
        return [self._unregister(request_id) for request_id in list(self._requests)]


def _engine_error(defect: BaseException) -> EngineError:
    error = EngineError(f"the engine failed: {defect!r}")
    error.__cause__ = defect
    return error
