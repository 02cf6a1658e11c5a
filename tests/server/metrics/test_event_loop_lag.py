from __future__ import annotations

import asyncio
import time

from pellucid.server.metrics.event_loop_lag import INTERVAL_SECONDS, EventLoopLag
from pellucid.server.metrics.histogram import LAG_SECONDS, Histogram


def test_a_loop_that_is_held_up_is_seen_to_lag() -> None:
    async def hold_up() -> None:
        async with EventLoopLag(lag):
            await asyncio.sleep(0)
            time.sleep(INTERVAL_SECONDS + 0.3)  # the loop can do nothing meanwhile
            while not lag.counts.sum():
                await asyncio.sleep(0)

    lag = Histogram(LAG_SECONDS)
    asyncio.run(hold_up())
    assert lag.sum >= 0.29


def test_nothing_is_looked_at_after_the_end() -> None:
    async def run() -> None:
        async with EventLoopLag(lag) as watch:
            assert watch._timer is not None
            assert not watch._timer.cancelled()
        assert watch._timer.cancelled()

    lag = Histogram(LAG_SECONDS)
    asyncio.run(run())
