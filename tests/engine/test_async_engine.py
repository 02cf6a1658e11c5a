from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pellucid import (
    LLM,
    AsyncEngine,
    BackendError,
    ContextLengthError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    PellucidError,
    QueueFullError,
    RequestOutput,
    SamplingParams,
    TokenOutput,
)
from pellucid.engine import async_engine, loading
from pellucid.engine.async_request import AsyncTokenStream
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.scheduler import Scheduler
from tests.support.engines import answer_alone, load_fake_backend
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.gated_backend import GatedBackend
from tests.support.tiny_models import write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
PATIENCE = 600  # seconds, for a machine that is busy or stands still; what is well never comes near it


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


def run(work: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> Any:
    """`work` with an engine of its own, which must have nothing left in it at the end."""

    async def main() -> Any:
        options.setdefault("max_num_seqs", 4)
        options.setdefault("max_num_batched_tokens", 64)
        engine = AsyncEngine("fake", seed=5, **options)
        async with engine:
            try:
                result = await asyncio.wait_for(work(engine), PATIENCE)
            finally:
                engine.backend.open()  # type: ignore[attr-defined]
            assert await engine.drain(PATIENCE)
        check_empty(engine)
        return result

    return asyncio.run(main())


def check_empty(engine: AsyncEngine) -> None:
    assert not engine._requests
    assert engine._num_coming == 0
    assert engine.metrics().unfinished_requests == 0
    engine._engine.scheduler.check_integrity()
    engine._engine.scheduler.check_idle()
    assert engine.backend.closed  # type: ignore[attr-defined]


async def read(stream: AsyncTokenStream) -> list[TokenOutput]:
    tokens = [token async for token in stream]
    assert [token.request_output is None for token in tokens] == [True] * (len(tokens) - 1) + [False]
    return tokens


def ids(text: str) -> list[int]:
    return FakeTokenizer().encode(text)


# Answers


def test_tokens_are_those_of_an_engine_to_itself(backend: GatedBackend) -> None:
    rng = random.Random(0)
    requests = []
    for number in range(40):
        prompt = [7] * rng.choice([0, 64, 130]) + [rng.randrange(1, 61) for _ in range(rng.randrange(1, 50))]
        params = SamplingParams(max_tokens=rng.choice([1, 7, 40]), seed=number, n=rng.choice([1, 1, 2]), stop=["ab"])
        requests.append((prompt, params, rng.random() < 0.5))

    async def work(engine: AsyncEngine) -> list[list[Any]]:
        async def one(prompt: list[int], params: SamplingParams, stream: bool) -> list[Any]:
            if not stream:
                return (await engine.complete(prompt, params)).outputs
            tokens = await read(engine.generate(prompt, params))
            reply = tokens[-1].request_output
            assert reply is not None
            for completion in reply.outputs:
                own = [token for token in tokens if token.index == completion.index]
                assert "".join(token.text for token in own) == completion.text
                assert [token.token_id for token in own] == completion.token_ids
            return reply.outputs

        return await asyncio.gather(*(one(*request) for request in requests))

    for (prompt, params, _), outputs in zip(requests, run(work), strict=True):
        assert outputs == answer_alone(prompt, params, seed=0).outputs


def test_they_are_those_of_an_llm(backend: GatedBackend) -> None:
    prompts = [f"prompt {letter}" for letter in "abcdef"]
    with LLM("fake") as llm:
        wanted = [output.outputs for output in llm.generate(prompts, GREEDY)]
        chat = llm.chat([{"role": "user", "content": "hi"}], GREEDY)[0].outputs
    backend.closed = False

    async def work(engine: AsyncEngine) -> None:
        replies = await asyncio.gather(*(engine.complete(prompt, GREEDY) for prompt in prompts))
        assert [reply.outputs for reply in replies] == wanted
        assert [reply.prompt for reply in replies] == prompts
        reply = await engine.complete([{"role": "user", "content": "hi"}], GREEDY)
        assert reply.outputs == chat

    run(work)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_real_model(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cpu":
        pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama", vocab_size=FakeTokenizer.vocab_size)
    monkeypatch.setattr(loading.Tokenizer, "from_gguf", lambda metadata: FakeTokenizer())
    options: Any = {"backend": name, "threads": 2, "kv_cache_memory": 1 << 24, "max_num_batched_tokens": 64}
    prompts = [[1 + number] * (20 * number + 1) for number in range(8)]
    params = [SamplingParams(max_tokens=12, seed=number, logprobs=1, n=1 + number % 2) for number in range(8)]
    with LLM(path, **options) as llm:
        wanted = [output.outputs for output in llm.generate(prompts, params)]

    async def main() -> None:
        async with AsyncEngine(path, max_unread_tokens=3, **options) as engine:
            streams = [engine.generate(*request) for request in zip(prompts, params, strict=True)]
            await asyncio.gather(*map(read, streams))
            whole = [engine.complete(*request) for request in zip(prompts, params, strict=True)]
            replies = await asyncio.gather(*whole)
            assert [stream.request_output.outputs for stream in streams if stream.request_output] == wanted
            assert [reply.outputs for reply in replies] == wanted
            assert engine.metrics().used_blocks == 0

    asyncio.run(main())


def test_arguments_are_those_of_an_llm_and_a_few(backend: GatedBackend) -> None:
    def named(kind: type) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(kind).parameters)

    more = {"max_waiting", "max_queue_seconds", "max_unread_tokens"}
    assert named(AsyncEngine).keys() - more == named(LLM).keys()
    assert {name: value for name, value in named(AsyncEngine).items() if name not in more} == named(LLM)
    with pytest.raises(InvalidRequestError, match="max_unread_tokens"):
        AsyncEngine("fake", max_unread_tokens=0)


# Refusals


def test_bad_requests_are_refused_alone(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        good = asyncio.create_task(engine.complete("good", GREEDY))
        for arguments, options, param in (
            (("x", {"max_tokens": 1}), {}, "sampling_params"),
            (("x", SamplingParams(n=5)), {}, "n"),
            (("x", SamplingParams(best_of=5)), {}, "best_of"),
            (("x", SamplingParams(banned_token_ids=[999])), {}, "banned_token_ids"),
            (("x",), {"priority": 2**31}, "priority"),
            (("x",), {"cache_salt": 5}, "cache_salt"),
            (("x",), {"request_id": 5}, "request_id"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                engine.generate(*arguments, **options)  # type: ignore[arg-type]
            assert caught.value.param == param
            with pytest.raises(InvalidRequestError):
                await engine.complete(*arguments, **options)  # type: ignore[arg-type]
        best = SamplingParams(best_of=2, seed=1)
        with pytest.raises(InvalidRequestError, match="best_of is 2"):
            engine.generate("x", best)
        assert (await engine.complete("x", best)).outputs == answer_alone(ids("x"), best, seed=0).outputs
        for prompt, error in (
            ("", InvalidRequestError),
            ([1, 99], InvalidRequestError),
            (None, InvalidRequestError),
            ([{"role": "user"}], InvalidRequestError),
            ("a" * 5000, ContextLengthError),
        ):
            stream = engine.generate(prompt)  # type: ignore[arg-type]
            with pytest.raises(error):
                await anext(stream)
            assert [token async for token in stream] == []
            with pytest.raises(error):
                async with engine.generate(prompt):  # type: ignore[arg-type]
                    raise AssertionError("not reached")
            with pytest.raises(error):
                await engine.complete(prompt)  # type: ignore[arg-type]
        assert (await good).outputs == answer_alone(ids("good"), GREEDY, seed=0).outputs

    run(work)


def test_a_request_id_is_used_once_at_a_time(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        async with engine.generate("x", GREEDY, request_id="mine") as stream:
            assert stream.request_id == "mine"
            with pytest.raises(InvalidRequestError, match="in use"):
                await engine.complete("y", GREEDY, request_id="mine")
            backend.open()
            await read(stream)
        assert (await engine.complete("y", GREEDY, request_id="mine")).request_id == "mine"

    run(work)


def test_a_full_queue_refuses(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        tasks = [asyncio.create_task(engine.complete("x", GREEDY))]
        await backend.arrived()
        tasks += [asyncio.create_task(engine.complete("x", GREEDY)) for _ in range(5)]
        refused, _ = await asyncio.wait(tasks[1:], return_when="FIRST_EXCEPTION")
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            await refused.pop()  # while the step is still at its gate
        backend.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, QueueFullError) for result in results] == [False] * 3 + [True] * 3

    run(work, max_num_seqs=1, max_waiting=2)


def test_waiting_too_long_is_refused(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        now = [0.0]
        engine._engine._clock = engine._engine._step_runner._clock = lambda: now[0]
        backend.close_gate()
        first = asyncio.create_task(engine.complete("x", GREEDY))
        await backend.arrived()
        late = engine.generate("y", GREEDY)
        async with late:
            backend.let(1)
            await backend.arrived()
            now[0] = 10
            backend.open()
            with pytest.raises(QueueFullError, match=r"waited 10\.0 s"):
                await anext(late)
        await first

    run(work, max_num_seqs=1, max_queue_seconds=5)


def test_times_count_from_the_call(backend: GatedBackend) -> None:
    """Not from when the engine thread, which had a step to finish first, came to know of the request."""

    async def work(engine: AsyncEngine) -> None:
        now = [0.0]
        engine._engine._clock = engine._engine._step_runner._clock = lambda: now[0]
        backend.close_gate()
        first = asyncio.create_task(engine.complete("x", GREEDY))
        await backend.arrived()
        async with engine.generate("y", GREEDY) as stream:
            now[0] = 5.0
            backend.open()
            await read(stream)
        assert stream.request_output is not None
        metrics = stream.request_output.metrics
        assert (metrics.queue, metrics.ttft, (await first).metrics.queue) == (5.0, 5.0, 0.0)

    run(work)


# Cancellation


@pytest.mark.parametrize("how", ["cancel", "aclose", "leave", "let go", "abort"])
@pytest.mark.parametrize("forwards", [0, 1, 2, 3, 4, 9, 22, 23, 24, 25])
def test_a_request_can_be_left_at_every_moment(backend: GatedBackend, how: str, forwards: int) -> None:
    """Waiting, in any chunk of its prefill (three of 64 tokens), at any token, at the last one, and after it."""

    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        other = asyncio.create_task(engine.complete("other", GREEDY))
        await backend.arrived()
        stream = engine.generate([3] * 180, GREEDY, request_id="left")
        got: list[TokenOutput] = []
        async with stream:
            task = asyncio.create_task(collect(stream, got))
            backend.let(forwards)
            for _ in range(forwards if forwards < 23 else 22):
                await backend.arrived()
            if how == "cancel":
                task.cancel()
            elif how == "aclose":
                await stream.aclose()
            elif how == "abort":
                engine.abort("left")
            elif how == "leave":
                await stream.__aexit__(None, None, None)
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                del stream
                gc.collect()
            backend.open()
            await asyncio.gather(task, return_exceptions=True)
        assert (await other).outputs == answer_alone(ids("other"), GREEDY, seed=0).outputs
        wanted = answer_alone([3] * 180, GREEDY, seed=0).outputs[0].token_ids
        chosen = [token.token_id for token in got if token.token_id is not None]
        assert chosen == wanted[: len(chosen)]
        if how == "abort":
            assert got[-1].finish_reason in ("abort", "length")
        assert await engine.drain(PATIENCE)
        assert engine.metrics().used_blocks == 0

    run(work)


async def collect(stream: AsyncTokenStream, got: list[TokenOutput]) -> None:
    async for token in stream:
        got.append(token)


def test_leaving_the_loop_aborts(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        async for _ in engine.generate("x", ENDLESS):
            break

        async def fails() -> None:
            async for _ in engine.generate("x", ENDLESS):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fails()
        gc.collect()
        assert await engine.drain(PATIENCE)
        assert engine.metrics().counters.requests_aborted == 2

    run(work)


def test_a_stream_that_was_not_begun_is_nothing(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate("x", ENDLESS)
        await stream.aclose()
        assert [token async for token in stream] == []
        engine.abort("unknown")
        assert engine.metrics().counters.requests_received == 0

    run(work)


def test_a_cancelled_complete_is_aborted(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        task = asyncio.create_task(engine.complete("x", ENDLESS))
        await backend.arrived()
        task.cancel()
        backend.open()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)


def test_leaving_while_the_prompt_is_tokenized(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: Any, messages: Any, **options: Any) -> list[int]:
        begun.set()
        go_on.wait()
        return [1, 2, 3]

    monkeypatch.setattr(FakeTokenizer, "apply_chat_template", slow)

    async def work(engine: AsyncEngine) -> None:
        message = [{"role": "user", "content": "x"}]
        cancelled = asyncio.create_task(engine.complete(message, ENDLESS))
        aborted = asyncio.create_task(engine.complete(message, ENDLESS, request_id="aborted"))
        await asyncio.to_thread(begun.wait)
        assert (await engine.complete("others are not held up", GREEDY, request_id="x")).outputs
        cancelled.cancel()
        engine.abort("aborted")
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        go_on.set()
        reply = await aborted
        assert [completion.finish_reason for completion in reply.outputs] == ["abort"]

    monkeypatch.setattr(async_engine, "NUM_TOKENIZER_THREADS", 3)
    run(work)


def abort_at_random(count: int) -> None:
    """Requests that are left in every way at random moments; the others have the whole of their answers."""
    rng = random.Random(0)

    async def work(engine: AsyncEngine) -> int:
        async def one(number: int) -> int:
            prompt, params = [1 + number % 60] * rng.randrange(1, 150), SamplingParams(max_tokens=12, ignore_eos=True)
            await asyncio.sleep(rng.random() / 50)
            how = rng.randrange(4)
            if how == 0:
                return len((await engine.complete(prompt, params)).outputs[0].token_ids)
            async with engine.generate(prompt, params) as stream:
                for _ in range(rng.randrange(14)):
                    await anext(stream, None)
                if how == 1:
                    engine.abort(stream.request_id)
                    await collect(stream, [])
            return 12

        async def cancelled(number: int) -> int:
            task = asyncio.create_task(one(number))
            await asyncio.sleep(rng.random() / 10)
            task.cancel()
            return 12

        lengths: list[int] = []
        for begin in range(0, count, 100):
            kinds = [rng.choice([one, one, cancelled]) for _ in range(100)]
            lengths += await asyncio.gather(*(kind(begin + number) for number, kind in enumerate(kinds)))
        assert await engine.drain(PATIENCE)
        assert engine.metrics().used_blocks == 0
        assert set(lengths) == {12}
        return engine.metrics().counters.requests_aborted

    assert run(work, max_num_seqs=16, max_num_batched_tokens=256) > 0.3 * count


def test_a_thousand_random_aborts_leave_nothing_behind(backend: GatedBackend) -> None:
    abort_at_random(1000)


def test_mutant_that_does_not_abort_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncEngine, "_drop", lambda self, request: None)
    with pytest.raises(AssertionError):
        abort_at_random(100)


# Slow readers


def read_slowly(num_readers: int) -> None:
    """Readers that take one token and stop, and a quick one; later they go on."""

    async def work(engine: AsyncEngine) -> None:
        batches: list[int] = []
        step = engine._engine.step

        def counted() -> Any:
            batches.append(len(engine._engine.scheduler.running))
            return step()

        engine._engine.step = counted  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
        slow = [engine.generate([1 + number % 5], params) for number in range(num_readers)]
        first = await asyncio.gather(*(anext(stream) for stream in slow))
        while engine._engine.has_work():
            await asyncio.sleep(0.001)
        assert engine.metrics().paused_sequences == num_readers
        assert all(stream._request.num_unread <= 8 for stream in slow)

        before = len(batches)
        long = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
        quick = [token.token_id for token in await read(engine.generate([9, 9, 9], long))]
        assert quick == answer_alone([9, 9, 9], long, seed=0).outputs[0].token_ids
        assert set(batches[before + 1 :]) == {1}, "slow readers took part in the quick one's steps"
        assert len(batches) - before <= 201

        rest = await asyncio.gather(*(read(stream) for stream in slow))
        wanted = [answer_alone([1 + number], params, seed=0).outputs[0] for number in range(5)]
        for number in range(num_readers):
            tokens = [first[number], *rest[number]]
            assert [token.token_id for token in tokens] == wanted[number % 5].token_ids
            assert "".join(token.text for token in tokens) == wanted[number % 5].text

    run(work, max_num_seqs=128, max_num_batched_tokens=128, max_unread_tokens=8)


def test_a_hundred_slow_readers_cost_the_others_no_step(backend: GatedBackend) -> None:
    read_slowly(100)


def test_mutant_without_back_pressure_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncEngine, "_pause", lambda self, request: None)
    with pytest.raises(AssertionError):
        read_slowly(3)


def test_with_all_readers_slow_the_engine_sleeps_and_wakes(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        turns = count_turns(engine)
        async with engine.generate("x", SamplingParams(max_tokens=50, ignore_eos=True, n=3)) as stream:
            while engine.metrics().paused_sequences < 3:
                await asyncio.sleep(0.001)
            assert not engine._engine.has_work()
            asleep = await settled(turns)
            await asyncio.sleep(0.05)
            assert turns[0] == asleep
            assert stream._request.num_unread <= 8 + 3
            assert len(await read(stream)) == 150

    run(work, max_unread_tokens=8)


def test_every_limit_of_unread_tokens_comes_to_an_end(backend: GatedBackend) -> None:
    for limit in (1, 2, 3, 1000):

        async def work(engine: AsyncEngine) -> None:
            streams = (engine.generate([1 + number], GREEDY) for number in range(6))
            assert [len(tokens) for tokens in await asyncio.gather(*map(read, streams))] == [20] * 6

        run(work, max_unread_tokens=limit)
        backend.closed = False


def test_tokens_come_together_as_many_as_are_wanted(backend: GatedBackend) -> None:
    """Those of one continuation and of several, under limits that are smaller and larger than what is wanted."""
    params = [SamplingParams(max_tokens=20, ignore_eos=True, n=n, seed=n) for n in (1, 3)]
    for limit, num_wanted in ((1, 4), (7, 7), (1000, 7), (1000, 100)):

        async def work(engine: AsyncEngine, num_wanted: int = num_wanted, limit: int = limit) -> None:
            for each in params:
                one_by_one = await read(engine.generate("x", each))
                stream, together, sizes = engine.generate("x", each), [], []
                while tokens := await stream.read(num_wanted):
                    together += tokens
                    sizes.append(len(tokens))
                assert [(token.index, token.token_id, token.text) for token in together] == [
                    (token.index, token.token_id, token.text) for token in one_by_one
                ]
                assert min(sizes[:-1], default=num_wanted) >= min(num_wanted, limit)
                assert await stream.read() == []

        run(work, max_unread_tokens=limit)
        backend.closed = False


def test_a_paused_request_can_be_left(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.generate("x", ENDLESS):
            while not engine.metrics().paused_sequences:
                await asyncio.sleep(0.001)
            held = engine.metrics().used_blocks
        assert held == 1
        assert await engine.drain(PATIENCE)
        assert engine.metrics().used_blocks == 0

    run(work, max_unread_tokens=8)


# The engine thread


def count_turns(engine: AsyncEngine) -> list[int]:
    turns, turn = [0], engine._turn

    def counted() -> None:
        turns[0] += 1
        turn()

    engine._turn = counted  # type: ignore[method-assign]
    return turns


async def settled(turns: list[int]) -> int:
    """How many turns there were, once no more come for a while: on a busy machine the last one may be late."""
    seen = -1
    while seen != turns[0]:
        seen = turns[0]
        await asyncio.sleep(0.3)
    return seen


def test_an_idle_engine_does_not_wake(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        turns = count_turns(engine)
        await engine.complete("x", GREEDY)
        idle = await settled(turns)
        await asyncio.sleep(0.05)
        assert turns[0] == idle
        await engine.complete("x", GREEDY)
        assert await settled(turns) - idle == 20

    run(work)


def wakes_of_a_loop(backend: GatedBackend) -> tuple[int, int]:
    """How often the loop was woken while 8 requests had 8 x 20 tokens, and in how many steps."""

    async def work(engine: AsyncEngine) -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        wakes, call = [0], loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any) -> Any:
            if callback.__name__ == "_receive":
                wakes[0] += 1
            return call(callback, *args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        backend.close_gate()  # so that all run together, however long it takes them to come
        reading = [asyncio.create_task(read(engine.generate([1 + number], GREEDY))) for number in range(8)]
        while len(engine._requests) < 8 or engine._inbox.qsize() < engine._num_coming:
            await asyncio.sleep(0.001)
        backend.open()
        await asyncio.gather(*reading)
        return wakes[0], engine.metrics().counters.steps

    return run(work, max_num_seqs=8)  # type: ignore[no-any-return]


def test_a_step_wakes_a_loop_once(backend: GatedBackend) -> None:
    wakes, steps = wakes_of_a_loop(backend)
    assert wakes <= steps < 30


def test_mutant_that_wakes_it_for_each_token_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    send = AsyncEngine._send

    def at_once(self: AsyncEngine, request: Any, item: Any) -> None:
        send(self, request, item)
        self._flush()

    monkeypatch.setattr(AsyncEngine, "_send", at_once)
    wakes, steps = wakes_of_a_loop(backend)
    assert wakes > steps


def test_several_loops_share_one_engine(backend: GatedBackend) -> None:
    wanted = {letter: answer_alone(ids(letter), GREEDY, seed=0).outputs for letter in "abcd"}

    async def work(engine: AsyncEngine) -> None:
        def in_a_loop_of_its_own(letter: str) -> Any:
            async def both() -> Any:
                tokens = await read(engine.generate(letter, GREEDY))
                reply = await engine.complete(letter, GREEDY)
                return tokens[-1].request_output, reply

            return asyncio.run(both())

        results = await asyncio.gather(*(asyncio.to_thread(in_a_loop_of_its_own, letter) for letter in wanted))
        for letter, replies in zip(wanted, results, strict=True):
            assert [reply.outputs for reply in replies] == [wanted[letter]] * 2

    run(work)


def test_a_loop_that_has_closed_costs_nobody(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        async def leave() -> AsyncTokenStream:
            stream = engine.generate("x", ENDLESS)
            await anext(stream)
            return stream

        left = await asyncio.to_thread(lambda: asyncio.run(leave()))
        assert (await engine.complete("y", GREEDY)).outputs == answer_alone(ids("y"), GREEDY, seed=0).outputs
        assert await engine.drain(PATIENCE)
        assert engine.metrics().counters.requests_aborted == 1
        del left

    run(work, max_unread_tokens=1000)


def test_two_readers_of_one_stream_are_told(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        async with engine.generate("x", GREEDY) as stream:
            first = asyncio.create_task(anext(stream))
            await backend.arrived()
            with pytest.raises(RuntimeError, match="two readers"):
                await anext(stream)
            backend.open()
            await first

    run(work)


# Failures


def test_a_failure_hits_only_the_request_that_causes_it(backend: GatedBackend) -> None:
    backend.fail_on = 13

    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=3, temperature=0)
        prompts = {number: [number, 2] for number in (1, 2, 13, 4)}
        streams = {number: engine.generate(prompt, params) for number, prompt in prompts.items()}
        results = dict(
            zip(streams, await asyncio.gather(*map(read, streams.values()), return_exceptions=True), strict=True)
        )
        failed = streams[13].request_output
        assert isinstance(results[13], BackendError)
        assert failed is not None
        assert failed.error is results[13]
        with pytest.raises(BackendError, match="token 13"):
            await engine.complete([13], params)
        for number in (1, 2, 4):
            wanted = answer_alone(prompts[number], params, seed=0).outputs
            if 13 not in wanted[0].token_ids:
                reply = streams[number].request_output
                assert reply is not None
                assert reply.outputs == wanted

    run(work)


@pytest.mark.parametrize("where", ["schedule", "postprocess", "finish", "pause", "resume"])
def test_a_defect_fails_the_requests_and_the_engine_goes_on(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = getattr(Scheduler, where)
    calls = [0]

    def breaks(self: Scheduler, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if where in ("pause", "resume") else 3):
            raise ZeroDivisionError("a defect")
        return original(self, *args, **options)

    async def work(engine: AsyncEngine) -> None:
        monkeypatch.setattr(Scheduler, where, breaks)
        prompts = [[1 + number] * 70 for number in range(6)]
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
        streams = [engine.generate(prompt, params) for prompt in prompts]
        begun = [asyncio.create_task(anext(stream)) for stream in streams]
        whole = [asyncio.create_task(engine.complete(prompt, params)) for prompt in prompts]
        results = await asyncio.gather(*begun, *whole, return_exceptions=True)
        rest = await asyncio.gather(*(collect(stream, []) for stream in streams), return_exceptions=True)
        errors = [result for result in (*results, *rest) if isinstance(result, EngineError)]
        assert errors
        assert "a defect" in errors[0].message
        assert all(isinstance(result, (TokenOutput, RequestOutput, EngineError)) for result in results)
        assert all(result is None or isinstance(result, EngineError) for result in rest)
        for prompt in prompts:
            assert (await engine.complete(prompt, params)).outputs == answer_alone(prompt, params, seed=0).outputs
        counters = engine.metrics().counters
        assert counters.requests_failed + counters.requests_finished == counters.requests_received == 18

    run(work, max_unread_tokens=4)


def test_a_defect_in_taking_a_request_in_fails_that_request(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: AsyncEngine) -> None:
        monkeypatch.setattr(Scheduler, "add", lambda self, group: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await engine.complete("x", GREEDY)
        monkeypatch.undo()

    async def main() -> None:
        async with AsyncEngine("fake") as engine:
            await work(engine)

    asyncio.run(main())


def test_where_not_even_a_reset_helps_nobody_waits_for_ever(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncEngine("fake") as engine:
            monkeypatch.setattr(LLMEngine, "reset", lambda self, defect: 1 / 0)
            monkeypatch.setattr(Scheduler, "postprocess", lambda self, plan, token_ids: 1 / 0)
            work = [asyncio.create_task(engine.complete([1 + number], GREEDY)) for number in range(6)]
            stream = engine.generate("x", GREEDY)
            results = await asyncio.wait_for(asyncio.gather(*work, anext(stream), return_exceptions=True), PATIENCE)
            assert all(isinstance(result, (EngineError, EngineClosedError)) for result in results)
            with pytest.raises(EngineClosedError, match="ZeroDivisionError"):
                await engine.complete("x")
            await asyncio.wait_for(engine.wait_closed(), PATIENCE)

    asyncio.run(main())


def test_it_is_closed_once_it_was_shut_down_and_not_before(backend: GatedBackend) -> None:
    async def main() -> None:
        engine = AsyncEngine("fake")
        waits = [asyncio.create_task(engine.wait_closed()) for _ in range(3)]
        await engine.complete([1], GREEDY)
        waits.pop().cancel()
        assert not any(wait.done() for wait in waits)
        await engine.shutdown()
        await asyncio.wait_for(asyncio.gather(*waits, engine.wait_closed()), PATIENCE)

    asyncio.run(main())


# The end


def test_drain(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        backend.close_gate()
        tasks = [asyncio.create_task(engine.complete([1 + number], GREEDY)) for number in range(6)]
        await backend.arrived()
        assert not await engine.drain(0.01)
        with pytest.raises(EngineClosedError, match="draining"):
            await engine.complete("x")
        with pytest.raises(EngineClosedError, match="draining"):
            await anext(engine.generate("x"))
        drain = asyncio.create_task(engine.drain())
        backend.open()
        assert await drain
        assert all(task.done() or not engine._requests for task in tasks)
        for number, reply in enumerate(await asyncio.gather(*tasks)):
            assert reply.outputs == answer_alone([1 + number], GREEDY, seed=0).outputs

    run(work)


def test_shutdown_under_load(backend: GatedBackend) -> None:
    """Running, waiting, in tokenization, paused: each request ends in one reply."""

    async def main() -> None:
        engine = AsyncEngine("fake", max_num_seqs=4, max_unread_tokens=8)
        streams = [engine.generate([1 + number] * 100, ENDLESS) for number in range(20)]
        first = [asyncio.create_task(anext(stream)) for stream in streams]
        await first[3]
        whole = [asyncio.create_task(engine.complete([1 + number] * 100, ENDLESS)) for number in range(20)]
        await asyncio.sleep(0.01)
        late = [asyncio.create_task(engine.complete("late", ENDLESS)) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(engine.shutdown(), engine.shutdown()), PATIENCE)
        check_empty(engine)
        ends = 0
        for result in await asyncio.gather(*whole, *late, return_exceptions=True):
            ends += 1
            if isinstance(result, RequestOutput):
                assert [completion.finish_reason for completion in result.outputs] == ["abort"]
            else:
                assert isinstance(result, EngineClosedError)
        for task, stream in zip(first, streams, strict=True):
            (result,) = await asyncio.gather(task, return_exceptions=True)
            tokens: list[TokenOutput] = []
            await collect(stream, tokens)
            if isinstance(result, PellucidError):
                assert isinstance(result, EngineClosedError)
                assert tokens == []
            else:
                assert [result, *tokens][-1].finish_reason == "abort"
                assert stream.request_output is not None
            ends += 1
        assert ends == 60
        for call in (engine.complete("x"), anext(engine.generate("x"))):
            with pytest.raises(EngineClosedError, match="shut down"):
                await call
        await engine.shutdown()
        assert await engine.drain()

    asyncio.run(main())


def test_shutdown_does_not_wait_for_a_tokenizer(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: Any, messages: Any, **options: Any) -> list[int]:
        begun.set()
        go_on.wait()
        return [1, 2, 3]

    monkeypatch.setattr(FakeTokenizer, "apply_chat_template", slow)

    async def main() -> None:
        engine = AsyncEngine("fake")
        caught = asyncio.create_task(engine.complete([{"role": "user", "content": "x"}], ENDLESS))
        await asyncio.to_thread(begun.wait)
        try:
            await asyncio.wait_for(engine.shutdown(), PATIENCE)
            assert not caught.done()
            check_empty(engine)
        finally:
            go_on.set()
        with pytest.raises(EngineClosedError, match="shut down"):
            await caught
        check_empty(engine)

    asyncio.run(main())


def in_child(check: Callable[[], bool]) -> int:
    """The exit code of a forked child: 0 if `check` holds there."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_is_refused(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.generate("x", ENDLESS) as stream:
            await anext(stream)

            def refused() -> bool:
                asyncio.set_event_loop(None)
                asyncio._set_running_loop(None)
                for call in (lambda: engine.complete("x"), engine.shutdown, engine.drain):
                    with pytest.raises(EngineClosedError, match="forked"):
                        asyncio.run(call())  # type: ignore[arg-type]
                return True

            assert await asyncio.to_thread(in_child, refused) == 0
            await anext(stream)

    run(work)
