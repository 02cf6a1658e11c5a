"""A fake backend whose forwards take place when a test lets them, and fail as it says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from pellucid.core.batch import ForwardBatch, ForwardOutput
from tests.support.fake_backend import FakeBackend


class GatedBackend(FakeBackend):
    """A forward takes place when it is let: `let(n)` lets n more, `open()` all.

    Attributes:
        arrivals: one for each forward that has come to the gate while it was closed.
        spoil: called with every batch and what came of it, which it may change; what it raises, the forward raises.
        tokens_seen: all that were computed so far.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._gate = threading.Semaphore(0)
        self._is_open = True
        self.arrivals = threading.Semaphore(0)
        self.spoil: Callable[[ForwardBatch, ForwardOutput], None] | None = None
        self.tokens_seen: set[int] = set()

    def close_gate(self) -> None:
        self._is_open = False

    def let(self, count: int) -> None:
        for _ in range(count):
            self._gate.release()

    def open(self) -> None:
        self._is_open = True
        self.let(1)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        if not self._is_open:
            self.arrivals.release()
            self._gate.acquire()
        self.tokens_seen.update(batch.input_ids.tolist())
        output = super().forward(batch)
        if self.spoil is not None:
            self.spoil(batch, output)
        return output

    async def arrived(self) -> None:
        """A forward has come to the gate: all steps before it are done."""
        await asyncio.to_thread(self.arrivals.acquire)
