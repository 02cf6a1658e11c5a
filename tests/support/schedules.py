"""Random requests, the ways to schedule them, and what they are told to the last bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.errors import InvalidRequestError
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.core.outputs import CompletionOutput, Logprob
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.speculative.drafter import Drafter
from pellucid.models.kv_groups import kv_windows
from tests.support.engines import CheckedEngine

Request = tuple[list[int], SamplingParams]

DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
TRUNCATIONS = ("top_n_sigma", "typical_p", "epsilon_cutoff", "eta_cutoff", "xtc_probability")

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
        prompt_logprobs: of each request.
        errors: which parameter left each request nothing to choose from; None where it went well.
        logits: hash of every row of logits that a token was chosen from, or a token of a prompt scored with, by (seed,
            index of the sequence, position).
        num_preemptions, num_cached_tokens: over all requests.
        most_running: sequences in the largest batch.
        num_draft_tokens, num_accepted_tokens: over all requests.
    """

    answers: list[list[CompletionOutput]] = field(default_factory=list, repr=False)
    prompt_logprobs: list[list[dict[int, Logprob] | None] | None] = field(default_factory=list, repr=False)
    errors: list[str | None] = field(default_factory=list, repr=False)
    logits: dict[tuple[int, int, int], int] = field(default_factory=dict, repr=False)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    most_running: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def __eq__(self, other: object) -> bool:
        names = ("answers", "prompt_logprobs", "errors", "logits")
        return isinstance(other, Run) and all(getattr(self, name) == getattr(other, name) for name in names)


class LogitsRecorder:
    """A backend that keeps a hash of the logits it was first given for each token to be chosen, in the last step that
    chose it: there are several where a draft token before it was wrong."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.logits: dict[tuple[int, int, int], int] = {}
        self._sampled: set[tuple[int, int, int]] = set()  # in this step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._sampled.clear()
        return self._backend.forward(batch)

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        keys = sampling.rows[["seed", "sequence_index", "position"]].tolist()
        for row, key in zip(logits, keys, strict=True):
            if key not in self._sampled:
                self.logits[key] = hash(row.tobytes())
        self._sampled.update(keys)
        return self._backend.sample(logits, sampling)


def boost_by_length(token_ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """A logits processor."""
    logits[7 * len(token_ids) % len(logits)] += 3
    return logits


def random_transforms(rng: random.Random, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams for what is done to logits and reported of them: a few, each once in a while."""
    ids = range(vocab_size)
    choices: dict[str, list[Any]] = {
        "dynatemp_range": [0.3],
        "dynatemp_exponent": [0.5, 2],
        "top_n_sigma": [1.0, 2.5],
        "typical_p": [0.5, 0.9],
        "epsilon_cutoff": [0.01],
        "eta_cutoff": [0.02],
        "xtc_probability": [0.5, 1],
        "xtc_threshold": [0.05, 0.2],
        "repetition_penalty": [0.8, 1.3],
        "presence_penalty": [-0.5, 1.5],
        "frequency_penalty": [0.7],
        "dry_multiplier": [0.8],
        "dry_allowed_length": [1, 3],
        "dry_penalty_last_n": [-1, 20],
        "no_repeat_ngram_size": [2, 3],
        "logit_bias": [{ids[3]: 5, ids[-1]: -100}],
        "allowed_token_ids": [ids[: 2 * vocab_size // 3]],
        "banned_token_ids": [ids[::7]],
        "bad_words": [["e", "ab", "xyz"]],
        "logits_processors": [[boost_by_length]],
        "logprobs_mode": ["processed"],
        "prompt_logprobs": [0, 2],
        "echo": [True],
        "strip": [True],
    }
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.1}


def random_requests(
    count: int, vocab_size: int, *, max_prompt_len: int, stops: Sequence[Any], max_tokens: Sequence[int]
) -> list[Request]:
    """Requests of every kind, whose prompts begin alike for some and of which some hold the same block of tokens after
    different ones. Each has a seed of its own."""
    rng, others = random.Random(2), random.Random(3)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    first, second = tokens(max_prompt_len), tokens(max_prompt_len)
    third = second[:64] + first[64:]
    requests: list[Request] = []
    for number in range(count):
        begin = rng.choice([first, second, third, tokens(max_prompt_len)])[: rng.choice([0, 64, 130, max_prompt_len])]
        prompt = (begin[: rng.randint(0, max_prompt_len)] + tokens(rng.randint(1, 60)))[:max_prompt_len]
        limit = rng.choice(max_tokens)
        chosen = random_transforms(others, vocab_size)
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
            **chosen,
        )
        if others.random() < 0.1:
            params = replace(params, top_k=0, top_p=1.0, min_p=0.0, **{name: DEFAULTS[name] for name in TRUNCATIONS})
            params = replace(params, mirostat=others.choice([1, 2]))
        if params.n < 3 and others.random() < 0.2:
            params = replace(params, best_of=params.n + others.randrange(3))
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
    if backend.name == "cpu":  # whose memory holds anything: a mutant that reads what nobody wrote shall find a wrong
        empty = np.zeros((num_blocks, backend.kv_bytes_per_block()), np.uint8)  # answer, and not logits beyond f32
        backend.write_blocks(np.arange(num_blocks, dtype=np.int32), empty)
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
        result.errors.append(reply.error and reply.error.param)
        if reply.error is not None:  # how far its continuations came by then is a matter of the schedule
            assert isinstance(reply.error, InvalidRequestError), reply.error
            result.answers.append([])
            result.prompt_logprobs.append(None)
            continue
        if params.num_beams > 1:  # which of its sequences had which tokens of an answer, only the search knows
            result.logits |= {key: logits for key, logits in recorder.logits.items() if key[0] == params.seed}
        for output in reply.outputs if params.num_beams == 1 else ():
            end = len(output.token_ids) + (0 if params.echo else len(prompt))
            if params.num_sequences == params.n:  # else its index is its rank
                for position in range(len(prompt), end):
                    key = (params.seed, output.index, position)
                    result.logits[key] = recorder.logits[key]
        for position in range(1, len(reply.prompt_logprobs or ())):
            result.logits[params.seed, 0, position] = recorder.logits[params.seed, 0, position]
        result.answers.append(reply.outputs)
        result.prompt_logprobs.append(reply.prompt_logprobs)
        result.num_preemptions += reply.metrics.preemptions
        result.num_cached_tokens += reply.metrics.cached_tokens
        result.num_draft_tokens += reply.metrics.draft_tokens
        result.num_accepted_tokens += reply.metrics.accepted_tokens
    return result


def num_places(params: SamplingParams) -> int:
    """Sequences of a request that are computed at once."""
    if params.penalty_alpha:
        return params.top_k
    return 2 if params.guidance_scale != 1 else max(params.num_sequences, params.num_beams)


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
        result.prompt_logprobs += alone.prompt_logprobs
        result.errors += alone.errors
        result.logits |= alone.logits
    return result
