"""Steps that fail: what failed is told, under a number that the log has too, and everything else goes on."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.errors import EngineError
from pellucid.engine import step_runner
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.scheduler import Plan, Scheduler
from pellucid.server import app
from tests.support.engines import load_fake_backend
from tests.support.gated_backend import GatedBackend
from tests.support.served_engine import (
    CHAT,
    COMPLETIONS,
    LONG,
    MARK,
    OpenStream,
    ServedEngine,
    check_events,
    marked,
    run,
)

SECRET = "a prompt that nobody else may read"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


def choices(data: bytes) -> Any:
    return json.loads(data)["choices"]


def text_of(events: list[str]) -> str:
    return "".join(body["choices"][0].get("text", "") for body in check_events(events))


def fails_for_marked(error: Callable[[], BaseException]) -> Callable[[ForwardBatch, ForwardOutput], None]:
    def spoil(batch: ForwardBatch, output: ForwardOutput) -> None:
        if MARK in batch.input_ids:
            raise error()

    return spoil


async def three_beside_each_other(server: ServedEngine, backend: GatedBackend) -> tuple[Any, Any, OpenStream, Any]:
    """One request that is marked, and two that go on beside it, streamed and not: what the two would have got."""
    alone = json.loads((await server.post(LONG)).body)["choices"]
    backend.close_gate()
    whole = asyncio.create_task(server.post(LONG))
    await backend.arrived()
    client = await server.begin({**LONG, "stream": True})
    bad = await server.begin(marked(70))
    await server.handed_over(3)
    backend.open()
    stream = OpenStream(client, *await client.head())
    return alone, await whole, stream, await bad.answer()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (lambda: RuntimeError(SECRET), 500, "backend_failed"),
        (lambda: AssertionError(SECRET), 500, "backend_failed"),
        (lambda: MemoryError(SECRET), 507, "capacity_exceeded"),
    ],
)
def test_a_request_whose_step_fails_fails_alone(
    backend: GatedBackend, error: Callable[[], Exception], status: int, code: str
) -> None:
    async def test(server: ServedEngine) -> None:
        backend.spoil = fails_for_marked(error)
        alone, whole, stream, bad = await three_beside_each_other(server, backend)
        assert choices(whole.body) == alone
        assert text_of(await stream.rest()) == alone[0]["text"]
        assert (bad.status, bad.error["code"]) == (status, code)
        check_reported(server, [bad.error["message"]] if status == 500 else [])
        assert SECRET not in str(bad.error)
        backend.spoil = None
        await server.check_well()

    run(test)


def check_reported(server: ServedEngine, messages: list[str]) -> None:
    """Each of `messages` has the number of an error, which the log has too. Nothing else was logged, but that the
    engine begins anew."""
    logged = [error for error in server.take_errors() if "begins anew" not in error]
    assert SECRET not in str(logged)
    numbers = [re.findall(r"error ([0-9a-f]{16})\b", message) for message in messages]
    assert all(len(found) == 1 for found in numbers), messages
    assert sorted(numbers) == sorted(re.findall(r"internal error ([0-9a-f]{16})\b", error) for error in logged)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_whose_step_fails_ends_with_an_error_and_the_terminal_event(backend: GatedBackend, path: str) -> None:
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 50, "ignore_eos": True}
    fields = fields if path == CHAT else LONG

    def fail(batch: ForwardBatch, output: ForwardOutput) -> None:
        raise RuntimeError(SECRET)

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        begun = asyncio.create_task(server.stream({**fields, "n": 2}, path))
        await backend.arrived()
        backend.let(5)
        for _ in range(5):
            await backend.arrived()
        backend.spoil = fail
        backend.open()
        stream = await begun
        assert stream.status == 200
        bodies = check_events(await stream.rest())
        assert bodies[-1]["error"]["type"] == "server_error"
        assert bodies[-1]["error"]["code"] == "backend_failed"
        check_reported(server, [bodies[-1]["error"]["message"]])
        assert SECRET not in str(bodies)
        backend.spoil = None
        await server.check_well()

    run(test)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_no_token(backend: GatedBackend, value: float) -> None:
    def spoil(batch: ForwardBatch, output: ForwardOutput) -> None:
        rows = np.searchsorted(batch.cu_seqlens, batch.logits_rows, side="right") - 1
        for row, sequence in enumerate(rows):
            if batch.input_ids[batch.cu_seqlens[sequence]] == MARK:
                output.logits[row, 7] = value

    async def test(server: ServedEngine) -> None:
        backend.spoil = spoil
        alone, whole, stream, bad = await three_beside_each_other(server, backend)
        assert choices(whole.body) == alone
        assert text_of(await stream.rest()) == alone[0]["text"]
        assert (bad.status, bad.error["code"]) == (500, "backend_failed")
        assert f"token 7 has {'NaN' if np.isnan(value) else '+inf'}" in bad.error["message"]
        check_reported(server, [bad.error["message"]])
        await server.check_well()

    run(test)


def test_a_defect_of_the_engine_fails_what_it_had_and_nothing_else(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(self: Scheduler, now: float = 0.0) -> Plan:
        raise RuntimeError(SECRET)

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        whole = asyncio.create_task(server.post(LONG))
        await backend.arrived()
        begun = asyncio.create_task(server.stream(LONG))
        await server.handed_over(2)
        backend.let(1)
        await backend.arrived()
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "schedule", defect)
            backend.open()
            stream = await begun
            bodies = check_events(await stream.rest())
            answer = await whole
        assert bodies[-1]["error"]["code"] == "engine_failed"
        assert (answer.status, answer.error["code"]) == (500, "engine_failed")
        assert SECRET not in str(bodies) + str(answer.body)
        check_reported(server, [bodies[-1]["error"]["message"], answer.error["message"]])
        await server.check_well()

    run(test)


def test_an_engine_thread_that_dies_leaves_nobody_waiting(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(self: Any, *_: Any) -> Any:
        raise EngineError(SECRET)

    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        whole = asyncio.create_task(server.post(LONG))
        await backend.arrived()
        monkeypatch.setattr(LLMEngine, "step", defect)
        monkeypatch.setattr(LLMEngine, "reset", defect)
        backend.open()
        answer = await whole
        assert (answer.status, answer.error["code"]) == (500, "engine_failed")
        await server.engine.wait_closed()
        assert (await server.get("/health")).status == 200
        late = await server.post(LONG)
        assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "engine_closed", "1")
        assert SECRET not in str(answer.body) + str(late.body)

    run(test, survives=False)


# Mutants


def test_a_mutant_that_tells_everything_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "told", lambda error: error)

    def fail(batch: ForwardBatch, output: ForwardOutput) -> None:
        raise RuntimeError(SECRET)

    async def test(server: ServedEngine) -> None:
        backend.spoil = fail
        check_reported(server, [(await server.post(LONG)).error["message"]])

    with pytest.raises(AssertionError, match=SECRET):
        run(test, survives=False)


def test_a_mutant_that_fails_a_step_as_a_whole_is_caught(
    backend: GatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_runner, "_parts", lambda plan: [plan])

    async def test(server: ServedEngine) -> None:
        backend.spoil = fails_for_marked(lambda: RuntimeError(SECRET))
        _, whole, _, _ = await three_beside_each_other(server, backend)
        assert whole.status == 200, "others failed too"

    with pytest.raises(AssertionError, match="others failed too"):
        run(test, survives=False)
