"""Embeddings: the same bits however a request is run, beside requests that generate, and nothing is generated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid import (
    LLM,
    AsyncEngine,
    BackendError,
    ContextLengthError,
    EmbeddingOutput,
    EngineClosedError,
    InvalidRequestError,
    QueueFullError,
)
from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.capture import CaptureParams
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.outputs import RequestOutput
from pellucid.core.pooling_params import PoolingParams, labelling
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.pooling import LastPooler, MeanPooler, PoolingBook
from pellucid.engine.request_intake import RequestParams
from tests.support.captures import residuals
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import CheckedEngine, load_fake_backend, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant
from tests.support.tiny_models import load_tiny, write_tiny_model

Request = tuple[list[int], RequestParams]

MAX_MODEL_LEN = 320
RNG = np.random.default_rng(7)
PROMPT = RNG.integers(0, VOCAB_SIZE, 200).tolist()
MEAN, LAST = PoolingParams("mean"), PoolingParams("last")
ALL_PARAMS = [PoolingParams(pooling, normalize) for pooling in ("mean", "last") for normalize in (True, False)]  # type: ignore[arg-type]
LABELS = labelling([5, 1, 60, 1])
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False, logprobs=1)


def mixed_requests(count: int) -> list[Request]:
    """Two of three are pooled; many begin alike."""
    rng = random.Random(3)
    requests: list[Request] = []
    for number in range(count):
        begin = PROMPT[: rng.choice((0, 40, 64, 130))]
        prompt = begin + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 90))]
        requests.append((prompt, rng.choice([*ALL_PARAMS, LABELS]) if number % 3 else GREEDY))
    return requests


def new_engine(backend: Backend, num_blocks: int, max_num_seqs: int, budget: int, **options: Any) -> CheckedEngine:
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(max_num_seqs, budget)
    tokenizer: Any = FakeTokenizer()
    return CheckedEngine(backend, tokenizer, config, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, **options)


def answers(
    backend: Backend,
    requests: Sequence[Request],
    *,
    budget: int = 512,
    max_num_seqs: int = 8,
    num_blocks: int = 64,
    burst: int = 100,
    rounds: int = 1,
    preempt: float = 0.0,
    **options: Any,
) -> list[RequestOutput]:
    """The replies to `requests`, which arrive up to `burst` at once; those of the last of `rounds`."""
    engine = new_engine(backend, num_blocks, min(max_num_seqs, budget), budget, **options)
    rng = random.Random(5)
    for _ in range(rounds):
        engine.replies.clear()
        for number, (prompt, params) in enumerate(requests):
            engine.add_request(str(number), prompt, params)
            for _ in range(rng.randrange(4) if rng.random() < 1 / burst else 0):
                engine.step()
                if rng.random() < preempt:
                    engine.scheduler.preempt_last()
        while engine.has_unfinished():
            engine.step()
            if rng.random() < preempt:
                engine.scheduler.preempt_last()
    assert not engine._pooling
    return [engine.replies[str(number)] for number in range(len(requests))]


def bits(replies: Sequence[RequestOutput]) -> list[Any]:
    """What each request was told, to the last bit."""
    return [
        [(output.token_ids, output.logprobs, output.finish_reason) for output in reply.outputs]
        if reply.pooled is None
        else reply.pooled.tobytes()
        for reply in replies
    ]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that see all, or seven of which six have a window of 40 tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_it_is_what_the_head_reads_pooled(path: Path, name: str) -> None:
    backend = load_tiny(path, name)
    hidden = residuals(backend, PROMPT, [2 * len(backend.spec.layers) + 1])[0][0].astype(np.float64)
    total = np.zeros(backend.spec.hidden_size)
    for row in hidden:
        total += row
    for pooling, expected in (("mean", total / len(PROMPT)), ("last", hidden[-1])):
        (plain,) = answers(backend, [(PROMPT, PoolingParams(pooling, normalize=False))])  # type: ignore[arg-type]
        assert plain.pooled is not None
        assert plain.pooled.dtype == np.float32
        assert np.array_equal(plain.pooled, expected.astype(np.float32))
        (normalized,) = answers(backend, [(PROMPT, PoolingParams(pooling))])  # type: ignore[arg-type]
        assert normalized.pooled is not None
        length = np.sqrt(np.square(expected).sum())
        assert np.array_equal(normalized.pooled, (expected / length).astype(np.float32))
        assert abs(np.linalg.norm(normalized.pooled) - 1) < 1e-6


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_labels_are_as_probable_as_an_answer_is_told(path: Path, name: str) -> None:
    backend = load_tiny(path, name)
    (reply,) = answers(backend, [(PROMPT, LABELS)])
    assert reply.pooled is not None
    found = reply.pooled.tolist()
    for token_id, logprob in zip(LABELS.label_token_ids, found, strict=True):
        params = SamplingParams(max_tokens=1, temperature=0, allowed_token_ids=[token_id], logprobs=0)
        (told,) = answers(backend, [(PROMPT, params)])
        assert told.outputs[0].logprobs is not None
        assert told.outputs[0].logprobs[0][token_id].logprob == logprob
    (every,) = answers(backend, [(PROMPT, labelling(range(VOCAB_SIZE)))])
    assert every.pooled is not None
    assert np.exp(every.pooled.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)


def test_the_mutant_that_normalizes_twice_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_tiny(path, "cpu")
    (wanted,) = answers(backend, [(PROMPT, LABELS)])
    changed = mutant(PoolingBook._logprobs, "normalize=False", "normalize=True")
    monkeypatch.setattr(PoolingBook, "_logprobs", changed)
    (found,) = answers(backend, [(PROMPT, LABELS)])
    assert bits([found]) != bits([wanted])


SCHEDULES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"budget": 7, "burst": 4},
    "uncached": {"budget": 37, "burst": 2, "enable_prefix_caching": False},
    "cached": {"budget": 200, "burst": 4, "rounds": 2},
    "preempted": {"budget": 50, "burst": 3, "preempt": 0.3},
}


@pytest.mark.parametrize(("name", "count"), [("reference", 4), ("cpu", 30)])
def test_every_schedule_gives_the_same_bits(path: Path, name: str, count: int) -> None:
    backend = load_tiny(path, name)
    requests = mixed_requests(count)
    wanted = [bits(answers(backend, [request], enable_prefix_caching=False))[0] for request in requests]
    preemptions = 0
    for schedule, options in SCHEDULES.items():
        replies = answers(backend, requests, **options)
        assert bits(replies) == wanted, schedule
        preemptions += sum(reply.metrics.preemptions for reply, (_, params) in zip(replies, requests, strict=True))
        if schedule == "cached":
            cached = [reply.metrics.cached_tokens for reply in replies]
            poolings = [getattr(params, "pooling", None) for _, params in requests]
            assert not any(count for count, pooling in zip(cached, poolings, strict=True) if pooling == "mean")
            hits = sum(count for count, pooling in zip(cached, poolings, strict=True) if pooling == "last")
            assert hits or name == "reference"
    assert preemptions > (5 if name == "cpu" else 0)
    backend.close()
    assert bits(answers(load_tiny(path, name, threads=2), requests, **SCHEDULES["chunked"])) == wanted


def test_they_run_beside_requests_that_are_guessed_ahead(path: Path) -> None:
    backend = load_tiny(path, "cpu")
    requests = mixed_requests(30)
    wanted = bits(answers(backend, requests))
    drafter = ScriptedDrafter(VOCAB_SIZE, wrong=0.5)
    config = SpeculativeConfig("ngram", 5, adaptive=False)
    for preempt in (0.0, 0.3):  # in steps with room for guesses
        replies = answers(
            backend, requests, budget=1000, max_num_seqs=4, preempt=preempt, speculative=config, drafter=drafter
        )
        assert bits(replies) == wanted, preempt
        assert sum(reply.metrics.draft_tokens for reply in replies) > 10
        assert not any(reply.metrics.draft_tokens for reply in replies if reply.pooled is not None)


def chunks_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(self: MeanPooler, sequence: object, hidden: Any) -> None:
        self._sum += hidden.sum(0)
        self.num_known += len(hidden)

    monkeypatch.setattr(MeanPooler, "observe", observe)


def prefix_hits_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = mutant(HiddenStates.open, "group.max_cached_tokens = reader.num_known", "pass")
    monkeypatch.setattr(HiddenStates, "open", opened)


def tokens_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    want = mutant(HiddenStates._want, "max(begin, num_known)", "begin")
    monkeypatch.setattr(HiddenStates, "_want", want)


def last_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LastPooler, "__init__", mutant(LastPooler.__init__, "self.num_known = num_tokens - 1", "self.num_known = 0")
    )
    monkeypatch.setattr(LastPooler, "observe", mutant(LastPooler.observe, "hidden[-1]", "hidden[0]"))


@pytest.mark.parametrize("defect", [chunks_added_up, prefix_hits_missed, tokens_counted_again, last_of_a_chunk])
def test_mutants_are_caught(defect: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = load_tiny(write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE), "cpu")
    requests = mixed_requests(12)

    def found() -> list[Any]:
        return [bits(answers(backend, requests, **SCHEDULES[name])) for name in ("batched", "cached", "preempted")]

    wanted = found()
    assert wanted == [wanted[0]] * 3
    defect(monkeypatch)
    assert found() != wanted


class CountingBackend(FakeBackend):
    """Counts rows of logits and choices, and of what tokens hidden states are asked for."""

    num_logits = 0
    num_samples = 0
    most_captured = 0

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self.num_logits += len(batch.logits_rows)
        if batch.capture is not None:
            captured = sum(len(wanted.tokens) for wanted in batch.capture.sequences)
            self.most_captured = max(self.most_captured, captured)
        return super().forward(batch)

    def sample(self, logits: Any, sampling: SamplingBatch) -> SampledTokens:
        self.num_samples += len(logits)
        return super().sample(logits, sampling)


@pytest.mark.parametrize("params", ALL_PARAMS)
def test_nothing_is_generated(params: PoolingParams) -> None:
    backend = CountingBackend()
    engine = make_engine(backend=backend, max_num_batched_tokens=30)
    for number in range(5):
        engine.add_request(str(number), PROMPT[: 20 * number + 1], params)
    engine.run()
    for number in range(5):
        reply = engine.replies[str(number)]
        (output,) = reply.outputs
        assert (output.text, output.token_ids, output.finish_reason) == ("", [], "stop")
        assert (reply.metrics.prompt_tokens, reply.metrics.output_tokens) == (20 * number + 1, 0)
        assert reply.pooled is not None
        assert reply.pooled.shape == (backend.spec.hidden_size,)
    assert (backend.num_logits, backend.num_samples) == (0, 0)
    assert backend.most_captured <= (30 if params.pooling == "mean" else 5)
    metrics = engine.metrics()
    assert (metrics.counters.requests_finished, metrics.counters.output_tokens) == (5, 0)
    assert not engine._pooling


def test_a_prompt_may_fill_the_context() -> None:
    engine = make_engine(max_model_len=200)
    engine.add_request("full", PROMPT, MEAN)
    engine.run()
    assert engine.replies["full"].pooled is not None
    with pytest.raises(ContextLengthError, match="201 tokens, but the context holds 200 tokens"):
        engine.add_request("over", [*PROMPT, 1], MEAN)
    with pytest.raises(ContextLengthError, match="200 tokens and needs room for one more"):
        engine.add_request("continued", PROMPT, GREEDY)


@pytest.mark.parametrize("options", [{"stream": True}, {"capture": CaptureParams(residual=True)}])
def test_it_is_neither_streamed_nor_captured(options: dict[str, Any]) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request("0", PROMPT, MEAN, **options)
    assert caught.value.param in options
    assert not engine.has_unfinished()


def test_one_that_is_ended_early_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_batched_tokens=30, max_waiting=1, max_num_seqs=1)
    engine.add_request("0", PROMPT, MEAN)
    engine.step()
    engine.add_request("waiting", PROMPT, LAST)
    with pytest.raises(QueueFullError):
        engine.add_request("refused", PROMPT, MEAN)
    for request_id in ("0", "waiting"):
        engine.abort(request_id)
        reply = engine.replies[request_id]
        assert [output.finish_reason for output in reply.outputs] == ["abort"]
        assert reply.pooled is None
    assert not engine._pooling
    assert engine.metrics().used_blocks == 0
    monkeypatch.setattr(PoolingBook, "close", lambda self, group: None)
    engine.add_request("1", PROMPT, MEAN)
    engine.run()
    assert engine._pooling, "the mutant is not caught"


class NaNBackend(FakeBackend):
    """What is captured at a token 60 is not finite."""

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        output = super().forward(batch)
        for wanted in () if batch.capture is None else batch.capture.sequences:
            wanted.residual[:, batch.input_ids[wanted.tokens] == 60] = np.inf
        return output


@pytest.mark.parametrize("params", [MEAN, LAST])
def test_hidden_states_that_are_not_finite_fail_their_request_alone(params: PoolingParams) -> None:
    engine = make_engine(backend=NaNBackend())
    engine.add_request("good", [1, 2, 3], params)
    engine.add_request("bad", [1, 2, 60], params)
    engine.run()
    assert isinstance(engine.replies["bad"].error, BackendError)
    assert "not finite" in engine.replies["bad"].error.message
    assert engine.replies["bad"].outputs[0].finish_reason == "error"
    assert engine.replies["good"].pooled is not None
    assert not engine._pooling


def test_a_step_that_fails_is_made_again_without_the_one_that_fails() -> None:
    backend = FakeBackend()
    backend.fail_on = 59
    engine = make_engine(backend=backend)
    prompts = {"mean": [1, 2, 3], "bad": [1, 59], "last": [4, 5]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, LAST if name == "last" else MEAN)
    engine.run()
    assert engine.replies["bad"].error is not None
    healthy = make_engine()
    for name in ("mean", "last"):
        healthy.add_request(name, prompts[name], LAST if name == "last" else MEAN)
    healthy.run()
    for name in ("mean", "last"):
        assert np.array_equal(engine.replies[name].pooled, healthy.replies[name].pooled)  # type: ignore[arg-type]


def test_a_vector_of_zeros_stays_one() -> None:
    class ZeroBackend(FakeBackend):
        def forward(self, batch: ForwardBatch) -> ForwardOutput:
            output = super().forward(batch)
            for wanted in () if batch.capture is None else batch.capture.sequences:
                wanted.residual[:] = 0
            return output

    engine = make_engine(backend=ZeroBackend())
    engine.add_request("0", PROMPT, MEAN)
    engine.run()
    assert np.array_equal(engine.replies["0"].pooled, np.zeros(engine._backend.spec.hidden_size, np.float32))  # type: ignore[arg-type]


def test_an_llm_embeds_one_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    load_fake_backend(monkeypatch)
    with LLM("fake") as llm:
        one = llm.embed("hello")
        assert [type(output) for output in one] == [EmbeddingOutput]
        assert one[0].prompt == "hello"
        many = llm.embed(["hello", "you"], pooling="last", normalize=False)
        assert [output.prompt for output in many] == ["hello", "you"]
        (tokens,) = llm.embed(one[0].prompt_token_ids)
        assert tokens.prompt is None
        assert np.array_equal(tokens.embedding, one[0].embedding)
        assert llm.embed([]) == []
        (labels,) = llm.label_logprobs("hello", [4, 2])
        assert (labels.prompt, labels.logprobs.shape) == ("hello", (2,))
        for wrong in ([], [VOCAB_SIZE], ["a"]):
            with pytest.raises(InvalidRequestError) as caught:
                llm.label_logprobs("hello", wrong)
            assert caught.value.param == "label_token_ids"
        for arguments, param in (({"pooling": "max"}, "pooling"), ({"normalize": None}, "normalize")):
            with pytest.raises(InvalidRequestError) as caught:
                llm.embed("hello", **arguments)
            assert caught.value.param == param
        with pytest.raises(InvalidRequestError, match="prompt 1 of 2"):
            llm.embed(["hello", ""])
        for wrong in (MEAN, [MEAN]):
            with pytest.raises((InvalidRequestError, TypeError)):
                llm.generate("hello", wrong)  # type: ignore[arg-type]
        (refused,) = llm.generate_iter(["hello"], [MEAN])  # type: ignore[list-item]
        assert isinstance(refused.error, InvalidRequestError)
        assert not llm._engine._pooling


def test_an_async_engine_embeds_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    load_fake_backend(monkeypatch)
    with LLM("fake") as llm:
        wanted = [output.embedding for output in llm.embed(["hello", "you"])]
        (text,) = llm.generate("go", GREEDY)
        (labels,) = llm.label_logprobs("go", [1, 2])
    load_fake_backend(monkeypatch)

    async def main() -> None:
        async with AsyncEngine("fake") as engine:
            first, answer, second = await asyncio.gather(
                engine.embed("hello"), engine.complete("go", GREEDY), engine.embed("you", priority=-1, cache_salt="a")
            )
            assert np.array_equal(first.embedding, wanted[0])
            assert np.array_equal(second.embedding, wanted[1])
            assert answer.outputs == text.outputs
            assert np.array_equal((await engine.label_logprobs("go", [1, 2])).logprobs, labels.logprobs)
            with pytest.raises(InvalidRequestError, match="label_token_ids"):
                await engine.label_logprobs("go", [VOCAB_SIZE])
            with pytest.raises(InvalidRequestError, match="pooling"):
                await engine.embed("hello", pooling="first")  # type: ignore[arg-type]
            with pytest.raises(ContextLengthError):
                await engine.embed([1] * 3000)
            cancelled = [asyncio.create_task(engine.embed([1] * 2000)) for _ in range(5)]
            await asyncio.sleep(0)
            for task in cancelled:
                task.cancel()
            await asyncio.gather(*cancelled, return_exceptions=True)
            aborted = asyncio.create_task(engine.embed([1] * 2000, request_id="mine"))
            while not engine._requests:
                await asyncio.sleep(0)
            engine.abort("mine")
            with pytest.raises(EngineClosedError, match="aborted"):
                await aborted
            assert await engine.drain()
            assert not engine._engine._pooling
            assert engine.metrics().used_blocks == 0

    asyncio.run(main())
