"""Loads the model in a thread while the server answers already."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.logs import fields, logger
from pellucid.server.serving import Serving

LOG_SECONDS = 5.0
"""How often at most a download is logged."""


class _StoppedError(Exception):
    """Nobody wants the model any more."""


class Loading:
    """The model of `serving` on its way into memory; `progress` of `serving` tells how far it is.

    Attributes:
        engine: is done with the engine, or with why there is none.
    """

    def __init__(self, serving: Serving) -> None:
        self.engine: asyncio.Future[AsyncEngine] = asyncio.get_running_loop().create_future()
        self._serving = serving
        self._is_stopped = False
        self._last_logged = ("", 0.0)
        self._thread = threading.Thread(target=self._load, name="pellucid-loading", daemon=True)
        self._thread.start()

    async def end(self, seconds: float) -> bool:
        """End the engine, which aborts its requests, or the loading of it: a download at once, while what is being read
        is read to the end.

        Returns:
            Whether that has ended within `seconds`.
        """
        self._is_stopped = True
        await asyncio.wait((self.engine,), timeout=seconds)
        if not self.engine.done():
            return False
        if not self.engine.cancelled() and self.engine.exception() is None:
            await self.engine.result().shutdown()
        return True

    def _load(self) -> None:
        settings = self._serving.settings
        try:
            self._serving.progress.stage = "load"
            engine = AsyncEngine(settings.model, progress=self._note, **settings.engine_options())
        except BaseException as error:
            self._tell(None, error)
        else:
            self._tell(engine, None)

    def _tell(self, engine: AsyncEngine | None, error: BaseException | None) -> None:
        def tell() -> None:
            if engine is not None:
                self.engine.set_result(engine)
            elif error is not None:
                self.engine.set_exception(error)

        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.engine.get_loop().call_soon_threadsafe(tell)

    def _note(self, stage: str, done: int, total: int | None) -> None:
        if self._is_stopped:
            raise _StoppedError
        progress = self._serving.progress
        progress.stage, progress.done, progress.total = stage, done, total or 0
        if stage == "extract" and done == total:  # nothing is told of what follows
            progress.stage, progress.done, progress.total = "load", 0, 0
        logged, when = self._last_logged
        if stage != logged or time.monotonic() - when >= LOG_SECONDS:
            self._last_logged = stage, time.monotonic()
            logger.info("fetching the model", extra=fields(stage=stage, done=done, total=total or 0))
