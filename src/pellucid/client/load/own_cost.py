"""What measuring costs: a client that is busy itself sees what comes later than it came."""

from __future__ import annotations

import asyncio
import time

from pellucid.client.load.percentiles import percentile

INTERVAL_SECONDS = 0.02


class OwnCost:
    """The lag of this event loop, and the processor time of this process, while it is entered.

    The lag of a moment is how much later than it should a timer goes off: because the loop was busy, or because the
    process had no processor.
    """

    def __init__(self) -> None:
        self._lags: list[float] = []
        self.cpu_seconds = 0.0
        self.seconds = 0.0

    def __enter__(self) -> OwnCost:
        self._loop = asyncio.get_running_loop()
        self._cpu_start, self._start = time.process_time(), time.perf_counter()
        self._due = self._loop.time()
        self._expect()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.cpu_seconds = time.process_time() - self._cpu_start
        self.seconds = time.perf_counter() - self._start

    def _expect(self) -> None:
        self._due = self._loop.time() + INTERVAL_SECONDS
        self._timer = self._loop.call_at(self._due, self._note)

    def _note(self) -> None:
        self._lags.append(max(0.0, self._loop.time() - self._due))
        self._expect()

    @property
    def lag_p99(self) -> float:
        """99th percentile of the lag, in seconds; 0 before the first look."""
        return percentile(sorted(self._lags), 0.99) if self._lags else 0.0
