"""The engine: requests in, steps, replies out. One thread at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter

from pellucid.backends.base import Backend
from pellucid.core.capture import CaptureParams
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.errors import CapacityError, EngineError, InvalidRequestError, QueueFullError
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.core.metrics import EngineCounters, EngineMetrics, StepTimes
from pellucid.core.outputs import RequestOutput
from pellucid.core.pooling_params import PoolingParams
from pellucid.core.processors import usable_processors
from pellucid.core.sequence import SequenceGroup
from pellucid.core.trace import RequestAdded, RequestFinished, SequencePreempted, StepDone, TraceSink
from pellucid.engine.capture import CaptureBook
from pellucid.engine.constraints import ConstraintBook
from pellucid.engine.custom_processors import ProcessorBook
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.lone_sequences import LoneSequences
from pellucid.engine.model_runner import ModelRunner
from pellucid.engine.output_processor import OutputProcessor, StepOutput
from pellucid.engine.pooling import PoolingBook
from pellucid.engine.request_intake import Prompt, RequestIntake, RequestParams
from pellucid.engine.scheduler import MAX_DRAFT_TOKENS_OF_STEP, Plan, Scheduler
from pellucid.engine.search.book import SearchBook
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.speculation import Speculation
from pellucid.engine.step_runner import StepRunner
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.models.kv_groups import kv_windows
from pellucid.tokenizer.tokenizer import Tokenizer


class LLMEngine:
    """Continuous batching over one backend.

    Attributes:
        scheduler: who runs and who waits.
        max_model_len: most tokens of a prompt and its continuation together.
        trace: who is told of every step; None for nobody.
        intake: checks what requests ask for; from any thread.
        alone: computes sequences that are in no queue, between two steps.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
        capture_memory: int | None = None,
        speculative: SpeculativeConfig | None = None,
        drafter: Drafter | None = None,
        trace: TraceSink | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """
        Args:
            backend: loaded, with `num_blocks` KV blocks allocated.
            seed: from which requests without a seed draw theirs; None takes the operating system's entropy.
            capture_memory: bytes that the captures of all unfinished requests may take; None takes half of the memory
                that is free when one comes.
            speculative: how to guess ahead; None does not.
            drafter: who guesses, as `speculative` says; whoever made it closes it.
            clock: seconds, monotonic.

        Raises:
            CapacityError: `num_blocks` does not hold one sequence of `max_model_len` tokens.
        """
        windows = kv_windows(backend.spec)
        needed = max_blocks_of_sequence(windows, max_model_len, config.max_num_batched_tokens)
        if num_blocks < needed:
            raise CapacityError(
                f"a sequence of {max_model_len} tokens takes up to {needed} KV blocks, but there are {num_blocks}",
                param="max_model_len",
            )
        self.max_model_len = max_model_len
        self.trace = trace
        self._num_blocks = num_blocks
        self._enable_prefix_caching = enable_prefix_caching
        self._windows = windows
        self._config = config
        self._backend = backend
        self._tokenizer = tokenizer
        self._clock = clock
        self.intake = RequestIntake(backend.spec, tokenizer, config, max_model_len=max_model_len, seed=seed)
        self._capture_memory = capture_memory
        self._speculative = speculative
        self._drafter = drafter
        self._counters = EngineCounters()
        self._times = StepTimes()
        self._num_added = 0
        self._begin()

    def _begin(self) -> None:
        """Everything that changes from step to step, anew; its parts know each other's state and are made together."""
        config = self._config
        cache = CacheManager(self._num_blocks, windows=self._windows, enable_prefix_caching=self._enable_prefix_caching)
        self.scheduler = Scheduler(config, cache)
        self._captures = CaptureBook(self._backend.spec, self._capture_memory)
        self._layer_contrast = LayerContrast(self._backend)
        hidden_states = HiddenStates(self._backend.spec)
        self._searches = SearchBook(self.scheduler, hidden_states)
        self._pooling = PoolingBook(hidden_states, self._backend)
        self._constraints = ConstraintBook(
            self._tokenizer, self._backend.spec.vocab_size, num_mask_threads=usable_processors() - self._backend.threads
        )
        self._processors = ProcessorBook()
        self._output_processor = OutputProcessor(
            self._tokenizer, self.scheduler, self._captures, self._searches, self._pooling
        )
        model_runner = ModelRunner(
            self._backend,
            InputBuilder(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                num_groups=len(self._windows),
                max_draft_tokens=0 if self._drafter is None else MAX_DRAFT_TOKENS_OF_STEP,
            ),
            self._captures,
            self._layer_contrast,
            self._constraints,
            self._processors,
            self._searches.guidance,
            hidden_states,
            self._times,
            self._clock,
        )
        self._speculation: Speculation | None = None
        if self._drafter is not None and self._speculative is not None:
            self._speculation = Speculation(self._drafter, self._speculative, self._times, self._clock)
        self._step_runner = StepRunner(
            model_runner,
            self.scheduler,
            self._searches,
            self._output_processor,
            self._speculation,
            self._counters,
            self.trace,
            self._clock,
        )
        self.alone = LoneSequences(self._backend, self.scheduler, config, self.max_model_len, self._clock)
        self._groups: dict[str, SequenceGroup] = {}
        self._output = StepOutput()

    # Requests

    def now(self) -> float:
        """Seconds on the engine's clock; from any thread."""
        return self._clock()

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int] | Prompt,
        params: RequestParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        stream: bool = False,
        capture: CaptureParams | None = None,
        arrival_time: float | None = None,
    ) -> None:
        """Queue a request; `step` gives its replies.

        Args:
            request_id: not in use by another unfinished request.
            prompt: text, token ids, or what `prepare` made of them.
            params: how to continue the prompt; or, with PoolingParams, how to pool it and generate nothing. Such a
                reply is never streamed, captures nothing and has what was asked for as `pooled`.
            priority: lower runs first, within -2^31 .. 2^31 - 1.
            cache_salt: prefix-cache entries are shared only between requests of the same salt.
            stream: report each token as it comes.
            capture: what it asks to see of the model at work; the reply has it as `captured`. Tokens of which something
                is wanted are computed even where the prefix cache knows them.
            arrival_time: as `now` gave it; None is this moment.

        Raises:
            InvalidRequestError: something about it cannot be served; `param` names it. Nothing was queued.
            ContextLengthError: the prompt leaves no room for a token.
            QueueFullError: too many requests wait already, or too many grammars are being compiled.
            CapacityError: what it would capture may take more memory than there is.
        """
        if request_id in self._groups:
            raise InvalidRequestError(f"request_id {request_id!r} is in use", param="request_id")
        intake = self.intake
        if isinstance(params, PoolingParams):
            if stream or capture is not None:
                raise InvalidRequestError(
                    "a prompt that is pooled gives no stream and captures nothing",
                    param="stream" if stream else "capture",
                )
            intake.check_pooling(params)
        else:
            intake.check_params(params, capture, stream=stream)
        intake.check_options(priority, cache_salt)
        if not isinstance(prompt, Prompt):
            prompt = intake.prepare(prompt, params)
        prompt = intake.with_grammar(prompt, params)
        group, search = intake.make_group(
            request_id,
            prompt,
            params,
            priority=priority,
            cache_salt=cache_salt,
            stream=stream,
            arrival_number=self._num_added,
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            cache=self.scheduler.cache,
        )
        with ExitStack() as unless_queued:
            self._constraints.open(group, prompt.grammar)
            unless_queued.callback(self._constraints.close, group)
            if capture is not None:
                self._captures.open(group, capture)
                unless_queued.callback(self._captures.close, group)
                group.is_drafted = False  # what would be captured of guesses is nobody's
            self._processors.open(group)
            unless_queued.callback(self._processors.close, group)
            self._queue(group)
            unless_queued.pop_all()
        self._num_added += 1
        self._groups[request_id] = group
        if search is not None:
            self._searches.open(group, search)
        if group.sampling_params.dola_layers is not None:
            self._layer_contrast.open(group)
        if group.pooling_params is not None:
            self._pooling.open(group)
        if self.trace is not None:
            self.trace.emit(RequestAdded(request_id, len(prompt.token_ids), group.arrival_time))

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request now; its terminal reply, or None if there is no such unfinished request."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        output = self._output
        self._output_processor.finish_early(group, self.scheduler.finish_group(group, "abort"), output)
        self._close(output)
        return self._take_output()

    def pause(self, request_id: str) -> None:
        """Compute nothing more of a request until `resume`; others take its place. No effect on an unknown one."""
        group = self._groups.get(request_id)
        if group is not None:
            self.scheduler.pause(group)

    def resume(self, request_id: str) -> None:
        """Go on with a paused request. No effect on an unknown one, or one that is not paused."""
        group = self._groups.get(request_id)
        if group is not None:
            self.scheduler.resume(group)

    def reset(self, defect: Exception) -> StepOutput:
        """After `step` or `abort` raised `defect`: begin anew with an empty KV cache.

        Returns:
            What they had to tell until then, and the terminal reply of every unfinished request, failed with an
            EngineError.
        """
        error = EngineError(f"the engine failed, and with it every request it had: {defect!r}; they can be sent again")
        error.__cause__ = defect
        output = self._output
        replied = {reply.request_id for reply in output.finished}
        for group in self._groups.values():
            if group.request_id not in replied:
                self._output_processor.fail(group, error, output)
        for reply in output.finished:
            if reply.request_id in self._groups:
                self._forget(reply)
        self._begin()
        return output

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def has_work(self) -> bool:
        """Whether a step would compute something: not while all requests are paused."""
        return self.scheduler.has_work()

    def metrics(self) -> EngineMetrics:
        """The engine now; from any thread."""
        scheduler, pool = self.scheduler, self.scheduler.cache.pool
        return EngineMetrics(
            counters=replace(self._counters),
            step_times=replace(self._times),
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting),
            paused_sequences=len(scheduler.paused),
            max_num_seqs=self._config.max_num_seqs,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            used_blocks=pool.num_used,
        )

    # Steps

    def step(self) -> StepOutput:
        """Compute one batch; tell of every token chosen for a streamed request and of every request that ended.

        Never raises for what a request or the backend did: that is in the replies.
        """
        times = self._times
        before = None if self.trace is None else (replace(times), replace(self._counters))
        start = self._clock()
        plan = self.scheduler.schedule(start)
        times.schedule += self._clock() - start
        if self._speculation is not None:
            self._speculation.propose(plan, self.scheduler)
        output = self._output
        self._refuse_expired(plan, output)
        self._step_runner.run(plan, output)
        self._close(output)
        self._count(plan, output)
        times.total += self._clock() - start
        if self.trace is not None and before is not None:
            self._tell(self.trace, plan, *before)
        return self._take_output()

    def _queue(self, group: SequenceGroup) -> None:
        self._counters.requests_received += 1
        try:
            self.scheduler.add(group)
        except QueueFullError:
            self._counters.requests_refused += 1
            raise

    def _refuse_expired(self, plan: Plan, output: StepOutput) -> None:
        for group in dict.fromkeys(sequence.group for sequence in plan.expired):
            ended = [sequence for sequence in plan.expired if sequence.group is group]
            self._output_processor.finish_early(group, ended, output)

    def _close(self, output: StepOutput) -> None:
        """Forget the requests that ended; with the last one, every block must have come back."""
        for reply in output.finished:
            self._forget(reply)
        if output.finished and not self._groups:
            self.scheduler.check_idle()

    def _forget(self, reply: RequestOutput) -> None:
        group = self._groups.pop(reply.request_id)
        self._layer_contrast.close(group)
        self._constraints.close(group)
        self._processors.close(group)
        self._pooling.close(group)
        if self._speculation is not None:
            self._speculation.forget(group)
        self._count_reply(reply)
        if self.trace is not None:
            reasons = tuple(completion.finish_reason for completion in reply.outputs)
            self.trace.emit(RequestFinished(reply.request_id, reasons, reply.metrics))

    def _take_output(self) -> StepOutput:
        output, self._output = self._output, StepOutput()
        return output

    def _count(self, plan: Plan, output: StepOutput) -> None:
        counters = self._counters
        if plan.sequences:
            counters.steps += 1
            counters.scheduled_sequences += len(plan.sequences)
        counters.preemptions += len(plan.preempted)
        counters.continuations += output.num_begun
        for sequence in plan.admitted:
            counters.prompt_tokens += sequence.num_prompt_tokens
            counters.cached_tokens += sequence.group.num_cached_tokens

    def _count_reply(self, reply: RequestOutput) -> None:
        counters = self._counters
        if isinstance(reply.error, QueueFullError):
            counters.requests_refused += 1
        elif reply.error is not None:
            counters.requests_failed += 1
        elif any(completion.finish_reason == "abort" for completion in reply.outputs):
            counters.requests_aborted += 1
        else:
            counters.requests_finished += 1

    def _tell(self, trace: TraceSink, plan: Plan, times: StepTimes, counters: EngineCounters) -> None:
        """Tell of a step before which times and counters were these."""
        for sequence in plan.preempted:
            trace.emit(SequencePreempted(sequence.group.request_id, sequence.index, sequence.num_tokens))
        pool = self.scheduler.cache.pool
        trace.emit(
            StepDone(
                num_scheduled_tokens=plan.num_tokens,
                num_sequences=len(plan.sequences),
                num_sampled_tokens=len(plan.samples) + self._counters.accepted_tokens - counters.accepted_tokens,
                num_draft_tokens=self._counters.draft_tokens - counters.draft_tokens,
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                free_blocks=pool.num_free,
                cached_blocks=pool.num_cached,
                used_blocks=pool.num_used,
                times=self._times - times,
            )
        )
