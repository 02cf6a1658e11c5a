"""Beam search in the engine: the same answers however it is scheduled, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest

from pellucid import LLM, AsyncEngine
from pellucid.core.capture import CaptureParams
from pellucid.core.errors import BackendError, InvalidRequestError, PellucidError, QueueFullError
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import SequenceGroup, SequenceStatus
from pellucid.engine.lockstep import LockstepGroups
from pellucid.engine.search.beam import BeamGroupSearch
from pellucid.kvcache.block_pool import CacheIntegrityError
from tests.support.engines import CheckedEngine, answer_alone, check_stream, load_fake_backend, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import EOS
from tests.support.mutants import mutant
from tests.support.random_play import play

WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 100, 30), (70,)]


def random_prompt(rng: random.Random) -> list[int]:
    shared = [1 + (7 * i) % (VOCAB_SIZE - 1) for i in range(200)]
    return shared[: rng.choice([0, 63, 64, 130])] + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 60))]


def random_params(rng: random.Random) -> SamplingParams:
    if rng.random() < 0.4:
        n = rng.choice([1, 1, 2])
        return SamplingParams(max_tokens=rng.choice([1, 20, 90]), seed=rng.randrange(99), n=n, ignore_eos=True)
    num_groups = rng.choice([1, 1, 2])
    num_beams = num_groups * rng.choice([1, 2]) + (num_groups == 1)
    logprobs = rng.choice([None, 0, 2])
    return SamplingParams(
        max_tokens=rng.choice([1, 5, 40, 90]),
        temperature=0,
        num_beams=num_beams,
        n=rng.randint(1, num_beams),
        num_beam_groups=num_groups,
        diversity_penalty=0.7 if num_groups > 1 else 0,
        length_penalty=rng.choice([1.0, 0.0, 2.0]),
        early_stopping=rng.choice([True, False, "never"]),
        ignore_eos=rng.random() < 0.3,
        stop=rng.choice([(), (), ("ab", "Q"), ("z",)]),
        stop_token_ids=rng.choice([(), (5, 6)]),
        logprobs=logprobs,
        logprobs_mode="raw" if logprobs is None else "processed",
        seed=rng.randrange(99),
    )


def random_schedule(schedule: int) -> CheckedEngine:
    """Beams among others, with chunks, prefix hits, preemptions, pauses and aborts, answer as they do alone."""
    rng = random.Random(schedule)
    max_num_seqs = rng.choice([4, 5, 8])
    windows = rng.choice(WINDOWS)
    engine = make_engine(
        num_blocks=len(windows) * rng.choice([18, 24, 60]),
        windows=windows,
        max_model_len=320,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs, 17, 64, 300]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    requests = {f"request-{number}": (random_prompt(rng), random_params(rng)) for number in range(10)}
    aborted = play(engine, requests, rng, pause=0.1)
    for request_id, (prompt, params) in requests.items():
        if request_id not in aborted:
            alone = answer_alone(prompt, params, seed=0, max_model_len=320, windows=windows)
            reply = engine.replies[request_id]
            assert reply.outputs == alone.outputs, request_id
            metrics = reply.metrics
            if metrics.preemptions == 0:
                assert metrics.prefill_tokens == metrics.prompt_tokens - metrics.cached_tokens
                assert metrics.decode_tokens == alone.metrics.decode_tokens
        if request_id in engine.tokens:
            check_stream(engine, request_id)
    return engine


@pytest.mark.parametrize("schedule", range(12, 24))
def test_random_schedules_never_change_an_answer(schedule: int) -> None:
    random_schedule(schedule)


def test_the_schedules_are_hard_enough() -> None:
    replies = random_schedules(range(12))
    assert sum(reply.metrics.preemptions for reply in replies) > 20
    reasons = Counter(output.finish_reason for reply in replies for output in reply.outputs)
    assert min(reasons["stop"], reasons["length"], reasons["abort"]) > 5, reasons


def random_schedules(schedules: range) -> list[RequestOutput]:
    return [reply for schedule in schedules for reply in random_schedule(schedule).replies.values()]


def answer(params: SamplingParams, prompt: tuple[int, ...] = (5, 6, 7)) -> list[CompletionOutput]:
    engine = make_engine()
    engine.add_request("x", list(prompt), params)
    engine.run()
    return engine.replies["x"].outputs


def beams(num_beams: int = 4, **options: object) -> SamplingParams:
    return SamplingParams(temperature=0, num_beams=num_beams, **options)  # type: ignore[arg-type]


def test_more_beams_find_what_is_more_probable() -> None:
    found = [answer(beams(count, max_tokens=8, length_penalty=0.0))[0] for count in (2, 8)]
    greedy = answer(SamplingParams(temperature=0, max_tokens=8, logprobs=0))[0]
    assert len({tuple(output.token_ids) for output in (*found, greedy)}) > 1


def test_the_n_best_come_in_order_and_differ() -> None:
    four = answer(beams(n=4, max_tokens=10))
    assert [output.index for output in four] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in four}) == 4
    assert answer(beams(n=2, max_tokens=10)) == four[:2]


def test_diverse_groups_begin_differently() -> None:
    plain = answer(beams(n=4, max_tokens=6, ignore_eos=True))
    diverse = answer(beams(n=4, max_tokens=6, ignore_eos=True, num_beam_groups=4, diversity_penalty=50.0))
    assert len({output.token_ids[0] for output in diverse}) == 4 > len({output.token_ids[0] for output in plain})


def test_every_way_to_end() -> None:
    """Each ends beams where it should, and never shows in the text."""
    base = answer(beams(max_tokens=12, ignore_eos=True))[0]
    assert (base.finish_reason, len(base.token_ids), base.stop_reason) == ("length", 12, None)
    by_token = answer(beams(n=4, max_tokens=30, early_stopping=True, stop_token_ids=range(1, 20)))
    assert {output.finish_reason for output in by_token} == {"stop"}
    assert all(output.stop_reason == output.token_ids[-1] for output in by_token if output.token_ids[-1] != EOS)
    assert all(not set(output.token_ids[:-1]) & set(range(1, 20)) for output in by_token)
    assert all(len(output.text) == len(output.token_ids) - 1 for output in by_token)
    letters = tuple("abcdefghijkl")
    by_text = answer(beams(n=4, max_tokens=30, early_stopping=True, stop=letters, ignore_eos=True))
    assert {output.stop_reason for output in by_text} <= set(letters)
    assert all(not set(output.text) & set(letters) for output in by_text)
    shown = answer(
        beams(n=4, max_tokens=30, early_stopping=True, stop=letters, ignore_eos=True, include_stop_str_in_output=True)
    )
    assert [output.text for output in shown] == [f"{output.text}{output.stop_reason}" for output in by_text]


def test_min_tokens_and_ignore_eos() -> None:
    ended = answer(beams(n=4, max_tokens=30, early_stopping=True, stop_token_ids=range(1, 40)))
    assert min(len(output.token_ids) for output in ended) < 5
    longer = answer(beams(n=4, max_tokens=30, min_tokens=5, early_stopping=True, stop_token_ids=range(1, 40)))
    assert min(len(output.token_ids) for output in longer) == 6
    assert all(EOS not in output.token_ids[:-1] for output in longer)


def test_the_sum_of_log_probabilities_is_that_of_the_tokens() -> None:
    engine = make_engine()
    for output in answer(beams(n=4, max_tokens=10, num_beam_groups=2, diversity_penalty=5.0)):
        logits = engine.alone.logits([5, 6, 7, *output.token_ids])[2:-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = logprobs[np.arange(len(output.token_ids)), output.token_ids]
        assert output.cumulative_logprob == pytest.approx(own.sum(), abs=1e-5)


def test_logprobs_are_those_that_beams_are_ranked_by() -> None:
    bias = {5: 3.0, 6: -2.0}
    for output in answer(beams(n=4, max_tokens=10, logprobs=2, logprobs_mode="processed", logit_bias=bias)):
        assert output.logprobs is not None
        assert [next(iter(entries)) for entries in output.logprobs] == output.token_ids
        assert all(len(entries) in (2, 3) for entries in output.logprobs)
        own = [entries[token_id].logprob for entries, token_id in zip(output.logprobs, output.token_ids, strict=True)]
        assert output.cumulative_logprob == pytest.approx(sum(own), rel=1e-9)
    with_bias, without = (answer(beams(max_tokens=10, logit_bias=bias)), answer(beams(max_tokens=10)))
    assert with_bias != without


def test_echo_and_stream() -> None:
    engine = make_engine()
    engine.add_request("x", [5, 6, 7], beams(n=2, max_tokens=5, echo=True, ignore_eos=True), stream=True)
    engine.run()
    check_stream(engine, "x")
    assert all(output.text.startswith("efg") and len(output.text) == 8 for output in engine.replies["x"].outputs)


def test_an_abort_gives_the_best_so_far() -> None:
    engine = make_engine()
    engine.add_request("x", [5, 6, 7], beams(n=2, max_tokens=20, ignore_eos=True), stream=True)
    assert engine.abort("x") is not None
    assert [output.token_ids for output in engine.replies.pop("x").outputs] == [[]]
    engine.add_request("x", [5, 6, 7], beams(n=2, max_tokens=20, ignore_eos=True))
    for _ in range(6):
        engine.step()
    engine.abort("x")
    outputs = engine.replies["x"].outputs
    assert [(len(output.token_ids), output.finish_reason) for output in outputs] == [(6, "abort")] * 2


def test_the_llm_and_the_async_engine_serve_them(monkeypatch: pytest.MonkeyPatch) -> None:
    params = beams(n=2, max_tokens=8, ignore_eos=True)
    wanted = answer(params)
    token_ids = [token_id for output in wanted for token_id in output.token_ids]
    load_fake_backend(monkeypatch)
    with LLM("any") as llm:
        assert [reply.outputs for reply in llm.generate([[5, 6, 7]] * 3, params)] == [wanted] * 3
        assert [token.token_id for token in llm.stream([5, 6, 7], params)] == token_ids

    async def ask() -> tuple[list[int | None], RequestOutput]:
        async with AsyncEngine("any", max_unread_tokens=3) as engine:
            tokens = [token.token_id async for token in engine.generate([5, 6, 7], params)]
            return tokens, await engine.complete([5, 6, 7], params)

    load_fake_backend(monkeypatch)
    tokens, reply = asyncio.run(ask())
    assert tokens == token_ids
    assert reply.outputs == wanted


def test_a_capture_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="num_beams takes several"):
        engine.add_request("x", [5, 6, 7], beams(), capture=CaptureParams(residual=True))


def test_a_full_queue_keeps_nothing_of_a_search() -> None:
    engine = make_engine(max_waiting=1)
    engine.add_request("x", [5, 6, 7], SamplingParams(max_tokens=2))
    with pytest.raises(QueueFullError):
        engine.add_request("y", [5, 6, 7], beams())
    engine.run()
    assert not engine._searches._entries
    assert not engine.scheduler._lockstep


def moment(group: SequenceGroup) -> str:
    """How far a search has come."""
    if group.first_scheduled_time is None:
        return "queued"
    if group.lead.status is SequenceStatus.PAUSED:
        return "paused"
    if group.lead.status is SequenceStatus.WAITING:
        return "preempted"
    if not group.is_forked:
        return "computed again"
    return "in its prompt" if not group.step_times else f"{len(group.live)} live"


def test_a_thousand_aborts_leave_nothing_behind() -> None:
    rng = random.Random(0)
    engine = make_engine(num_blocks=24, max_model_len=320, max_num_batched_tokens=40)
    moments: Counter[str] = Counter()
    number = 0
    while moments.total() < 1000:
        params = beams(rng.choice([2, 3, 4]), max_tokens=rng.choice([5, 40, 90]), ignore_eos=rng.random() < 0.5)
        engine.add_request(str(number), random_prompt(rng), params, stream=rng.random() < 0.5)
        number += 1
        for _ in range(rng.randrange(4)):
            engine.step()
            if rng.random() < 0.2:
                engine.scheduler.preempt_last()
        if engine._groups and rng.random() < 0.2:
            engine.pause(rng.choice(list(engine._groups)))
        while len(engine._groups) > rng.randrange(12):
            victim = rng.choice(list(engine._groups))
            moments[moment(engine._groups[victim])] += 1
            assert engine.abort(victim) is not None
    for request_id in list(engine._groups):
        engine.abort(request_id)
    assert engine.scheduler.cache.pool.num_used == 0
    assert len(engine.replies) == number
    assert not engine._searches._entries
    assert not engine._output_processor._texts
    wanted = ("queued", "paused", "preempted", "in its prompt", "2 live", "4 live")
    assert min(moments[name] for name in wanted) > 5, moments


def test_a_failure_hits_the_search_alone() -> None:
    backend = FakeBackend()
    backend.fail_on = 60
    engine = make_engine(backend=backend)
    engine.add_request("bad", [5, 60, 7], beams(n=2, max_tokens=8))
    engine.add_request("good", [5, 6, 7], beams(n=2, max_tokens=8))
    engine.add_request("plain", [5, 6, 7], SamplingParams(temperature=0, max_tokens=8))
    engine.run()
    assert isinstance(engine.replies["bad"].error, BackendError)
    assert {output.finish_reason for output in engine.replies["bad"].outputs} == {"error"}
    assert engine.replies["good"].outputs == answer(beams(n=2, max_tokens=8))
    assert engine.replies["plain"].error is None


def test_a_passing_failure_costs_nobody() -> None:
    backend = FakeBackend()
    backend.fail_forwards = {4}
    engine = make_engine(backend=backend)
    for name in ("x", "y"):
        engine.add_request(name, [5, 6, 7], beams(n=2, max_tokens=8))
    engine.run()
    assert engine.replies["x"].outputs == engine.replies["y"].outputs == answer(beams(n=2, max_tokens=8))


def test_metrics() -> None:
    engine = make_engine()
    engine.add_request("x", list(range(1, 31)), beams(3, n=2, max_tokens=6, ignore_eos=True))
    engine.run()
    metrics = engine.replies["x"].metrics
    assert (metrics.prompt_tokens, metrics.prefill_tokens, metrics.decode_tokens) == (30, 30, 5 * 3)
    assert metrics.output_tokens == 2 * 6
    assert [len(times) for times in metrics.token_times] == [6]
    totals = engine.metrics()
    assert (totals.prefill_tokens, totals.decode_tokens) == (30, 5 * 3)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"num_beams": 9}, "num_beams", "at most 8 sequences run"),
        ({"num_beams": 4, "max_tokens": 900}, "max_tokens", "take up to 60 KV blocks, but there are 20"),
    ],
)
def test_refusals(options: dict[str, int], param: str, message: str) -> None:
    engine = make_engine(num_blocks=20)
    with pytest.raises(PellucidError, match=message) as error:
        engine.add_request("x", [1, 2, 3], SamplingParams(temperature=0, **options))  # type: ignore[arg-type]
    assert error.value.param == param
    assert not engine.has_unfinished()
    assert not engine._searches._entries


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        (LockstepGroups, "advance", "sequence.token_ids = list(parents[parent].token_ids)", "pass"),
        (BeamGroupSearch, "_ending", "before.fork()", "before"),
    ],
)
def test_mutants_are_caught(owner: type, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name), old, new))
    with pytest.raises((AssertionError, CacheIntegrityError, IndexError, KeyError)):
        random_schedules(range(12))
