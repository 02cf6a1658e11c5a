"""A server from start to end: it listens, loads the model, serves, drains when it is told to stop, and ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pellucid import __version__
from pellucid.core.errors import PellucidError
from pellucid.server.app import create_app
from pellucid.server.config import Config
from pellucid.server.errors import internal_error
from pellucid.server.http.protocol import protocol_class
from pellucid.server.listening import allow_connections, bind, is_loopback, url_of
from pellucid.server.loading import Loading
from pellucid.server.logs import LoopErrorLog, fields, logger, logging_to
from pellucid.server.metrics.event_loop_lag import EventLoopLag
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings

EXIT_BUG = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

CLOSING_SECONDS = 2.0
"""How long aborted requests may take to be told, and connections to close."""
TURN_SECONDS = 0.0005
"""After so long a thread that runs Python lets another one, if one waits."""
FAILURE_SECONDS = 2.0
"""How long a server whose model cannot be loaded stays up for those who are connected, to tell them."""


def serve(config: Config) -> int:
    """Serve until told to stop. Must be called in the main thread.

    Returns:
        The exit code: 0 after SIGTERM, 130 after SIGINT (Ctrl-C), 2 if the model cannot be loaded, 1 if that ran into a
        defect.

    Raises:
        InvalidRequestError: it cannot listen where it should.
    """
    settings = config.settings
    with logging_to(sys.stderr, settings.log_level, settings.log_format), gc_after_loading(), short_turns():
        listener = bind(settings.host, settings.port)
        if settings.log_format == "json":
            logger.info("configuration", extra=fields(version=__version__, options=config.as_dict()))
        else:
            logger.info("Pellucid %s, with this configuration:\n%s", __version__, config.as_toml())
        runner = Runner(settings, listener)
        code = asyncio.run(runner.run(), debug=False)  # else slow callbacks are logged with their arguments
    if runner.must_abandon_threads:
        os._exit(code)  # the interpreter would wait for them, or pull the ground from under them
    return code


@contextmanager
def gc_after_loading() -> Iterator[None]:
    """No garbage collection while a model loads; what is there then is left out of later ones (Runner), so that none
    walks through a vocabulary while tokens wait."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns more often than Python's every 5 ms: the event loop waits for one at each look for what came,
    and a few of these waits in a row would hold up every stream while bodies are parsed."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class WebServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to the Runner."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def web_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    """uvicorn, with everything off that is done here or by nobody."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol_class(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(CLOSING_SECONDS),
    )


class Runner:
    """One server in an event loop.

    Attributes:
        must_abandon_threads: threads still run that cannot be stopped.
    """

    def __init__(self, settings: ServerSettings, listener: socket.socket) -> None:
        self.must_abandon_threads = False
        self._settings = settings
        self._listener = listener
        self._serving = Serving(settings)
        self._web = WebServer(web_config(create_app(self._serving), settings))

    async def run(self) -> int:
        """Serve until a signal comes, or the model turns out not to load. Returns the exit code."""
        async with EventLoopLag(self._serving.metrics.lag_seconds):
            return await self._run(asyncio.get_running_loop())

    async def _run(self, loop: asyncio.AbstractEventLoop) -> int:
        loop.set_exception_handler(LoopErrorLog())
        signals = Signals(loop)
        web = asyncio.create_task(self._web.serve([self._listener]))
        logger.info("Listening on %s", url_of(self._listener))
        self._warn_of_open_door()
        self._warn_of_few_files()
        loading = Loading(self._serving)
        await asyncio.wait((loading.engine, signals.first, web), return_when=asyncio.FIRST_COMPLETED)
        failure = self._take_in(loading) if loading.engine.done() else None
        if failure is None and not signals.first.done():
            failure = await self._serve_until(signals, web)
        if failure is None:
            await self._drain(signals)
        elif self._web.server_state.connections:
            await asyncio.wait((signals.first,), timeout=FAILURE_SECONDS)
        await self._close(web, loading, signals)
        return failure or (EXIT_INTERRUPTED if signals.is_interrupt else 0)

    def _warn_of_open_door(self) -> None:
        """Log it if others than this machine's users get in without a key."""
        if not self._settings.api_keys and not is_loopback(self._listener):
            logger.warning("whoever reaches this address may use the server: --api-key lets in only those with a key")

    def _warn_of_few_files(self) -> None:
        """Log it if the system permits fewer connections than the settings."""
        allowed, wanted = allow_connections(self._settings.max_connections), self._settings.max_connections
        if allowed < wanted:
            logger.warning(
                "the system permits about %d connections, fewer than --max-connections %d: raise the limit of open "
                "files (ulimit -n)",
                max(allowed, 0),
                wanted,
            )

    def _take_in(self, loading: Loading) -> int | None:
        """The model is loaded, or cannot be: then the exit code for that."""
        try:
            engine = loading.engine.result()
            self._serving.set_ready(engine)
        except (PellucidError, OSError, MemoryError) as error:
            reason = error.message if isinstance(error, PellucidError) else str(error) or "out of memory"
            self._serving.set_failed(reason)
            logger.error("the model cannot be loaded: %s", reason)
            return EXIT_REFUSED
        except Exception as defect:
            self._serving.set_failed(str(internal_error(defect)))
            return EXIT_BUG
        gc.freeze()
        gc.enable()
        logger.info(
            "Ready in %.2f s",
            self._serving.load_seconds,
            extra=fields(
                model=self._settings.served_model_names[0],
                max_model_len=engine.max_model_len,
                kv_blocks=engine.num_kv_blocks,
                backend=engine.backend_name,
            ),
        )
        return None

    async def _serve_until(self, signals: Signals, web: asyncio.Task[None]) -> int | None:
        """Returns when a signal has come, or with an exit code when the engine is at its end."""
        engine = asyncio.create_task(self._serving.engine.wait_closed())
        await asyncio.wait((signals.first, web, engine), return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            self._serving.set_failed("the engine has ended; the server ends too, so that it can be started anew")
            logger.error("The engine has ended, which it should not")
            return EXIT_BUG
        engine.cancel()
        return None

    async def _drain(self, signals: Signals) -> None:
        """Let requests finish that were begun, until it takes too long or a second signal comes."""
        self._serving.set_draining()
        deadline = time.monotonic() + self._settings.drain_seconds
        tasks = self._web.server_state.tasks
        if tasks:
            logger.info(
                "Finishing what was begun; a second signal aborts it",
                extra=fields(requests=len(tasks), seconds=self._settings.drain_seconds),
            )
        while tasks and not signals.second.done() and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait((*tasks, signals.second), timeout=left, return_when=asyncio.FIRST_COMPLETED)

    async def _close(self, web: asyncio.Task[None], loading: Loading, signals: Signals) -> None:
        """End what is left: requests are told that they were aborted."""
        tasks = self._web.server_state.tasks
        if tasks:
            logger.warning("Aborting requests", extra=fields(requests=len(tasks)))
        if not await loading.end(CLOSING_SECONDS):
            self.must_abandon_threads = True
        if tasks:
            await asyncio.wait(tuple(tasks), timeout=CLOSING_SECONDS)
        await self._serving.close()
        self._web.should_exit = True
        self._web.force_exit = bool(tasks)
        await web
        self.must_abandon_threads |= signals.second.done()
        logger.info("Stopped")


class Signals:
    """SIGTERM and SIGINT, as they come.

    Attributes:
        first, second: done when so many have come.
        is_interrupt: the first was SIGINT.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        self.is_interrupt = False
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note, number)

    def _note(self, number: signal.Signals) -> None:
        logger.info("Got %s", number.name)
        if not self.first.done():
            self.is_interrupt = number == signal.SIGINT
            self.first.set_result(None)
        elif not self.second.done():
            self.second.set_result(None)
