"""The engine: requests in, steps, replies out. One thread at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, SampledTokens
from pellucid.core.capture import CaptureParams
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.errors import (
    BackendError,
    CapacityError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    PellucidError,
    QueueFullError,
)
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.core.metrics import EngineCounters, EngineMetrics, StepTimes
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence, SequenceGroup
from pellucid.core.trace import RequestAdded, RequestFinished, SequencePreempted, StepDone, TraceSink
from pellucid.core.validation import check_integer, shown
from pellucid.decoding.grammar import Grammar
from pellucid.decoding.grammar_compiler import GrammarCompiler
from pellucid.engine.capture import CaptureBook
from pellucid.engine.constraints import ConstraintBook
from pellucid.engine.custom_processors import ProcessorBook
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.layer_contrast import LayerContrast
from pellucid.engine.model_runner import ModelRunner, StepResult
from pellucid.engine.output_processor import OutputProcessor, StepOutput
from pellucid.engine.scheduler import MAX_DRAFT_TOKENS_OF_STEP, Plan, Scheduler
from pellucid.engine.search.base import SampledRow
from pellucid.engine.search.book import SearchBook
from pellucid.engine.search.opening import begin_search, check_search, search_of
from pellucid.engine.sequence_breakers import SequenceBreakers
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.speculation import Speculation, accepted_rows
from pellucid.engine.speculative.verdicts import DraftOdds
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.models.kv_groups import kv_windows
from pellucid.tokenizer.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]
PromptLike: TypeAlias = str | list[int]

MAX_SALT_CHARACTERS = 1024
LOGITS_CHUNK = 128
"""Most tokens that a step of `LLMEngine.logits` computes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was checked.

    Attributes:
        text: None where token ids were given.
        negative_token_ids: those of the negative prompt; None where there is none.
        grammar: what its answer follows; None for anything, or if it is yet to be compiled.
    """

    text: str | None
    token_ids: list[int]
    negative_token_ids: list[int] | None = None
    grammar: Grammar | None = None


class LLMEngine:
    """Continuous batching over one backend.

    Attributes:
        scheduler: who runs and who waits.
        max_model_len: most tokens of a prompt and its continuation together.
        trace: who is told of every step; None for nobody.
        grammars: compiles what answers are to follow.
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
        self._seed = seed
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self.grammars = GrammarCompiler(tokenizer)
        self._capture_memory = capture_memory
        self._speculative = speculative
        self._drafter = drafter
        self._counters = EngineCounters()
        self._times = StepTimes()
        self._num_added = 0
        self._breakers = SequenceBreakers(tokenizer, backend.spec.vocab_size)
        self._begin()

    def _begin(self) -> None:
        """Everything that changes from step to step, anew; its parts know each other's state and are made together."""
        config = self._config
        cache = CacheManager(self._num_blocks, windows=self._windows, enable_prefix_caching=self._enable_prefix_caching)
        self.scheduler = Scheduler(config, cache)
        self._captures = CaptureBook(self._backend.spec, self._capture_memory)
        self._layer_contrast = LayerContrast(self._backend)
        self._searches = SearchBook(self.scheduler, self._backend.spec)
        self._constraints = ConstraintBook(self._tokenizer, self._backend.spec.vocab_size)
        self._processors = ProcessorBook()
        self._output_processor = OutputProcessor(self._tokenizer, self.scheduler, self._captures, self._searches)
        self._model_runner = ModelRunner(
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
            self._searches.hidden_states,
            self._times,
            self._clock,
        )
        self._speculation: Speculation | None = None
        if self._drafter is not None and self._speculative is not None:
            self._speculation = Speculation(self._drafter, self._speculative, self._times, self._clock)
        self._groups: dict[str, SequenceGroup] = {}
        self._output = StepOutput()

    # Requests

    def prepare(
        self, prompt: PromptLike | ListLike[Message], negative_prompt: str | Iterable[int] | None = None
    ) -> Prompt:
        """Turn a prompt (text, token ids, or messages with `role` and `content`) into token ids and check them, and a
        negative prompt (text or token ids) if there is one; from any thread.

        Raises:
            InvalidRequestError: it is empty, of the wrong type, or has a token id out of the vocabulary; the model has
                no chat template, or it refuses the messages.
            ContextLengthError: it leaves no room for a token.
        """
        if negative_prompt is not None:
            return replace(self.prepare(prompt), negative_token_ids=self._negative_token_ids(negative_prompt))
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty: give at least one character", param="prompt")
            checked = Prompt(prompt, self._tokenizer.encode(prompt))
        elif is_conversation(prompt):
            checked = Prompt(None, self._tokenizer.apply_chat_template(prompt))
        else:
            checked = Prompt(None, _checked_token_ids(prompt, self._backend.spec.vocab_size))
        num_tokens = len(checked.token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
        if num_tokens >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens and needs room for one more, "
                f"but the context holds {self.max_model_len} tokens (max_model_len)",
                param="prompt",
            )
        return checked

    def _negative_token_ids(self, negative_prompt: str | Iterable[int]) -> list[int]:
        text_or_ids = negative_prompt if isinstance(negative_prompt, str) else list(negative_prompt)
        try:
            return self.prepare(text_or_ids).token_ids
        except InvalidRequestError as error:
            raise type(error)(f"negative_prompt: {error.message}", param="negative_prompt") from None

    def with_grammar(self, prompt: Prompt, sampling_params: SamplingParams) -> Prompt:
        """`prompt` with the grammar that its answer follows, if `sampling_params` ask for one; waits while it is
        compiled. From any thread.

        Raises:
            InvalidRequestError: it is malformed, cannot be fulfilled or is too large.
            QueueFullError: too many grammars are being compiled.
        """
        if sampling_params.structured_outputs is None or prompt.grammar is not None:
            return prompt
        return replace(prompt, grammar=self.grammars.compile(sampling_params.structured_outputs))

    def check_params(
        self, sampling_params: SamplingParams, capture: CaptureParams | None = None, *, stream: bool = False
    ) -> None:
        """Check what only the engine and the model can tell of a request's parameters.

        Raises:
            InvalidRequestError: more continuations or beams than run at once, a token id out of the vocabulary, a
                capture of layers or heads that the model does not have, or one of several continuations; or a stream of
                which only the end tells what is to be returned.
        """
        if not isinstance(sampling_params, SamplingParams):
            raise InvalidRequestError("sampling_params must be a SamplingParams", param="sampling_params")
        if sampling_params.num_sequences > self._config.max_num_seqs:
            name = "n" if sampling_params.best_of is None else "best_of"
            raise InvalidRequestError(
                f"{name} is {sampling_params.num_sequences}, but at most {self._config.max_num_seqs} sequences run "
                "(max_num_seqs)",
                param=name,
            )
        if stream and sampling_params.num_sequences > sampling_params.n:
            raise InvalidRequestError(
                f"best_of is {sampling_params.best_of}, and only when all have ended is it known which "
                f"{sampling_params.n} to return: ask for the whole answer, not for a stream",
                param="best_of",
            )
        check_search(sampling_params, self._config.max_num_seqs, is_captured=capture is not None)
        vocab_size = self._backend.spec.vocab_size
        for name, token_ids in (
            ("stop_token_ids", sampling_params.stop_token_ids),
            ("allowed_token_ids", sampling_params.allowed_token_ids),
            ("banned_token_ids", sampling_params.banned_token_ids),
            ("logit_bias", dict(sampling_params.logit_bias or ())),
        ):
            if token_ids and (largest := max(token_ids)) >= vocab_size:
                raise InvalidRequestError(
                    f"{name} has {largest}, but the vocabulary has ids 0 to {vocab_size - 1}", param=name
                )
        if sampling_params.dola_layers is not None:
            self._layer_contrast.layers(sampling_params)
        if capture is not None:
            self._captures.check(capture, sampling_params)

    def now(self) -> float:
        """Seconds on the engine's clock; from any thread."""
        return self._clock()

    def check_options(self, priority: int, cache_salt: str) -> None:
        """Check what else a request may come with.

        Raises:
            InvalidRequestError: `priority` or `cache_salt` is of the wrong type or out of range.
        """
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        if not isinstance(cache_salt, str) or len(cache_salt) > MAX_SALT_CHARACTERS:
            raise InvalidRequestError(
                f"cache_salt must be a string of up to {MAX_SALT_CHARACTERS} characters", param="cache_salt"
            )

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int] | Prompt,
        sampling_params: SamplingParams,
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
        self.check_params(sampling_params, capture, stream=stream)
        self.check_options(priority, cache_salt)
        if not isinstance(prompt, Prompt):
            prompt = self.prepare(prompt, sampling_params.negative_prompt)
        prompt = self.with_grammar(prompt, sampling_params)
        if prompt.negative_token_ids is None and sampling_params.negative_prompt is not None:
            prompt = replace(prompt, negative_token_ids=self._negative_token_ids(sampling_params.negative_prompt))
        search = search_of(
            sampling_params,
            self._backend.spec,
            self._tokenizer,
            max_tokens=self.max_model_len - len(prompt.token_ids),
            eos_token_ids=self._eos_token_ids,
        )
        group = SequenceGroup(
            request_id,
            prompt.token_ids,
            sampling_params,
            max_model_len=self.max_model_len,
            seed=self._request_seed(sampling_params),
            arrival_number=self._num_added,
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            eos_token_ids=self._eos_token_ids,
            prompt=prompt.text,
            priority=int(priority),
            cache_salt=cache_salt.encode("utf-8", "surrogatepass"),
            stream=stream,
            num_lockstep=None if search is None else search.num_sequences,
        )
        if sampling_params.dry_multiplier:
            group.dry_breakers = self._breakers.token_ids(sampling_params.dry_sequence_breakers)  # type: ignore[arg-type]
        if search is not None:
            cache, max_model_len = self.scheduler.cache, self.max_model_len
            begin_search(group, search, prompt.negative_token_ids, cache, self._config, max_model_len=max_model_len)
        self._constraints.open(group, prompt.grammar)
        try:
            if capture is not None:
                self._captures.open(group, capture)
                group.is_drafted = False  # what would be captured of guesses is nobody's
        except PellucidError:
            self._constraints.close(group)
            raise
        self._processors.open(group)
        self._counters.requests_received += 1
        try:
            self.scheduler.add(group)
        except QueueFullError:
            self._counters.requests_refused += 1
            self._captures.close(group)
            self._constraints.close(group)
            self._processors.close(group)
            raise
        self._num_added += 1
        self._groups[request_id] = group
        if search is not None:
            self._searches.open(group, search)
        if sampling_params.dola_layers is not None:
            self._layer_contrast.open(group)
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
        self._compute(plan, output)
        self._close(output)
        self._count(plan, output)
        times.total += self._clock() - start
        if self.trace is not None and before is not None:
            self._tell(self.trace, plan, *before)
        return self._take_output()

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """What the model expects after each token: float32 [len(token_ids), vocab_size].

        Computed in chunks, without the prefix cache; running sequences give way where their blocks are needed.

        Raises:
            InvalidRequestError: no token, or a token id out of the vocabulary.
            ContextLengthError: more tokens than the context holds.
            CapacityError: the result does not fit in memory.
            BackendError: the backend failed, or gave logits that are not finite.
        """
        token_ids = _checked_token_ids(token_ids, self._backend.spec.vocab_size)
        num_tokens = len(token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("token_ids is empty: give at least one", param="token_ids")
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"there are {num_tokens} tokens, but the context holds {self.max_model_len} (max_model_len)",
                param="token_ids",
            )
        shape = (num_tokens, self._backend.spec.vocab_size)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            raise CapacityError(
                f"logits {shape} in float32 take {4 * shape[0] * shape[1]:,} bytes, more than there are"
            ) from None
        sequence = self.sequence_alone(token_ids)
        try:
            for piece in self.compute_alone(sequence, num_tokens, with_logits=True):
                end = sequence.num_computed_tokens
                logits[end - len(piece) : end] = piece
        finally:
            self.scheduler.cache.free(sequence)
        return logits

    def sequence_alone(self, token_ids: list[int], *, cache_salt: bytes = b"") -> Sequence:
        """A sequence that is in no queue, for `compute_alone`. The caller frees its blocks before the next step."""
        group = SequenceGroup(
            "alone",
            token_ids,
            SamplingParams(),
            max_model_len=self.max_model_len,
            seed=0,
            arrival_number=self._num_added,
            arrival_time=self._clock(),
            cache_salt=cache_salt,
        )
        return group.sequences[0]

    def compute_alone(
        self, sequence: Sequence, end: int, *, with_logits: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """Compute a sequence that is in no queue up to its first `end` tokens, between two steps, piece by piece;
        running sequences give way where their blocks are needed.

        Yields:
            Logits of each piece's tokens, float32 [n, vocab_size], valid until the next; n is 0 unless `with_logits`.

        Raises:
            CapacityError: there are not enough KV blocks.
            BackendError: the backend failed, or gave logits that are not finite.
        """
        longest = self._config.max_num_batched_tokens
        if with_logits:
            longest = min(longest, LOGITS_CHUNK)
        while (begin := sequence.num_computed_tokens) < end:
            piece_end = min(end, begin + longest)
            while not self.scheduler.cache.allocate(sequence, piece_end - begin):
                if self.scheduler.preempt_last() is None:
                    raise CapacityError(f"no KV blocks for {end} tokens", param="token_ids")
            batch = _piece(sequence, begin, piece_end, with_logits)
            logits = self._backend.forward(batch).logits
            sequence.num_computed_tokens = piece_end
            yield logits

    def _compute(self, plan: Plan, output: StepOutput) -> None:
        if not plan.sequences:
            return
        try:
            self._model_runner.copy_blocks(plan.copies)
            plan.copies = []
            result = self._model_runner.execute(plan, with_odds=self.trace is not None)
        except Exception as error:
            self._recover(plan, error, output)
            return
        sampled = result.sampled
        if result.failures:
            plan, sampled = self._without_failed(plan, result, output)
        self._counters.computed_tokens += plan.num_tokens
        searched = None
        if plan.searches and sampled is not None:
            searched, sampled = self._searches.take_rows(plan, sampled)
        self._counters.output_tokens += len(plan.samples)
        token_ids: list[int] = [] if sampled is None else sampled.token_ids.tolist()
        self._output_processor.process_prompts(result)
        if plan.drafted and sampled is not None:
            self._take_in_drafted(plan, token_ids, sampled, output, result.odds)
        else:
            self.scheduler.postprocess(plan, token_ids)
            if sampled is not None:
                rows = range(len(token_ids))
                self._output_processor.process(plan.samples, token_ids, rows, sampled, self._clock(), output)
        if self._speculation is not None:
            self._speculation.learn(plan, token_ids)
            self.scheduler.drop_drafts(plan)
        if searched is not None:
            self._search_on(searched, output)

    def _search_on(self, searched: dict[SequenceGroup, list[SampledRow]], output: StepOutput) -> None:
        """Let the searches of lockstep groups take in their rows."""
        now = self._clock()
        for group, rows in searched.items():
            if not self._searches.settles_tokens(group):
                output.num_begun += not group.step_times
                self._counters.output_tokens += len(rows)
        settled, over = self._searches.advance(searched, now)
        self._counters.output_tokens += len(settled)
        for answer, row in settled:
            self._output_processor.settle(answer, row, now, output)
        for group in over:
            self._output_processor.finish_early(group, [], output)

    def _take_in_drafted(
        self, plan: Plan, token_ids: list[int], sampled: SampledTokens, output: StepOutput, odds: DraftOdds | None
    ) -> None:
        """Take in what was chosen as if it were by as many steps as the longest run of accepted draft tokens."""
        positions = [sequence.num_tokens for sequence in plan.drafted]
        now, counters = self._clock(), self._counters
        sequences, _ = plan.logits_rows()
        counters.draft_tokens += len(sequences) - len(plan.samples)
        for number, rows in enumerate(accepted_rows(plan, token_ids)):
            samples, chosen = [sequences[row] for row in rows], [token_ids[row] for row in rows]
            if number == 0:
                self.scheduler.postprocess(plan, chosen)
            else:
                self.scheduler.accept_drafts(samples, chosen)
                counters.accepted_tokens += len(rows)
                counters.output_tokens += len(rows)
            self._output_processor.process(samples, chosen, rows, sampled, now, output)
        if self.trace is not None and odds is not None:
            for sequence, position in zip(plan.drafted, positions, strict=True):
                row = sequences.index(sequence)
                chosen = token_ids[row : row + 1 + len(sequence.draft_token_ids)]
                self.trace.emit(odds.verdict(sequence, position, chosen))

    def _without_failed(self, plan: Plan, result: StepResult, output: StepOutput) -> tuple[Plan, SampledTokens | None]:
        """End the requests that failed by their own fault; what is left of the step, which has no drafts, without
        them."""
        failures = result.failures
        for group, error in failures.items():
            ended = self.scheduler.finish_group(group, "error", error=error)
            self._output_processor.finish_early(group, ended, output)
        rows = [row for row, sequence in enumerate(plan.samples) if sequence.group not in failures]
        left = Plan(
            [sequence for sequence in plan.sequences if sequence.group not in failures],
            [plan.samples[row] for row in rows],
            searches=[group for group in plan.searches if group not in failures],
            num_tokens=plan.num_tokens,
        )
        return left, None if result.sampled is None else result.sampled.of_rows(rows)

    def _recover(self, plan: Plan, error: Exception, output: StepOutput) -> None:
        """A step failed. Whoever fails alone too fails for good; the others, whose bits do not depend on it, go on."""
        if plan.drafted:  # perhaps it was a guess that could not be computed
            self.scheduler.cancel_drafts(plan)
            self._compute(plan, output)
            return
        parts = _parts(plan)
        if len(parts) > 1 and not plan.copies:
            for alone in parts:
                if not alone.sequences[0].is_finished:
                    self._compute(alone, output)
            return
        failure = error if isinstance(error, PellucidError) else BackendError(f"the step failed: {error!r}")
        failure.__cause__ = None if failure is error else error
        for sequence in plan.sequences:
            ended = self.scheduler.finish_group(sequence.group, "error", error=failure)
            if ended:
                self._output_processor.finish_early(sequence.group, ended, output)

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

    def _request_seed(self, sampling_params: SamplingParams) -> int:
        if sampling_params.seed is not None:
            return sampling_params.seed
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little")
        from hashlib import sha256  # loads OpenSSL: see kvcache/prefix_cache.py

        numbers = self._seed.to_bytes(8, "little") + self._num_added.to_bytes(8, "little")
        return int.from_bytes(sha256(b"pellucid request seed\0" + numbers).digest()[:8], "little")


def is_conversation(prompt: object) -> TypeGuard[ListLike[Message]]:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def _parts(plan: Plan) -> list[Plan]:
    """What of `plan` can be computed without the rest: each sequence, or lockstep group."""
    parts: dict[Sequence | SequenceGroup, Plan] = {}
    for sequence in plan.sequences:
        group = sequence.group
        part = parts.setdefault(group if group.is_lockstep else sequence, Plan())
        part.sequences.append(sequence)
        part.num_tokens += sequence.num_scheduled_tokens
        part.samples += [
            sample for sample in plan.samples if sample is sequence or (sample.group is group and not group.is_forked)
        ]
        part.searches = [search for search in plan.searches if search is group]
    return list(parts.values())


def _checked_token_ids(token_ids: object, vocab_size: int) -> list[int]:
    """`token_ids` as a list of ints in the vocabulary.

    Raises:
        InvalidRequestError: it is something else.
    """
    if isinstance(token_ids, np.ndarray):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, (list, tuple)):
        raise InvalidRequestError(
            f"a prompt must be text or a list of token ids, not {type(token_ids).__name__}", param="prompt"
        )
    checked = [int(token_id) if isinstance(token_id, np.integer) else token_id for token_id in token_ids]
    for token_id in checked:
        if type(token_id) is not int:
            raise InvalidRequestError(f"a token id must be an integer, not {shown(token_id)}", param="prompt")
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"token id {shown(token_id)} is not in the vocabulary, which has ids 0 to {vocab_size - 1}",
                param="prompt",
            )
    return checked


def _piece(sequence: Sequence, begin: int, end: int, with_logits: bool) -> ForwardBatch:
    return ForwardBatch(
        input_ids=np.array(sequence.token_ids[begin:end], np.int32),
        positions=np.arange(begin, end, dtype=np.int32),
        cu_seqlens=np.array([0, end - begin], np.int32),
        kv_lens=np.array([end], np.int32),
        block_tables=np.array(sequence.block_tables, np.int32)[:, None],
        logits_rows=np.arange(end - begin if with_logits else 0, dtype=np.int32),
    )
