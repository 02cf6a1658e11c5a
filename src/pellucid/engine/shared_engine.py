"""One engine for several threads: whoever waits for an answer makes the steps, and with them those of all others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from pellucid.core.capture import CaptureParams
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.engine.interrupts import DeferInterrupt
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.output_processor import StepOutput
from pellucid.engine.request_intake import Prompt, RequestParams
from pellucid.engine.step_guard import guard_steps

Inbox: TypeAlias = deque[TokenOutput | RequestOutput]


class SharedEngine:
    """An engine behind a lock, and an inbox for what comes of each request. `add`, `step` and `abort` are called under
    `exclusive`.

    Args:
        free: what `close` does in the end.

    Attributes:
        engine: what is shared. Its intake may be used from any thread; the rest is under `exclusive`.
    """

    def __init__(self, engine: LLMEngine, free: Callable[[], None]) -> None:
        self.engine = engine
        self._free = free
        self._lock = threading.RLock()
        guard_steps(self._lock)
        self._inboxes: dict[str, tuple[Inbox, bool]] = {}  # where replies go, and whether they are streamed
        self._dropped: deque[str] = deque()
        self._num_requests = 0
        self._is_closed = False
        self._is_stepping = False

    @contextmanager
    def exclusive(self, *, closing: bool = False) -> Iterator[None]:
        """The engine to oneself, and no Ctrl-C inside.

        Raises:
            BackendError: it is closed (unless `closing`).
            InvalidRequestError: the caller runs within a step of it.
        """
        with self._lock, DeferInterrupt():
            self._require_no_step()
            if self._is_closed and not closing:
                raise BackendError("this LLM is closed")
            while self._dropped:
                self.abort(self._dropped.popleft())
            yield

    def add(
        self,
        prompt: Prompt,
        params: RequestParams,
        inbox: Inbox,
        *,
        stream: bool = False,
        capture: CaptureParams | None = None,
    ) -> str:
        """Begin a request, whose tokens (with `stream`) or reply come into `inbox`; its id. Raises as
        `LLMEngine.add_request`."""
        request_id = f"request-{self._num_requests}"
        self.engine.add_request(request_id, prompt, params, stream=stream, capture=capture)
        self._num_requests += 1
        self._inboxes[request_id] = (inbox, stream)
        return request_id

    def step(self) -> None:
        """Make a step. If it fails, so does every request, and the engine goes on."""
        self._is_stepping = True
        try:
            output = self.engine.step()
        except Exception as defect:
            output = self.engine.reset(defect)
        finally:
            self._is_stepping = False
        self._deliver(output)

    def step_for(self, inbox: Inbox) -> None:
        """Make a step for whoever waits for `inbox`, unless another thread's has brought something into it. Called
        outside of `exclusive`, as which it raises."""
        with self.exclusive():
            if not inbox:
                self.step()

    def abort(self, request_id: str) -> None:
        """End a request. No effect on one that has ended."""
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver(output)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Abort requests that nobody holds any more, when the engine is next free: for finalizers, which may run
        anywhere, even in the middle of a step."""
        self._dropped.extend(request_ids)

    def close(self) -> None:
        """Abort what runs and free what there is to free."""
        with self._lock:
            self._require_no_step()
            if not self._is_closed:
                self._is_closed = True
                for request_id in list(self._inboxes):
                    self.abort(request_id)
                self._free()

    def _require_no_step(self) -> None:
        if self._is_stepping:  # the lock is this thread's already
            raise InvalidRequestError(
                "a logits processor cannot use the LLM that is calling it: the LLM is within a step",
                param="logits_processors",
            )

    def _deliver(self, output: StepOutput) -> None:
        for token in output.tokens:
            self._inboxes[token.request_id][0].append(token)
        for reply in output.finished:
            inbox, stream = self._inboxes.pop(reply.request_id)
            if not stream:  # else it came with the last token
                inbox.append(reply)
