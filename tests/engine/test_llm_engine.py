from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pellucid.core.errors import (
    BackendError,
    CapacityError,
    ContextLengthError,
    InvalidRequestError,
    QueueFullError,
)
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import SequenceGroup, SequenceStatus
from pellucid.core.trace import RequestAdded, RequestFinished, StepDone, TraceEvent
from pellucid.kvcache.block_pool import CacheIntegrityError
from tests.support.engines import answer_alone, check_stream, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import EOS, FakeTokenizer
from tests.support.random_play import play
from tests.support.schedules import random_transforms

WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 100, 100, 30), (None, 1), (70,), (None, None, 200), (128, 2)]


def random_prompt(rng: random.Random, max_len: int = 400) -> list[int]:
    shared = [1 + (7 * i) % (VOCAB_SIZE - 1) for i in range(300)]  # many prompts begin alike, as a system prompt does
    begin = shared[: rng.choice([0, 0, 63, 64, 65, 128, 200, 300])]
    return (begin + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 80))])[:max_len]


def random_params(rng: random.Random) -> SamplingParams:
    n = rng.choice([1, 1, 1, 2, 4])
    return SamplingParams(
        max_tokens=rng.choice([1, 2, 40, 90, 300, 300]),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        seed=rng.randrange(2**64),
        ignore_eos=rng.random() < 0.5,
        n=n,
        min_tokens=rng.choice([0, 0, 1]),
        logprobs=rng.choice([None, None, 0, 3]),
        stop=rng.choice([(), (), ("ab", "Q"), ("z",)]),
        stop_token_ids=rng.choice([(), (5, 6)]),
        best_of=rng.choice([None, None, 4]),
        **(random_transforms(rng, VOCAB_SIZE) if rng.random() < 0.3 else {}),
    )


def same_answer(left: RequestOutput, right: RequestOutput) -> bool:
    # token ids, text, reasons and log-probabilities, to the bit
    return left.outputs == right.outputs and left.prompt_logprobs == right.prompt_logprobs


@pytest.mark.parametrize("schedule", range(60))
def test_random_schedules_never_change_an_answer(schedule: int) -> None:
    """Batching, chunking, prefix hits, preemption, forks, aborts and priorities leave every answer as it is alone."""
    rng = random.Random(schedule)
    max_num_seqs = rng.choice([4, 5, 8])
    windows = rng.choice(WINDOWS)
    engine = make_engine(
        num_blocks=len(windows) * rng.choice([9, 12, 20, 60]),
        windows=windows,
        max_model_len=500,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs, 17, 64, 300]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    requests = {f"request-{number}": (random_prompt(rng), random_params(rng)) for number in range(12)}
    aborted = play(engine, requests, rng)
    for request_id, (prompt, params) in requests.items():
        reply = engine.replies[request_id]
        alone = answer_alone(prompt, params, seed=0, max_model_len=500, windows=windows)
        if request_id in aborted:
            for got, want in zip(reply.outputs, alone.outputs, strict=True):
                if requests[request_id][1].best_of is None:  # else an abort may return others
                    assert got.token_ids == want.token_ids[: len(got.token_ids)]
                    assert got.finish_reason == "abort" or got == want
        else:
            assert same_answer(reply, alone), request_id
        if request_id in engine.tokens:
            check_stream(engine, request_id)


def test_schedules_are_hard_enough() -> None:
    """The schedules above would prove little if none of these happened."""
    preemptions = cached = 0
    for schedule in range(10):
        rng = random.Random(schedule)
        engine = make_engine(num_blocks=9, max_model_len=500, max_num_batched_tokens=64)
        for number in range(40):
            engine.add_request(str(number), random_prompt(rng), random_params(rng))
        engine.run()
        preemptions += sum(reply.metrics.preemptions for reply in engine.replies.values())
        cached += sum(reply.metrics.cached_tokens for reply in engine.replies.values())
    assert preemptions > 10
    assert cached > 1000


def test_mutant_missing_copy_on_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "copy_blocks", lambda self, pairs: None)
    engine = make_engine()
    params = SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True)
    engine.add_request("forked", [5, 6, 7], params)
    engine.run()
    reply = engine.replies["forked"]
    assert isinstance(reply.error, BackendError)
    assert "other positions" in reply.error.message


def test_mutant_early_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are findable before they are computed give another request's answer away, or a wrong one."""
    from pellucid.kvcache.cache_manager import CacheManager

    allocate = CacheManager.allocate

    def allocate_and_commit(self: CacheManager, sequence, num_new_tokens):  # type: ignore[no-untyped-def]
        done = allocate(self, sequence, num_new_tokens)
        computed = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_new_tokens if done else 0
        self.commit(sequence)
        sequence.num_computed_tokens = computed
        return done

    monkeypatch.setattr(CacheManager, "allocate", allocate_and_commit)
    backend = FakeBackend()
    backend.fail_forwards = {1, 2}
    engine = make_engine(backend=backend)
    prompt = list(range(1, 61)) * 3
    engine.add_request("failed", prompt, SamplingParams(max_tokens=2, temperature=0))
    engine.run()
    assert engine.replies["failed"].error is not None
    backend.allocate_kv_cache(64)  # what a failed step leaves is anybody's guess
    engine.add_request("later", prompt, SamplingParams(max_tokens=2, temperature=0))
    engine.run()
    assert engine.replies["later"].error is not None


def test_decode_is_not_starved_by_a_long_prefill() -> None:
    engine = make_engine(max_model_len=4000, num_blocks=200, max_num_batched_tokens=16, max_num_seqs=4)
    engine.add_request("chat", [3, 4], SamplingParams(max_tokens=200, ignore_eos=True), stream=True)
    engine.step()
    engine.add_request("book", [9] * 2000, SamplingParams(max_tokens=1), priority=-1)
    for _ in range(100):
        before = len(engine.tokens["chat"])
        engine.step()
        assert len(engine.tokens["chat"]) == before + 1
    assert "book" not in engine.replies


def test_a_better_priority_overtakes() -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=16)
    for name in ("a", "b", "c"):
        engine.add_request(name, [1] * 20, SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.add_request("urgent", [2] * 20, SamplingParams(max_tokens=3, ignore_eos=True), priority=-1)
    engine.run()
    assert next(iter(engine.replies)) == "urgent"
    assert engine.replies["b"].metrics.preemptions == 1
    assert list(engine.replies) == ["urgent", "a", "b", "c"]


def test_prefix_hit_skips_all_that_is_computed_but_the_last_token() -> None:
    engine = make_engine(max_num_batched_tokens=1000)
    params = SamplingParams(max_tokens=1)
    for length, cached in (
        *((200, 0), (200, 192), (192, 191), (129, 128), (128, 127), (64, 63), (65, 64)),  # 8 tokens are not kept
        *((80, 64), (81, 80), (240, 192), (240, 239), (250, 240), (210, 209), (207, 192), (400, 250)),
    ):
        engine.add_request("x", [7] * length, params)
        engine.run()
        assert engine.replies.pop("x").metrics.cached_tokens == cached, length


def test_salts_share_nothing() -> None:
    engine = make_engine(max_num_batched_tokens=1000)
    for salt, cached in (("", 0), ("alice", 0), ("bob", 0), ("alice", 192), ("", 192)):
        engine.add_request("x", [7] * 200, SamplingParams(max_tokens=1), cache_salt=salt)
        engine.run()
        assert engine.replies.pop("x").metrics.cached_tokens == cached


def moment(group: SequenceGroup) -> str:
    """How far a request has come."""
    first = group.sequences[0]
    if group.first_scheduled_time is None:
        return "queued"
    if any(sequence.status is SequenceStatus.WAITING for sequence in group.sequences):
        return "preempted"
    if first.num_output_tokens == 0 and not first.is_finished:
        return "in its prompt"
    return "forked" if len(group.sequences) > 1 else "decoding"


def test_a_thousand_aborts_leave_nothing_behind() -> None:
    rng = random.Random(0)
    engine = make_engine(num_blocks=12, max_model_len=500, max_num_batched_tokens=40)
    moments: Counter[str] = Counter()
    number = 0
    while moments.total() < 1000:
        params = random_params(rng)
        stream = rng.random() < 0.5 and params.best_of is None
        engine.add_request(str(number), random_prompt(rng), params, stream=stream)
        number += 1
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.1:
            engine.scheduler.preempt_last()
        while len(engine._groups) > rng.randrange(12):
            victim = rng.choice(list(engine._groups))
            moments[moment(engine._groups[victim])] += 1
            assert engine.abort(victim) is not None
    for request_id in list(engine._groups):
        engine.abort(request_id)
    assert engine.scheduler.cache.pool.num_used == 0
    assert len(engine.replies) == number
    assert not engine._output_processor._texts
    assert not engine._constraints
    assert not engine._processors
    assert engine.abort("7") is None
    assert min(moments[name] for name in ("queued", "preempted", "in its prompt", "forked", "decoding")) > 10, moments


def test_mutant_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(type(engine.scheduler.cache), "free", lambda self, sequence, **_: sequence.block_tables.clear())
    engine.add_request("x", [1, 2], SamplingParams(max_tokens=1))
    with pytest.raises(CacheIntegrityError):
        engine.run()


# Endings


def test_finish_reasons() -> None:
    engine = make_engine(max_model_len=100)
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    engine.add_request("plain", [1, 2, 3], greedy)
    engine.run()
    full = engine.replies["plain"].outputs[0]
    assert (full.finish_reason, full.stop_reason, len(full.token_ids)) == ("length", None, 30)

    stop_id = next(token for token in full.token_ids[5:] if token not in full.token_ids[:5])
    at = full.token_ids.index(stop_id)
    for include in (False, True):
        params = replace(greedy, stop_token_ids=(stop_id,), include_stop_str_in_output=include)
        engine.add_request("x", [1, 2, 3], params)
        engine.run()
        got = engine.replies.pop("x").outputs[0]
        assert (got.finish_reason, got.stop_reason) == ("stop", stop_id)
        assert got.token_ids == full.token_ids[: at + 1]
        assert got.text == FakeTokenizer().decode(got.token_ids if include else got.token_ids[:-1])

    engine.add_request("context", [1] * 90, replace(greedy, max_tokens=None))
    engine.run()
    got = engine.replies["context"].outputs[0]
    assert (got.finish_reason, len(got.token_ids)) == ("length", 10)


def test_stop_strings() -> None:
    engine = make_engine()
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    engine.add_request("plain", [1, 2, 3], greedy)
    engine.run()
    text = engine.replies["plain"].outputs[0].text
    stop = text[9:12]
    for include in (False, True):
        params = replace(greedy, stop=["never seen", stop], include_stop_str_in_output=include)
        engine.add_request("x", [1, 2, 3], params, stream=True)
        engine.run()
        got = engine.replies.pop("x").outputs[0]
        assert (got.finish_reason, got.stop_reason) == ("stop", stop)
        assert got.text == text[: text.index(stop) + (3 if include else 0)]
        assert "".join(token.text for token in engine.tokens.pop("x")) == got.text
    engine.add_request("late", [1, 2, 3], replace(greedy, stop=text[0], min_tokens=15))
    engine.run()
    late = engine.replies["late"].outputs[0]
    assert len(late.token_ids) > 15


def test_min_tokens_bars_stop_tokens_and_reports_the_models_own_logprobs() -> None:
    engine = make_engine()
    sampled = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    engine.add_request("free", [4, 4], sampled)
    engine.run()
    first = engine.replies["free"].outputs[0]
    best = first.token_ids[0]
    engine.add_request("barred", [4, 4], replace(sampled, stop_token_ids=(best,), min_tokens=1))
    engine.run()
    barred = engine.replies["barred"].outputs[0]
    assert first.logprobs is not None
    assert barred.logprobs is not None
    second = barred.token_ids[0]
    assert second != best
    assert barred.logprobs[0] == first.logprobs[0]
    assert first.logprobs[0][best].rank == 1
    assert first.logprobs[0][second].rank == 2
    assert next(iter(barred.logprobs[0])) == second


def test_seeds() -> None:
    def answers(seed: int | None, params: SamplingParams, count: int = 3) -> list[list[int]]:
        engine = make_engine(seed=seed)
        for number in range(count):
            engine.add_request(str(number), [1, 2, 3], params)
        engine.run()
        return [engine.replies[str(number)].outputs[0].token_ids for number in range(count)]

    free = SamplingParams(max_tokens=20, ignore_eos=True)
    assert answers(7, free) == answers(7, free)
    assert len({tuple(ids) for ids in answers(7, free)}) == 3
    assert answers(7, free) != answers(8, free)
    assert answers(None, free) != answers(None, free)
    fixed = replace(free, seed=2**64 - 1)
    assert len({tuple(ids) for ids in answers(1, fixed) + answers(2, fixed)}) == 1


# Refusals


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", InvalidRequestError, ["empty"]),
        ([], InvalidRequestError, ["empty"]),
        ([1, -1], InvalidRequestError, ["-1", f"0 to {VOCAB_SIZE - 1}"]),
        ([1, VOCAB_SIZE], InvalidRequestError, [str(VOCAB_SIZE), f"0 to {VOCAB_SIZE - 1}"]),
        ([2**63], InvalidRequestError, ["vocabulary"]),
        ([10**5000], InvalidRequestError, ["vocabulary"]),
        ([1, True], InvalidRequestError, ["True"]),
        ([1, 1.0], InvalidRequestError, ["1.0"]),
        ([1, "a"], InvalidRequestError, ["'a'"]),
        (np.array([1.5]), InvalidRequestError, ["1.5"]),
        (None, InvalidRequestError, ["NoneType"]),
        ({"prompt": "x"}, InvalidRequestError, ["dict"]),
        (b"abc", InvalidRequestError, ["bytes"]),
        ([1] * 100, ContextLengthError, ["100 tokens", "max_model_len"]),
        ("a" * 5000, ContextLengthError, ["5000 tokens", "100 tokens"]),
    ],
)
def test_bad_prompts_are_refused(prompt: object, error: type[Exception], words: list[str]) -> None:
    engine = make_engine(max_model_len=100)
    with pytest.raises(error) as caught:
        engine.add_request("x", prompt, SamplingParams())  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
    assert not engine.has_unfinished()
    assert type(caught.value) is error


def test_bad_requests_are_refused() -> None:
    engine = make_engine(max_num_seqs=4)
    engine.add_request("taken", [1], SamplingParams())
    for arguments, options, param in (
        (("taken", [1], SamplingParams()), {}, "request_id"),
        (("x", [1], {"max_tokens": 1}), {}, "sampling_params"),
        (("x", [1], SamplingParams(n=5)), {}, "n"),
        (("x", [1], SamplingParams(stop_token_ids=[VOCAB_SIZE])), {}, "stop_token_ids"),
        (("x", [1], SamplingParams()), {"priority": 2**31}, "priority"),
        (("x", [1], SamplingParams()), {"priority": 1.5}, "priority"),
        (("x", [1], SamplingParams()), {"cache_salt": "a" * 2000}, "cache_salt"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            engine.add_request(*arguments, **options)  # type: ignore[arg-type]
        assert caught.value.param == param
    engine.run()


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=2)
    for number in range(2):
        engine.add_request(str(number), [1], SamplingParams(max_tokens=4))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.add_request("late", [1], SamplingParams())
    engine.run()
    assert set(engine.replies) == {"0", "1"}


def test_waiting_too_long_is_refused() -> None:
    now = [0.0]
    engine = make_engine(max_num_seqs=1, max_queue_seconds=5, clock=lambda: now[0])
    engine.add_request("long", [1], SamplingParams(max_tokens=20, ignore_eos=True))
    engine.add_request("waits", [1], SamplingParams(n=1), stream=True)
    for _ in range(8):
        engine.step()
        now[0] += 1
    assert isinstance(engine.replies["waits"].error, QueueFullError)
    assert engine.tokens["waits"][0].request_output is engine.replies["waits"]
    engine.run()
    assert engine.replies["long"].error is None


def test_capacity_is_checked() -> None:
    with pytest.raises(CapacityError, match="takes up to 16 KV blocks, but there are 10"):
        make_engine(num_blocks=10, max_model_len=1000)


# Failures


def test_a_failure_hits_only_the_request_that_causes_it() -> None:
    backend = FakeBackend()
    backend.fail_on = 13
    engine = make_engine(backend=backend)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, n=2)
    prompts = {"good": [1, 2], "bad": [5, 13, 5], "fine": [4, 4, 4]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params, stream=True)
    engine.run()
    bad = engine.replies["bad"]
    assert isinstance(bad.error, BackendError)
    assert [completion.finish_reason for completion in bad.outputs] == ["error", "error"]
    assert engine.tokens["bad"][-1].request_output is bad
    for name in ("good", "fine"):
        alone = answer_alone(prompts[name], params, seed=0)
        if all(13 not in completion.token_ids for completion in alone.outputs):
            assert same_answer(engine.replies[name], alone)
    engine.add_request("after", [1], SamplingParams(max_tokens=1, stop_token_ids=[13]))
    engine.run()
    assert engine.replies["after"].error is None


def test_a_passing_failure_costs_nobody() -> None:
    backend = FakeBackend()
    backend.fail_forwards = {2, 5}
    engine = make_engine(backend=backend)
    params = SamplingParams(max_tokens=10, temperature=0)
    for name in "ab":
        engine.add_request(name, [ord(name) % 50], params)
    engine.run()
    for name in "ab":
        assert same_answer(engine.replies[name], answer_alone([ord(name) % 50], params, seed=0))


def test_an_unexpected_exception_becomes_a_backend_error() -> None:
    backend = FakeBackend()
    engine = make_engine(backend=backend)
    engine.add_request("x", [1, 2], SamplingParams())
    backend.forward = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    engine.run()
    error = engine.replies["x"].error
    assert isinstance(error, BackendError)
    assert "ZeroDivisionError" in error.message
    assert isinstance(error.__cause__, ZeroDivisionError)


# Logits, metrics, trace


def test_logits_are_those_of_generation() -> None:
    engine = make_engine(num_blocks=20)
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    engine.add_request("x", [1, 2, 3], params)
    for _ in range(150):
        engine.step()
    sequence = engine.scheduler.running[0]
    tokens = list(sequence.token_ids)
    logits = engine.alone.logits(tokens)
    assert logits.shape == (len(tokens), VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=1)[2:-1].tolist() == tokens[3:]
    engine.run()
    assert same_answer(engine.replies["x"], answer_alone([1, 2, 3], params, seed=0))


def test_logits_make_room_and_refuse() -> None:
    engine = make_engine(num_blocks=8, max_model_len=512)
    engine.add_request("x", [1] * 300, SamplingParams(max_tokens=5))
    engine.step()
    engine.step()
    assert len(engine.alone.logits([1] * 512)) == 512
    engine.run()
    assert engine.replies["x"].metrics.preemptions == 1
    with pytest.raises(ContextLengthError, match="513 tokens"):
        engine.alone.logits([1] * 513)
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.alone.logits([])
    engine.scheduler.check_idle()


def test_metrics() -> None:
    now = [0.0]
    engine = make_engine(max_num_batched_tokens=10, clock=lambda: now[0])
    engine.add_request("x", [1] * 25, SamplingParams(max_tokens=4, ignore_eos=True))
    now[0] = 2.0
    while engine.has_unfinished():
        engine.step()
        now[0] += 1.0
    metrics = engine.replies["x"].metrics
    assert (metrics.queue, metrics.prefill, metrics.ttft, metrics.decode) == (2.0, 2.0, 4.0, 3.0)
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.cached_tokens, metrics.preemptions) == (25, 4, 0, 0)
    assert metrics.decode_tokens == 3
    assert metrics.decode_tokens_per_second == 1.0
    assert metrics.prefill_tokens_per_second == 12.5


def test_trace() -> None:
    events: list[TraceEvent] = []

    class Sink:
        def emit(self, event: TraceEvent) -> None:
            events.append(event)

    engine = make_engine(trace=Sink())
    engine.add_request("x", [1] * 200, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.run()
    assert isinstance(events[0], RequestAdded)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [step.num_scheduled_tokens for step in steps] == [128, 72, 1, 1]
    assert [step.num_sampled_tokens for step in steps] == [0, 1, 1, 1]
    for step in steps:
        assert step.free_blocks + step.cached_blocks + step.used_blocks == 64
    assert any(isinstance(event, RequestFinished) for event in events)
    assert EOS not in engine.replies["x"].prompt_token_ids
