"""How late an event loop gets to what is due."""

from __future__ import annotations

import asyncio

from pellucid.server.metrics.histogram import Histogram

INTERVAL_SECONDS = 0.1


class EventLoopLag:
    """Looks ten times a second how late a timer of the running loop fires, for as long as `async with` lasts."""

    def __init__(self, lag_seconds: Histogram) -> None:
        self._lag_seconds = lag_seconds
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> EventLoopLag:
        self._wait(asyncio.get_running_loop())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._timer is not None
        self._timer.cancel()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + INTERVAL_SECONDS
        self._timer = loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._lag_seconds.observe(max(0.0, loop.time() - due))
        self._wait(loop)
