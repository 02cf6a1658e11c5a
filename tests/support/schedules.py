"""Random requests, the ways to schedule them, and what they are told to the last bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.core.outputs import CompletionOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.speculative.drafter import Drafter
from pellucid.models.kv_groups import kv_windows
from tests.support.engines import CheckedEngine

Request = tuple[list[int], SamplingParams]

SCHEDULES: dict[str, dict[str, Any]] = {
    "batched": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "burst": 100},
    "chunked": {"max_num_seqs": 8, "max_num_batched_tokens": 16, "burst": 4},
    "uncached": {"max_num_seqs": 5, "max_num_batched_tokens": 37, "enable_prefix_caching": False, "burst": 2},
    "cached": {"max_num_seqs": 16, "max_num_batched_tokens": 200, "burst": 4, "rounds": 2},
    "preempted": {"max_num_seqs": 12, "max_num_batched_tokens": 100, "burst": 6, "spare_blocks": 3, "preempt": 0.2},
}
"""Arguments of `run`."""


@dataclass
class Run:
    """What came of a schedule.

    Attributes:
        answers: of each request, in order.
        logits: hash of every row of logits that a token was chosen from, by (seed, index of the sequence, position).
        num_preemptions, num_cached_tokens: over all requests.
        most_running: sequences in the largest batch.
        num_draft_tokens, num_accepted_tokens: over all requests.
    """

    answers: list[list[CompletionOutput]] = field(default_factory=list, repr=False)
    logits: dict[tuple[int, int, int], int] = field(default_factory=dict, repr=False)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    most_running: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.answers == other.answers and self.logits == other.logits


class LogitsRecorder:
    """A backend that keeps a hash of the logits it was first given for each token to be chosen, in the last step that
    chose it: there are several where a draft token before it was wrong."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.logits: dict[tuple[int, int, int], int] = {}
        self._is_first = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._is_first = True
        return self._backend.forward(batch)

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        keys = sampling.rows[["seed", "sequence_index", "position"]].tolist()
        for row, key in zip(logits, keys, strict=True):
            if self._is_first:
                self.logits[key] = hash(row.tobytes())
        self._is_first = False
        return self._backend.sample(logits, sampling)


def random_requests(
    count: int, vocab_size: int, *, max_prompt_len: int, stops: Sequence[Any], max_tokens: Sequence[int]
) -> list[Request]:
    """Requests of every kind, whose prompts begin alike for some and of which some hold the same block of tokens after
    different ones. Each has a seed of its own."""
    rng = random.Random(2)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    first, second = tokens(max_prompt_len), tokens(max_prompt_len)
    third = second[:64] + first[64:]
    requests: list[Request] = []
    for number in range(count):
        begin = rng.choice([first, second, third, tokens(max_prompt_len)])[: rng.choice([0, 64, 130, max_prompt_len])]
        prompt = (begin[: rng.randint(0, max_prompt_len)] + tokens(rng.randint(1, 60)))[:max_prompt_len]
        limit = rng.choice(max_tokens)
        params = SamplingParams(
            max_tokens=limit,
            temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 0, 5, 20]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=number * 2**40 + rng.randrange(2**32),
            n=rng.choice([1, 1, 1, 2, 3]),
            logprobs=rng.choice([None, 0, 3]),
            min_tokens=rng.choice([0, 0, 1, limit]),
            stop=rng.choice([None, None, *stops]),
            stop_token_ids=rng.choice([(), (), (5, 6, 7)]),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append((prompt, params))
    return requests


def run(
    backend: Backend,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    enable_prefix_caching: bool = True,
    burst: int = 1,
    rounds: int = 1,
    preempt: float = 0.0,
    spare_blocks: int | None = None,
    drafter: Drafter | None = None,
    num_draft_tokens: int = 5,
) -> Run:
    """Answer `requests`, which arrive up to `burst` at once with random numbers of steps between.

    Args:
        rounds: how often to go through all of them in the same engine; the last round counts.
        preempt: probability that a sequence is put back after a step.
        spare_blocks: KV blocks beyond those of one sequence of full length; None for room for all.
        drafter: who guesses `num_draft_tokens` tokens of every sequence in every step; None for nobody.
    """
    num_blocks = max_blocks_of_sequence(kv_windows(backend.spec), max_model_len, max_num_batched_tokens)
    num_blocks = num_blocks * max_num_seqs if spare_blocks is None else num_blocks + spare_blocks
    backend.allocate_kv_cache(num_blocks)
    recorder = LogitsRecorder(backend)
    engine = CheckedEngine(
        recorder,
        tokenizer,
        SchedulerConfig(max_num_seqs, max_num_batched_tokens),
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        enable_prefix_caching=enable_prefix_caching,
        speculative=None if drafter is None else SpeculativeConfig("ngram", num_draft_tokens, adaptive=False),
        drafter=drafter,
    )
    rng = random.Random(1)
    result = Run()
    for _ in range(rounds):
        result = Run()
        recorder.logits.clear()
        engine.replies.clear()
        left = rng.randint(1, burst)
        for number, (prompt, params) in enumerate(requests):
            engine.add_request(str(number), prompt, params)
            left -= 1
            if left == 0 or number == len(requests) - 1:
                left = rng.randint(1, burst)
                num_steps = rng.randrange(3) if number < len(requests) - 1 else 10**6
                while num_steps and engine.has_unfinished():
                    engine.step()
                    result.most_running = max(result.most_running, len(engine.scheduler.running))
                    num_steps -= 1
                    if rng.random() < preempt:
                        engine.scheduler.preempt_last()
    for number, (prompt, params) in enumerate(requests):
        reply = engine.replies[str(number)]
        assert reply.error is None, reply.error
        for output in reply.outputs:
            for position in range(len(prompt), len(prompt) + len(output.token_ids)):
                key = (params.seed, output.index, position)
                result.logits[key] = recorder.logits[key]
        result.answers.append(reply.outputs)
        result.num_preemptions += reply.metrics.preemptions
        result.num_cached_tokens += reply.metrics.cached_tokens
        result.num_draft_tokens += reply.metrics.draft_tokens
        result.num_accepted_tokens += reply.metrics.accepted_tokens
    return result


def num_places(params: SamplingParams) -> int:
    """Sequences of a request that are computed at once."""
    if params.penalty_alpha:
        return params.top_k
    return 2 if params.guidance_scale != 1 else params.n


def run_alone(backend: Backend, tokenizer: Any, requests: Sequence[Request], *, max_model_len: int) -> Run:
    """Each of `requests` in an engine of its own, its prompt in one piece."""
    result = Run()
    for request in requests:
        alone = run(
            backend,
            tokenizer,
            [request],
            max_model_len=max_model_len,
            max_num_seqs=num_places(request[1]),
            max_num_batched_tokens=max_model_len,
            enable_prefix_caching=False,
        )
        result.answers += alone.answers
        result.logits |= alone.logits
    return result
