"""loop_lag: a loop that is kept busy is seen to be late."""

from __future__ import annotations

import asyncio
import time

from gateway.adapters.loop_lag import LoopLag
from tests.fakes import FakeMetrics


class Told(list[float]):
    """Observations, the next of which somebody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.came = asyncio.Event()

    def append(self, amount: float) -> None:
        super().append(amount)
        self.came.set()

    async def next(self) -> float:
        async with asyncio.timeout(20):
            await self.came.wait()
        self.came.clear()
        return self[-1]


async def test_a_loop_that_is_kept_busy_is_late() -> None:
    metrics, seen = FakeMetrics(), Told()
    metrics.observed["mxgate_loop_lag_seconds",] = seen
    lag = LoopLag(metrics)
    lag.start()
    time.sleep(0.6)  # noqa: ASYNC251  # it is what is looked for
    # due after a quarter of a second
    assert await seen.next() >= 0.3
    await seen.next()
    lag.stop()
    count = len(seen)
    await asyncio.sleep(0.3)  # longer than it takes to the next one
    assert len(seen) == count
