"""Tokens that are passed on where they come in, and steps that wait until they are."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pellucid import AsyncEngine, SamplingParams, TokenOutput
from pellucid.core.batch import ForwardBatch
from pellucid.engine import async_engine
from pellucid.engine.async_request import AsyncRequest
from tests.engine.test_async_engine import GREEDY, PATIENCE, read, run
from tests.support.engines import load_fake_backend
from tests.support.gated_backend import GatedBackend

ENDLESS = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
NUM_STREAMS = 12


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


async def both(engine: AsyncEngine, prompt: list[int], params: SamplingParams, takes: Callable[[int], bool]) -> Any:
    """What was passed on and what was read, in the order in which they came; `takes` says which tokens are taken."""
    came: list[tuple[int, int | None, str]] = []
    passed = 0

    def take(token: TokenOutput) -> bool:
        nonlocal passed
        if not takes(len(came)):
            return False
        came.append((token.index, token.token_id, token.text))
        passed += 1
        return True

    stream = engine.generate(prompt, params)
    stream.pass_on(take)
    async for token in stream:
        came.append((token.index, token.token_id, token.text))
    assert stream.request_output is not None
    return came, passed, stream.request_output


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_lost_doubled_or_overtaken(backend: GatedBackend, n: int) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, n=n, seed=5)

    async def work(engine: AsyncEngine) -> None:
        read_only = [(token.index, token.token_id, token.text) for token in await read(engine.generate([7], params))]
        for takes in (lambda number: True, lambda number: number % 5 > 0, lambda number: False):
            came, passed, output = await both(engine, [7], params, takes)
            assert came == read_only
            assert (passed > 0) == (takes(1) and n == 1)  # three come together, and are read together
            assert passed < 40 * n  # the last one is read
            assert [len(completion.token_ids) for completion in output.outputs] == [40] * n

    run(work)


def test_tokens_in_the_queue_are_not_overtaken(backend: GatedBackend) -> None:
    """Whoever is slow to come back finds what has come since in its order."""

    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate([7], GREEDY)
        passed: list[int | None] = []
        stream.pass_on(lambda token: passed.append(token.token_id) or True)  # type: ignore[func-returns-value]
        wanted = [token.token_id for token in await read(engine.generate([7], GREEDY))]
        async with stream:
            while stream._request.num_sent < len(wanted):
                await asyncio.sleep(0.001)
            assert [token.token_id for token in await read(stream)] == wanted
        assert not passed

    run(work)


def test_a_check_sees_tokens_that_overtake(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = AsyncRequest.receive

    def hasty(self: AsyncRequest, item: Any, *, is_alone: bool) -> None:
        if self.offer is None or not isinstance(item, TokenOutput) or item.request_output or not self.offer(item):
            receive(self, item, is_alone=is_alone)

    monkeypatch.setattr(AsyncRequest, "receive", hasty)
    with pytest.raises(AssertionError):
        test_tokens_in_the_queue_are_not_overtaken(backend)


def test_what_is_passed_on_counts_as_read(backend: GatedBackend) -> None:
    """A request is paused for what nobody takes, and for nothing else."""

    async def work(engine: AsyncEngine) -> None:
        came, passed, _ = await both(engine, [7], ENDLESS, lambda number: True)
        assert len(came) == 1000
        assert passed > 900
        assert engine.metrics().paused_sequences == 0

    run(work, max_unread_tokens=2)


def test_tokens_that_come_together_are_read_together(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate([7], ENDLESS)
        passed: list[TokenOutput] = []
        stream.pass_on(lambda token: passed.append(token) or True)  # type: ignore[func-returns-value]
        backend.close_gate()
        async with stream:
            reading = asyncio.create_task(stream.read())
            await backend.arrived()
            tokens = [TokenOutput(stream.request_id, 0, token_id, "x", None, None) for token_id in (1, 2, 3)]
            engine._receive([(stream._request, token) for token in tokens], None)
            assert await reading == tokens
            reading = asyncio.create_task(stream.read())
            await asyncio.sleep(0)
            engine._receive([(stream._request, tokens[0])], None)
            assert passed == tokens[:1]
            reading.cancel()
            backend.open()

    run(work)


def test_what_it_raises_is_raised_to_the_reader(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        def fail(token: TokenOutput) -> bool:
            raise ValueError("cannot take it")

        stream = engine.generate([7], ENDLESS)
        stream.pass_on(fail)
        async with stream:
            with pytest.raises(ValueError, match="cannot take it"):
                await stream.read()
        assert await engine.drain(PATIENCE)

    run(work)


def test_a_stream_that_is_let_go_is_aborted(backend: GatedBackend) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate([7], ENDLESS)
        stream.pass_on(lambda token: True)
        await stream._begin()
        del stream
        gc.collect()
        assert await engine.drain(PATIENCE)

    run(work)


def order_of_steps(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forwards and tokens passed on, in the order in which they were, with a loop that is slow to look."""
    monkeypatch.setattr(async_engine, "MAX_AWAITING_SECONDS", PATIENCE)
    monkeypatch.setattr(async_engine, "usable_processors", lambda: backend.threads)
    order: list[str] = []
    is_ready = threading.Event()

    def note(batch: ForwardBatch, output: Any) -> None:
        if is_ready.is_set():
            order.append("forward")

    backend.spoil = note

    async def work(engine: AsyncEngine) -> None:
        def take(token: TokenOutput) -> bool:
            if is_ready.is_set():
                time.sleep(0.001)
                order.append("token")
            return True

        async def one(number: int) -> None:
            stream = engine.generate([1 + number], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
            stream.pass_on(take)
            await stream.read()

        tasks = [asyncio.create_task(one(number)) for number in range(NUM_STREAMS)]
        while engine.metrics().running_sequences < NUM_STREAMS:
            await asyncio.sleep(0.001)
        is_ready.set()
        await asyncio.gather(*tasks)

    run(work, max_num_seqs=NUM_STREAMS)
    return order


def are_in_turn(order: list[str]) -> bool:
    """Whether between two forwards all tokens of the first one were passed on."""
    steps = "".join("f" if what == "forward" else "t" for what in order).strip("t").split("f")
    full = [tokens for tokens in steps if tokens]
    return len(full) > 20 and all(tokens == "t" * NUM_STREAMS for tokens in steps[2:20])


def test_a_step_waits_until_the_tokens_of_the_last_are_passed_on(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert are_in_turn(order_of_steps(backend, monkeypatch))


def test_the_check_sees_a_step_that_does_not_wait(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MIN_AWAITED", NUM_STREAMS + 1)
    assert not are_in_turn(order_of_steps(backend, monkeypatch))


def test_a_loop_that_does_not_look_holds_nobody_up(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "usable_processors", lambda: backend.threads)
    monkeypatch.setattr(async_engine, "MIN_AWAITED", 1)

    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate([7], ENDLESS)
        stream.pass_on(lambda token: True)
        reading = asyncio.create_task(stream.read())
        while not engine.metrics().running_sequences:
            await asyncio.sleep(0.001)
        before, deadline = engine.metrics().counters.steps, time.monotonic() + PATIENCE
        while engine.metrics().counters.steps < before + 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # the loop stands still
        assert engine.metrics().counters.steps >= before + 3
        await reading

    run(work)
