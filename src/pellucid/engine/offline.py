"""Many prompts through one LLM: read ahead as far as keeps the engine busy, and no further."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeAlias

from pellucid.core.capture import CaptureParams
from pellucid.core.closing import Closing
from pellucid.core.errors import CapacityError, InvalidRequestError, PellucidError, QueueFullError
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.progress import GenerateProgress
from pellucid.engine.request_intake import Prompt, RequestParams
from pellucid.engine.shared_engine import Inbox, SharedEngine

Request: TypeAlias = tuple[str | list[int] | Prompt, RequestParams]

IN_FLIGHT = 2
"""Requests given to the engine, in multiples of the sequences that run at once: as many wait as run."""
WINDOW = 8
"""Requests of a GenerateStream that were taken and not yet given back, in the same multiples."""


class OfflineRun(Closing):
    """The terminal replies to requests, as they come; those of the requests ahead of them may come later.

    A request that cannot be served gets a reply with its `error`, as one that fails does. An iterator of (number of the
    request, reply) and a context manager: closing it, or letting go of it, aborts what runs.

    Attributes:
        num_taken: requests taken so far.
        take_below: requests of this number and beyond are not taken yet.
    """

    def __init__(
        self,
        engine: SharedEngine,
        requests: Iterator[Request],
        progress: GenerateProgress,
        capture: CaptureParams | None = None,
    ) -> None:
        self.num_taken = 0
        self.take_below: float = math.inf
        self._engine = engine
        self._requests = requests
        self._progress = progress
        self._capture = capture
        self._inbox = Inbox()
        self._refused: deque[tuple[int, RequestOutput]] = deque()
        self._postponed: tuple[int, Prompt, RequestParams] | None = None
        self._postponed_beside = 0  # how many others there were
        self._numbers: dict[str, int] = {}
        self._max_in_flight = IN_FLIGHT * engine.engine.scheduler.config.max_num_seqs
        self._exhausted = False

    def __iter__(self) -> OfflineRun:
        return self

    def __next__(self) -> tuple[int, RequestOutput]:
        """Raises what the requests' iterator raises, and BackendError once the LLM is closed."""
        while True:
            if self._inbox:
                reply = self._inbox.popleft()
                assert isinstance(reply, RequestOutput)
                self._progress.count(reply)
                return self._numbers.pop(reply.request_id), reply
            self._take()
            if self._refused:
                return self._refused.popleft()
            if not self._numbers:
                raise StopIteration
            self._engine.step_for(self._inbox)
            self._progress.refresh(self)

    @property
    def num_running(self) -> int:
        """Sequences that run, those of other callers included."""
        return len(self._engine.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, those of other callers included."""
        return len(self._engine.engine.scheduler.waiting)

    def tokens_in_flight(self) -> tuple[int, int]:
        """Prompt tokens read and tokens generated of the requests that have not ended."""
        prompt_tokens = output_tokens = 0
        scheduler = self._engine.engine.scheduler
        for sequence in (*scheduler.running, *scheduler.waiting):
            if sequence.group.request_id in self._numbers:
                output_tokens += sequence.num_output_tokens
                if sequence.index == 0:
                    prompt_tokens += min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        return prompt_tokens, output_tokens

    def close(self) -> None:
        """Abort what runs."""
        self._exhausted = True
        with self._engine.exclusive(closing=True):
            for request_id in self._numbers:
                self._engine.abort(request_id)
        self._numbers.clear()
        self._inbox.clear()

    def __del__(self) -> None:
        self._engine.drop(self._numbers)

    def _take(self) -> None:
        """Take requests until the engine has enough of them, or one is refused."""
        if self._postponed is not None and len(self._numbers) < self._postponed_beside:
            self._add(*self._postponed)
        while not (self._exhausted or self._refused or self._postponed or len(self._numbers) >= self._max_in_flight):
            if self.num_taken >= self.take_below:
                return
            try:
                prompt, params = next(self._requests)  # foreign code: not under the engine's lock
            except StopIteration:
                self._exhausted = True
                return
            number = self.num_taken
            self.num_taken += 1
            try:
                intake = self._engine.engine.intake
                if not isinstance(prompt, Prompt):  # else it was checked, and `params` too
                    intake.check_params(params, self._capture)
                    prompt = intake.prepare(prompt, params)
                prepared = intake.with_grammar(prompt, params)
            except (InvalidRequestError, QueueFullError) as error:
                self._refused.append((number, _refused(number, prompt, params, error)))
                return
            self._add(number, prepared, params)

    def _add(self, number: int, prompt: Prompt, params: RequestParams) -> None:
        """Give a request to the engine, or postpone it while others hold the memory that its captures need."""
        self._postponed = None
        try:
            with self._engine.exclusive():
                request_id = self._engine.add(prompt, params, self._inbox, capture=self._capture)
        except CapacityError as error:
            if self._numbers:
                self._postponed = (number, prompt, params)
                self._postponed_beside = len(self._numbers)
            else:
                self._refused.append((number, _refused(number, prompt.text, params, error)))
        except InvalidRequestError as error:  # a capture of tokens that this request does not compute
            self._refused.append((number, _refused(number, prompt.text, params, error)))
        else:
            self._numbers[request_id] = number


class GenerateStream(Closing):
    """What `LLM.generate_iter` gives: one output a prompt, in order. An iterator and a context manager.

    Work is done while an output is waited for. At most WINDOW x `max_num_seqs` prompts are taken ahead of the outputs
    given back, however long the first of them takes. Closing it, or letting go of it, aborts what runs; so does an
    exception that it raises.
    """

    def __init__(
        self,
        engine: SharedEngine,
        requests: Iterator[Request],
        progress: GenerateProgress,
        capture: CaptureParams | None = None,
    ) -> None:
        self._run = OfflineRun(engine, requests, progress, capture)
        self._progress = progress
        self._window = WINDOW * engine.engine.scheduler.config.max_num_seqs
        self._run.take_below = self._window
        self._held: dict[int, RequestOutput] = {}
        self._wanted = 0
        self._started = False

    def __iter__(self) -> GenerateStream:
        return self

    def __next__(self) -> RequestOutput:
        """Raises what the prompts' iterator raises, and BackendError once the LLM is closed."""
        if not self._started:
            self._started = True
            self._progress.__enter__()
        try:
            while self._wanted not in self._held:
                number, reply = next(self._run)
                self._held[number] = reply
                self._progress.advance()
        except BaseException:
            self.close()
            raise
        output = self._held.pop(self._wanted)
        self._wanted += 1
        self._run.take_below = self._wanted + self._window
        return output

    def close(self) -> None:
        """Abort what runs; no output comes any more."""
        self._run.close()
        self._held.clear()
        if self._started:
            self._progress.stop()

    def __del__(self) -> None:
        if self._started:
            self._progress.stop()


def paired(
    prompts: Iterable[str | list[int]], sampling_params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[Request]:
    """Each prompt with its parameters; InvalidRequestError where one of them ends before the other."""
    if isinstance(sampling_params, SamplingParams):
        for prompt in prompts:
            yield prompt, sampling_params
        return
    missing: Any = object()
    for number, (prompt, params) in enumerate(zip_longest(prompts, sampling_params, fillvalue=missing)):
        if prompt is missing or params is missing:
            ended, other = ("prompts", "sampling_params") if prompt is missing else ("sampling_params", "prompts")
            raise InvalidRequestError(
                f"{ended} ended after {number}, and {other} went on: give one for all, or one for each",
                param="sampling_params",
            )
        yield prompt, params


def _refused(number: int, prompt: object, params: object, error: PellucidError) -> RequestOutput:
    n = params.n if isinstance(params, SamplingParams) else 1
    return RequestOutput(
        request_id=f"refused-{number}",
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[],
        outputs=[CompletionOutput(index, "", [], "error") for index in range(n)],
        error=error,
    )
