"""A server from start to end, with an engine that does what a test wants; as a process, in tests/cli/test_serve.py."""

from __future__ import annotations

import asyncio
import gc
import http.client
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid.core.errors import ModelFileError
from pellucid.server import loading, run
from pellucid.server.config import resolve
from pellucid.server.listening import bind
from pellucid.server.logs import logging_to
from pellucid.server.run import Runner
from pellucid.server.settings import ServerSettings
from tests.support.fake_tokenizer import FakeTokenizer

SECONDS = 180


class FakeEngine:
    """An engine of which nothing is asked but to load and to end.

    Attributes:
        num_shutdowns: how often it was told to end.
    """

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.max_model_len = 100
        self.num_kv_blocks = 3
        self.backend_name = "fake"
        self.spec = SimpleNamespace(vocab_size=self.tokenizer.vocab_size, hidden_size=8)
        self.num_shutdowns = 0
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def end(self) -> None:
        """Ends as if by itself. From any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ended.set)

    async def shutdown(self) -> None:
        self.num_shutdowns += 1
        self._ended.set()

    async def wait_closed(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._ended.wait()


class Outside:
    """What a test does from outside, in a thread: looks at /ready, sends signals."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ready(self) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        status, body = answer.status, json.loads(answer.read())
        connection.close()
        return status, body

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Once the server answers: before that, nobody would take it."""
        self.ready()
        os.kill(os.getpid(), number)


def serve(
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[Any], Any],
    outside: Callable[[Outside], None],
    *,
    closing_seconds: float = SECONDS,
    **settings: Any,
) -> tuple[int, Runner, str]:
    """A server whose engine comes from `load(progress)`, while `outside` runs. Exit code, runner and log.

    Args:
        closing_seconds: how long it waits for what can be stopped.
    """
    monkeypatch.setattr(loading, "AsyncEngine", lambda model, *, progress, **_: load(progress))
    monkeypatch.setattr(run, "CLOSING_SECONDS", closing_seconds)
    log = io.StringIO()
    failed: list[BaseException] = []

    def act(port: int) -> None:
        try:
            outside(Outside(port))
        except BaseException as error:
            failed.append(error)
            Outside(port).signal()

    with logging_to(log, "info", "text"), frozen_garbage_forgotten():
        listener = bind("127.0.0.1", 0)
        runner = Runner(ServerSettings(port=0, model="m", **settings), listener)
        thread = threading.Thread(target=act, args=(listener.getsockname()[1],))
        thread.start()
        code = asyncio.run(runner.run())
        thread.join()
    if failed:
        raise failed[0]
    return code, runner, log.getvalue()


@contextmanager
def frozen_garbage_forgotten() -> Iterator[None]:
    """What a server in a process of its own does to the garbage collector is taken back."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def until(condition: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not come about")


def test_it_answers_while_the_model_loads_and_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    step, go = threading.Barrier(2, timeout=SECONDS), threading.Event()

    def load(progress: Any) -> FakeEngine:
        for stage, done, total in (("wait", 0, None), ("download", 5, 10), ("extract", 10, 10)):
            progress(stage, done, total)
            step.wait()
            step.wait()
        go.wait(SECONDS)
        return FakeEngine()

    seen: list[Any] = []

    def outside(server: Outside) -> None:
        for _ in range(3):
            step.wait()
            status, body = server.ready()
            assert status == 503
            seen.append((body["state"], body["progress"]))
            step.wait()
        go.set()
        until(lambda: server.ready()[0] == 200)
        seen.append(server.ready()[1]["state"])
        server.signal()

    code, _, log = serve(monkeypatch, load, outside)
    assert code == 0
    assert seen == [
        ("loading", {"stage": "wait", "done": 0, "total": 0}),
        ("loading", {"stage": "download", "done": 5, "total": 10}),
        ("loading", {"stage": "load", "done": 0, "total": 0}),
        "ready",
    ]
    assert "info fetching the model stage=download done=5 total=10" in log
    assert "model=m max_model_len=100 kv_blocks=3 backend=fake" in log
    assert "Got SIGTERM" in log


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ModelFileError("no such tensor"), 2, "no such tensor"),
        (FileNotFoundError(2, "No such file", "m.gguf"), 2, "[Errno 2] No such file: 'm.gguf'"),
        (MemoryError(), 2, "out of memory"),
        (ZeroDivisionError("a defect"), 1, "internal error"),
    ],
)
def test_a_model_that_does_not_load_ends_the_server_which_tells_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, reason: str
) -> None:
    asked, go = threading.Event(), threading.Event()
    monkeypatch.setattr(run, "FAILURE_SECONDS", SECONDS)  # the signal ends it

    def load(progress: Any) -> FakeEngine:
        go.wait(SECONDS)
        raise error

    def outside(server: Outside) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server._port, timeout=SECONDS)
        connection.request("GET", "/health")
        connection.getresponse().read()
        go.set()
        until(lambda: server.ready()[1]["state"] == "failed")
        status, body = server.ready()
        assert status == 503
        assert reason in body["error"]
        asked.set()
        connection.close()
        server.signal()

    result, runner, log = serve(monkeypatch, load, outside)
    assert asked.is_set()
    assert result == code
    assert reason in log
    assert "a defect" not in log
    assert not runner.must_abandon_threads


def test_a_parser_that_does_not_exist_ends_the_server_and_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    code, _, log = serve(monkeypatch, lambda progress: engine, lambda server: None, tool_call_parser="nonsense")
    assert code == 2
    assert "the model cannot be loaded: tool_call_parser must be one of auto, none, " in log
    assert engine.num_shutdowns == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_download(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int) -> None:
    ended = threading.Event()

    def load(progress: Any) -> FakeEngine:
        waited = threading.Event()
        try:
            for done in range(SECONDS * 100):
                progress("download", done, 10**9)
                waited.wait(0.01)
        finally:
            ended.set()
        raise AssertionError("it went on")

    result, runner, log = serve(monkeypatch, load, lambda server: server.signal(number))
    assert result == code
    assert ended.is_set()
    assert not runner.must_abandon_threads
    assert "cannot be loaded" not in log


def test_what_cannot_be_stopped_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def load(progress: Any) -> None:
        go.wait(SECONDS)

    result, runner, _ = serve(monkeypatch, load, lambda server: server.signal(), closing_seconds=0.1)
    go.set()
    assert result == 0
    assert runner.must_abandon_threads


def test_an_engine_that_comes_too_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeEngine] = []
    go = threading.Event()
    stopping = threading.Event()

    async def end(self: loading.Loading, seconds: float) -> bool:
        stopping.set()
        return await original(self, seconds)

    original = loading.Loading.end
    monkeypatch.setattr(loading.Loading, "end", end)

    def load(progress: Any) -> FakeEngine:
        go.set()
        stopping.wait(SECONDS)
        engines.append(FakeEngine())
        return engines[0]

    def outside(server: Outside) -> None:
        go.wait(SECONDS)
        server.signal()

    assert serve(monkeypatch, load, outside)[0] == 0
    assert engines[0].num_shutdowns == 1


def test_an_engine_that_ends_by_itself_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()

    def outside(server: Outside) -> None:
        until(lambda: server.ready()[0] == 200)
        engine.end()

    code, _, log = serve(monkeypatch, lambda progress: engine, outside)
    assert code == 1
    assert "The engine has ended" in log


def test_an_address_that_others_reach_is_warned_of() -> None:
    log = io.StringIO()

    async def start(settings: ServerSettings) -> None:
        with logging_to(log, "info", "text"):
            Runner(settings, bind(settings.host, 0))._warn_of_open_door()

    asyncio.run(start(ServerSettings(host="127.0.0.1")))
    asyncio.run(start(ServerSettings(host="0.0.0.0", api_keys=["key"])))  # type: ignore[arg-type]
    assert log.getvalue() == ""
    asyncio.run(start(ServerSettings(host="0.0.0.0")))
    assert "--api-key" in log.getvalue()


def test_threads_take_short_turns_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the event loop need not wait for the parsers of long bodies."""
    usual = sys.getswitchinterval()
    found: list[float] = []

    async def note(self: Runner) -> int:
        found.append(sys.getswitchinterval())
        return 0

    monkeypatch.setattr(Runner, "run", note)
    assert run.serve(resolve({"port": "0"}, {})) == 0
    assert found == [pytest.approx(run.TURN_SECONDS)]
    assert run.TURN_SECONDS < usual == sys.getswitchinterval()
