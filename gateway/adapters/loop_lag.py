"""How late the event loop is: each quarter of a second a timer says how long it had to wait for its turn.

What waits for the loop are all sessions of the worker: a policy that computes for a long time is seen here, and so is
a machine without a core to spare.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.services import Metrics

_EVERY_S = 0.25
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class LoopLag:
    """Observes the running loop from `start` to `stop`."""

    def __init__(self, metrics: Metrics) -> None:
        self._lag = metrics.histograms(
            "mxgate_loop_lag_seconds",
            "Seconds that a timer waited for its turn in a worker's event loop, looked at four times a second",
            (),
            _BUCKETS,
        ).labels()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on."""
        due = time.monotonic() + _EVERY_S
        self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self._look, due)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, due: float) -> None:
        # uvloop's timers may fire up to a millisecond early
        self._lag.observe(max(0.0, time.monotonic() - due))
        self.start()
