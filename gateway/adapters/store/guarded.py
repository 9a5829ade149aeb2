"""The guard around a store that may be slow or out of reach: a deadline, a breaker, and what the operator wants then.

Each question has `timeout_s`. When too many fail the breaker opens: nothing is asked any more, so no mail waits. A
probe each half second then writes beside the keys that failed; as soon as it is answered in time the store is used
again. So an outage of one shard of a cluster, a store that only reads, or one that is full is an outage too.

While a question fails, and while the breaker is open, `[state] on_outage` decides:
- local: the worker's own memory answers, which remembers what went through this worker lately;
- continue, defer: StoreDownError is raised, with what to do with the mail.

The start waits for one probe and then goes on, with or without the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from gateway.adapters.store.local import LocalStore
from gateway.policy import OnError
from gateway.services import Instruments, Metrics, Store
from gateway.store import (
    Add,
    Delete,
    Get,
    NotACounterError,
    Operation,
    Page,
    Put,
    PutIfAbsent,
    Replace,
    StoreDownError,
    StoreError,
    Take,
)

_OPERATIONS: dict[type[Operation[Any]], str] = {
    Get: "get",
    Put: "put",
    PutIfAbsent: "put_if_absent",
    Replace: "replace",
    Add: "add",
    Take: "take",
    Delete: "delete",
}
_REASONS = ("timeout", "connect", "auth", "read_only", "full", "loading", "protocol", "error")
# 0.1 ms and up: memory and a socket on this machine are fast
_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

# Each failure counts 1, each success takes a tenth back: three failures in a row open the breaker, or one in ten.
_OPEN_AT = 3.0
_FORGIVEN = 0.1
PROBE_EVERY_S = 0.5
# The first question of a probe may have to open a connection, authenticate and look for the master.
_PROBE_CONNECT_S = 1.5
_PROBE_TTL_S = 60.0
# Timers of uvloop may fire up to one turn of its clock (1 ms) early, and its clock stands still meanwhile.
_EARLY_S = 0.002
_SCAN_TIMEOUT_S = 5.0  # a page for an operator, not for mail


class StoreMetrics:
    """What is counted about the store. Made in every worker, so that the families are there before the first outage."""

    def __init__(self, metrics: Metrics) -> None:
        operations = metrics.counters(
            "mxgate_store_operations_total",
            "What policies asked of the store, by who answered; local: the worker's own memory in an outage",
            ("operation", "answered_by"),
        )
        self.operations = {
            (kind, by): operations.labels(name, by)
            for kind, name in _OPERATIONS.items()
            for by in ("store", "local", "nobody")
        }
        errors = metrics.counters(
            "mxgate_store_errors_total", "Questions that the store did not answer", ("reason",)
        )
        self.errors = {reason: errors.labels(reason) for reason in _REASONS}
        self.duration = metrics.histograms(
            "mxgate_store_duration_seconds",
            "Seconds from a question to the store's answer or failure",
            (),
            _BUCKETS,
        ).labels()
        self.outage = metrics.gauges(
            "mxgate_store_outage",
            "Workers that do not use the store because it is out of reach: their breaker is open",
        ).labels()


class _Deadlines:
    """What asyncio.timeout() does, for many questions with one timer: to set one for each costs more than to ask."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open: dict[asyncio.Timeout, float] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    def begin(self) -> asyncio.Timeout:
        """An asynchronous context manager: TimeoutError when its time is over before `end`."""
        deadline = asyncio.Timeout(None)
        self._open[deadline] = self._loop.time() + self._timeout_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._expire)
        return deadline

    def end(self, deadline: asyncio.Timeout) -> None:
        """The question has its answer."""
        self._open.pop(deadline, None)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._open:
            deadline, at = next(iter(self._open.items()))
            if now + _EARLY_S < at:
                self._timer = self._loop.call_later(at - now, self._expire)
                return
            del self._open[deadline]
            deadline.reschedule(now)


class GuardedStore:
    """`store` with a deadline and a breaker; `on_outage` is None for `local`. `name` is what log and /readyz call it.

    `probe_prefix` is what the keys of probes begin with.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        timeout_s: float,
        on_outage: OnError | None,
        probe_prefix: str,
        instruments: Instruments,
        metrics: StoreMetrics,
    ) -> None:
        self._store = store
        self._name = name
        self._timeout_s = timeout_s
        self._deadlines = _Deadlines(timeout_s)
        self._on_outage = on_outage
        self._probe_prefix = probe_prefix
        self._clock = instruments.clock.monotonic
        self._log = instruments.log
        self._metrics = metrics
        self._local = LocalStore(self._clock) if on_outage is None else None
        self._failures = 0.0
        self._failed_keys: tuple[str, ...] = ("",)
        self._last_error = ""
        self._down_since = 0.0
        self._probing: asyncio.Task[None] | None = None  # the breaker is open while it runs

    async def start(self) -> None:
        """Ask once; where that fails the worker starts in an outage."""
        try:
            await self._probe()
        except (StoreError, TimeoutError) as exc:
            self._open(_reason(exc), str(exc))

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])

    def state(self) -> Mapping[str, object]:
        """What /readyz shows of it."""
        return {"kind": self._name, "up": self._probing is None, "last_error": self._last_error}

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if self._probing is not None:
            return self._without(operations, self._last_error)
        begun = self._clock()
        try:
            async with self._deadlines.begin() as deadline:
                try:
                    answers = await self._store.run(operations)
                finally:
                    self._deadlines.end(deadline)
        except NotACounterError:
            self._failures = max(0.0, self._failures - _FORGIVEN)
            raise
        except (StoreError, TimeoutError) as exc:
            self._metrics.duration.observe(self._clock() - begun)
            self._note_failure(exc, operations)
            return self._without(operations, _reason(exc))
        self._metrics.duration.observe(self._clock() - begun)
        if self._failures:
            self._failures = max(0.0, self._failures - _FORGIVEN)
        for operation, answer in zip(operations, answers, strict=True):
            self._metrics.operations[type(operation), "store"].inc()
            if self._local is not None:
                self._local.note(operation, answer)
        return answers

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        """Of the store itself only: in an outage StoreError is raised in every mode."""
        if self._probing is not None:
            raise StoreError(self._last_error)
        try:
            async with asyncio.timeout(_SCAN_TIMEOUT_S):
                return await self._store.scan(prefix, cursor, limit)
        except TimeoutError as exc:
            raise StoreError("timeout") from exc

    def _without(self, operations: Sequence[Operation[Any]], reason: str) -> Sequence[Any]:
        by = "nobody" if self._local is None else "local"
        for operation in operations:
            self._metrics.operations[type(operation), by].inc()
        if self._local is not None:
            return [self._local.do(each) for each in operations]
        assert self._on_outage is not None
        raise StoreDownError(reason, self._on_outage)

    # --- the breaker ----------------------------------------------------------------------------------

    def _note_failure(self, exc: StoreError | TimeoutError, operations: Sequence[Operation[Any]]) -> None:
        reason = _reason(exc)
        self._metrics.errors[reason].inc()
        self._failures += 1
        self._failed_keys = tuple(each.key for each in operations)
        if self._failures >= _OPEN_AT and self._probing is None:
            self._open(reason, str(exc))

    def _open(self, reason: str, error: str) -> None:
        self._last_error = reason
        self._down_since = self._clock()
        self._metrics.outage.set(1)
        on_outage = "local" if self._on_outage is None else self._on_outage
        self._log.warning("store.down", store=self._name, reason=reason, error=error, on_outage=on_outage)
        self._probing = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        is_down = True
        while is_down:
            await asyncio.sleep(PROBE_EVERY_S)
            with suppress(StoreError, TimeoutError):
                await self._probe()
                is_down = False
        self._probing = None
        self._failures = 0.0
        self._last_error = ""
        self._metrics.outage.set(0)
        duration_ms = round((self._clock() - self._down_since) * 1000)
        self._log.info("store.up", store=self._name, duration_ms=duration_ms)

    async def _probe(self) -> None:
        """Write beside the keys that failed: in the slots of a cluster that they are in. Twice, as mail would ask."""
        # https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags
        keys = [f"{self._probe_prefix}probe:{{{key}}}" for key in self._failed_keys]
        operations = [Put(key, b"", _PROBE_TTL_S) for key in keys]
        for timeout_s in (max(_PROBE_CONNECT_S, self._timeout_s), self._timeout_s):
            async with asyncio.timeout(timeout_s):
                await self._store.run(operations)


def _reason(exc: StoreError | TimeoutError) -> str:
    return exc.reason if isinstance(exc, StoreError) else "timeout"
