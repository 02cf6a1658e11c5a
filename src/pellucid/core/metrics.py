"""What was measured: of a request, and of an engine since it was made. Times in seconds, on the engine's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class RequestMetrics:
    """Where a request's time went.

    Attributes:
        queue: from arrival until first scheduled.
        ttft: from arrival to the first token (time to first token); 0 if there was none.
        prefill: from first scheduled to the first token.
        decode: from the first token to the last.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were found in the prefix cache.
        prefill_tokens: tokens computed other than `decode_tokens`: those of the prompt that were not cached, and all
            that were computed again after a preemption.
        output_tokens: tokens generated, over all continuations.
        decode_tokens: those of them that were not the first of a continuation.
        preemptions: how often a sequence was put back to make room for others.
        draft_tokens: tokens that were guessed and computed ahead (docs/speculation.md).
        accepted_tokens: those of them that came out as guessed, each of which saved a step.
        token_times: when each token of each continuation came.
    """

    queue: float = 0.0
    ttft: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    token_times: list[list[float]] = field(default_factory=list, repr=False)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Between each token and the one before it of the same continuation, one continuation after another."""
        return [later - earlier for times in self.token_times for earlier, later in pairwise(times)]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not cached) a second; 0 if nothing was computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill if self.prefill > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first of each continuation; 0 if there were none."""
        return self.decode_tokens / self.decode if self.decode > 0 else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guessed tokens that came out as guessed; 0 without a guess."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0


@dataclass(slots=True)
class StepTimes:
    """Where the time of steps went.

    Attributes:
        total: all of it.
        schedule: deciding what to compute.
        draft: guessing ahead.
        build: making the arrays for it.
        forward: the model.
        sample: choosing tokens.
    """

    total: float = 0.0
    schedule: float = 0.0
    draft: float = 0.0
    build: float = 0.0
    forward: float = 0.0
    sample: float = 0.0

    @property
    def postprocess(self) -> float:
        """The rest: books, text, stop strings, replies."""
        return self.total - self.schedule - self.draft - self.build - self.forward - self.sample

    def __sub__(self, earlier: StepTimes) -> StepTimes:
        return StepTimes(
            self.total - earlier.total,
            self.schedule - earlier.schedule,
            self.draft - earlier.draft,
            self.build - earlier.build,
            self.forward - earlier.forward,
            self.sample - earlier.sample,
        )


@dataclass(slots=True)
class EngineCounters:
    """What an engine counts as it goes: a few additions a step, a request, or a first token.

    Attributes:
        requests_received: every request that was valid.
        requests_finished, requests_aborted, requests_failed: how those that have ended ended.
        requests_refused: the queue was full, or they waited too long.
        preemptions: how often a sequence was put back to make room for others.
        prompt_tokens: tokens of the prompts that were begun.
        cached_tokens: how many of them were found in the prefix cache.
        computed_tokens: tokens that went through the model.
        output_tokens: tokens generated.
        draft_tokens: guessed tokens that went through the model.
        accepted_tokens: those of them that are in the output.
        continuations: how many had their first token.
        steps: steps that computed something.
        scheduled_sequences: sequences in these steps, summed.
    """

    requests_received: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    requests_refused: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    continuations: int = 0
    steps: int = 0
    scheduled_sequences: int = 0


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """An engine at a moment. While a step is under way, what it counts is that of the steps before it.

    Attributes:
        counters: since the engine was made.
        step_times: of all steps.
        running_sequences: in the batch.
        waiting_sequences: for a place in it.
        paused_sequences: for whoever reads them.
        max_num_seqs: most sequences in one step.
        free_blocks, cached_blocks, used_blocks: the KV cache. Cached ones are free to whoever needs room.
    """

    counters: EngineCounters
    step_times: StepTimes
    running_sequences: int
    waiting_sequences: int
    paused_sequences: int
    max_num_seqs: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int

    @property
    def unfinished_requests(self) -> int:
        """Requests that were received and have no reply yet."""
        counters = self.counters
        ended = counters.requests_finished + counters.requests_aborted + counters.requests_failed
        return counters.requests_received - ended - counters.requests_refused

    @property
    def decode_tokens(self) -> int:
        """Tokens generated that were not the first of a continuation."""
        return self.counters.output_tokens - self.counters.continuations

    @property
    def prefill_tokens(self) -> int:
        """Tokens computed other than `decode_tokens` and guesses that were wrong: prompts, and what was computed again
        after a preemption."""
        counters = self.counters
        return counters.computed_tokens - self.decode_tokens - (counters.draft_tokens - counters.accepted_tokens)

    @property
    def acceptance_rate(self) -> float:
        """Share of the guessed tokens that are in the output; 0 before the first guess."""
        draft_tokens = self.counters.draft_tokens
        return self.counters.accepted_tokens / draft_tokens if draft_tokens else 0.0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the prefix cache; 0 before the first prompt."""
        prompt_tokens = self.counters.prompt_tokens
        return self.counters.cached_tokens / prompt_tokens if prompt_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """Sequences in a step over `max_num_seqs`, on average; 0 before the first step."""
        steps = self.counters.steps
        return self.counters.scheduled_sequences / (steps * self.max_num_seqs) if steps else 0.0

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks that sequences hold."""
        return self.used_blocks / (self.used_blocks + self.cached_blocks + self.free_blocks)
