"""Log-probabilities of prompts: right, whatever the schedule, in bounded memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.registry import load_backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.config import BackendConfig
from pellucid.core.errors import BackendError
from pellucid.core.outputs import Logprob, RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.decoding.distribution import descending
from pellucid.decoding.sampler import log_probabilities
from pellucid.engine import scheduler
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.scheduler import MAX_PROMPT_LOGITS
from pellucid.kvcache import cache_manager
from pellucid.weights.loader import open_model
from tests.support.engines import CheckedEngine, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import ALPHABET
from tests.support.mutants import mutant
from tests.support.sequences import make_group
from tests.support.tiny_models import write_tiny_model

PROMPT = [random.Random(3).randrange(VOCAB_SIZE) for _ in range(300)]


class CountingBackend(FakeBackend):
    """Remembers how many rows of logits each step asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows: list[int] = []

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self.num_rows.append(len(batch.logits_rows))
        return super().forward(batch)


def answer(engine: CheckedEngine, prompt: list[int] = PROMPT, **params: Any) -> RequestOutput:
    engine.add_request("x", prompt, SamplingParams(**{"max_tokens": 3, "seed": 1, "prompt_logprobs": 2, **params}))
    engine.run()
    return engine.replies.pop("x")


def expected(prompt: list[int], count: int, engine: CheckedEngine | None = None) -> list[dict[int, Logprob] | None]:
    """From all the logits of the prompt."""
    logits = (engine or make_engine()).alone.logits(prompt)
    entries: list[dict[int, Logprob] | None] = [None]
    for row, token_id in zip(logits, prompt[1:], strict=False):
        top = descending(row)[:count].tolist()
        entry = {}
        for each in (token_id, *top):
            rank = top.index(each) + 1 if each in top else None
            entry[each] = Logprob(float(log_probabilities(row, np.array([each]))[0]), rank, ALPHABET[each])
        entries.append(entry)
    return entries


@pytest.mark.parametrize("count", [0, 2, 20])
def test_each_token_of_the_prompt_has_its_place_in_the_models_distribution(count: int) -> None:
    got = answer(make_engine(max_num_batched_tokens=512), prompt_logprobs=count).prompt_logprobs
    assert got == expected(PROMPT, count)
    assert got is not None
    assert all(next(iter(entry)) == token_id for entry, token_id in zip(got[1:], PROMPT[1:], strict=True) if entry)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_backends_score_as_the_oracle_does(name: Any, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE)
    with open_model(path) as model_file:
        try:
            backend = load_backend(model_file, BackendConfig(name, 1), kv_cache_dtype="f16")
        except BackendError as error:
            if "not installed" in error.message:
                pytest.skip("the native core is not built")
            raise
    engine = make_engine(backend=backend, max_model_len=320)  # type: ignore[arg-type]
    prompt = PROMPT[:100]
    assert answer(engine, prompt, prompt_logprobs=3).prompt_logprobs == expected(prompt, 3, engine)


def test_prompts_of_a_token_or_two() -> None:
    engine = make_engine()
    assert answer(engine, [5]).prompt_logprobs == [None]
    assert answer(engine, [5, 6]).prompt_logprobs == expected([5, 6], 2)
    assert answer(engine, [5], echo=True, logprobs=1).outputs[0].logprobs[0] == {}  # type: ignore[index]


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_changes_them(seed: int) -> None:
    """Beside others, in chunks, preempted, with the prefix cached before and found after."""
    rng = random.Random(seed)
    wanted = expected(PROMPT, 2)
    engine = make_engine(num_blocks=18, max_model_len=400, max_num_batched_tokens=rng.choice([8, 40, 512]))
    plain = answer(make_engine(max_num_batched_tokens=512), prompt_logprobs=None).outputs
    engine.add_request("cached", PROMPT[: rng.choice([64, 300])], SamplingParams(max_tokens=20, seed=4))
    engine.add_request("forked", PROMPT, SamplingParams(prompt_logprobs=2, n=3, seed=1, max_tokens=3))
    engine.add_request("x", PROMPT, SamplingParams(prompt_logprobs=2, seed=1, max_tokens=3))
    while engine.has_unfinished():
        engine.step()
        if rng.random() < 0.1:
            engine.scheduler.preempt_last()
    reply = engine.replies.pop("x")
    assert reply.prompt_logprobs == engine.replies["forked"].prompt_logprobs == wanted
    assert reply.outputs == plain
    assert reply.metrics.cached_tokens == 0
    assert answer(engine, prompt_logprobs=None).metrics.cached_tokens > 0


def test_their_logits_take_bounded_memory() -> None:
    backend = CountingBackend()
    engine = make_engine(backend=backend, max_num_batched_tokens=900)
    for number in range(4):
        engine.add_request(str(number), PROMPT, SamplingParams(prompt_logprobs=0, max_tokens=3, ignore_eos=True))
    engine.add_request("plain", PROMPT[1:], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.run()
    assert len(engine.replies["plain"].metrics.token_times[0]) == 3
    assert MAX_PROMPT_LOGITS <= max(backend.num_rows) <= MAX_PROMPT_LOGITS + 5
    assert sum(backend.num_rows) == 4 * 299 + 5 * 3


def test_what_is_known_is_not_asked_for_again() -> None:
    backend = CountingBackend()
    engine = make_engine(backend=backend, max_num_batched_tokens=50)
    engine.add_request("x", PROMPT, SamplingParams(prompt_logprobs=0, max_tokens=3, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.preempt_last() is not None
    engine.run()
    assert sum(backend.num_rows) == 299 + 3
    assert engine.replies["x"].metrics.prefill_tokens < 300 + 50  # nor is what lies before it computed again


def test_mutant_without_the_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_PROMPT_LOGITS", 10**6)
    with pytest.raises(AssertionError):
        test_their_logits_take_bounded_memory()


def test_mutant_rows_one_token_late_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    late = mutant(
        InputBuilder.build, "cu_seqlens[-2] + position - begin for", "cu_seqlens[-2] + position - begin + 1 for"
    )
    monkeypatch.setattr(InputBuilder, "build", late)
    with pytest.raises((AssertionError, IndexError)):
        test_each_token_of_the_prompt_has_its_place_in_the_models_distribution(2)


def test_mutant_using_the_prefix_cache_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_manager, "_max_cached_tokens", lambda sequence: len(sequence.token_ids) - 1)
    with pytest.raises((AssertionError, IndexError)):
        test_no_schedule_changes_them(0)


def test_a_sequence_knows_what_it_will_tell() -> None:
    group = make_group(PROMPT[:10], SamplingParams(prompt_logprobs=0))
    (sequence,) = group.sequences
    assert isinstance(sequence, Sequence)
    assert not sequence.scheduled_prompt_positions
    sequence.num_scheduled_tokens = 4
    assert sequence.scheduled_prompt_positions == range(4)
    assert group.prompt_logprobs is not None
    group.prompt_logprobs += [{}] * 3
    assert sequence.scheduled_prompt_positions == range(3, 4)
    sequence.num_scheduled_tokens = 10
    assert sequence.scheduled_prompt_positions == range(3, 9)
    assert not make_group(PROMPT[:10]).sequences[0].scheduled_prompt_positions


@pytest.mark.parametrize(
    "search",
    [
        {"guidance_scale": 2.0, "negative_prompt": [7] * 40},
        {"penalty_alpha": 0.5, "top_k": 4, "logprobs_mode": "processed"},
        {"num_beams": 3, "logprobs_mode": "processed"},
    ],
)
def test_a_search_has_them_too(search: dict[str, Any]) -> None:
    wanted = expected(PROMPT, 2)
    for stream in (False, True):
        engine = make_engine(max_num_batched_tokens=50)
        params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, echo=True, logprobs=2, **search)
        engine.add_request("x", PROMPT, params, stream=stream)
        engine.run()
        reply = engine.replies["x"]
        assert reply.prompt_logprobs == wanted
        (completion,) = reply.outputs
        assert completion.logprobs is not None
        assert completion.logprobs[:300] == [{}, *wanted[1:]]
        assert completion.token_ids[:300] == PROMPT
        if stream:
            assert [token.token_id for token in engine.tokens["x"]] == completion.token_ids
            assert "".join(token.text for token in engine.tokens["x"]) == completion.text
