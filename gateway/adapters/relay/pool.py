"""The connections to one host: idle ones are reused, the last first; how many there are is bounded.

Who must wait waits in order. A connection that `take` or `acquire` gave belongs to the caller until `release`,
`reset` or `discard`. Every transaction may use every connection, as identity "none" (and later xforward) allows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import NoConnectionError, Opener
from gateway.adapters.relay.settings import RelaySettings
from gateway.services import Clock, Gauge, Histogram
from gateway.smtp.client import RSET, After, ServerReply

# DESIGN.md section 6. MTAs slow down or close after so many errors (Postfix: smtpd_soft_error_limit 10) and so many
# commands without mail (Postfix: smtpd_junk_command_limit 100; each verification is a RSET).
_MAX_REFUSALS = 8
_MAX_VERIFICATIONS = 50
# Exim's smtp_accept_max_per_connection is 1000 MAIL commands, then it says 421.
_MAX_TRANSACTIONS = 500
# Postfix's own client (smtp_connection_reuse_time_limit): changes of names and balancers take effect.
_MAX_AGE_S = 300.0


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """What a pool reports; bound to its route."""

    in_use: Gauge
    idle: Gauge
    connect_s: Histogram


class Pool:
    """At most `max_connections_per_host` connections, those that are being opened included.

    `learn` is called with each connection that was opened, before it is used.
    """

    def __init__(
        self,
        opener: Opener,
        settings: RelaySettings,
        clock: Clock,
        metrics: PoolMetrics,
        learn: Callable[[Connection], None],
    ) -> None:
        self._opener = opener
        self._reply_timeout_s = settings.reply_timeout_s
        self._idle_timeout_s = settings.idle_timeout_s
        self._max_slots = settings.max_connections_per_host
        self._clock = clock
        self._metrics = metrics
        self._learn = learn
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()
        # connections, and permissions to open one
        self._slots = 0
        # each gets a connection, or None: a slot to open one
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._is_closed = False

    # --- getting one -----------------------------------------------------------------------------

    def take(self) -> Connection | None:
        """An idle connection that still lives, without waiting; None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            self._metrics.idle.dec()
            if connection.wake():
                self._metrics.in_use.inc()
                self._used.add(connection)
                return connection
            connection.abort()
            self._free_slot()
        return None

    async def acquire(self, deadline: float, *, fresh: bool = False) -> Connection:
        """An idle connection or a new one, waiting for a slot until `deadline`. Raises NoConnectionError.

        `fresh`: none that has been idle, unless it was handed over by a user who has just finished with it.
        """
        if not fresh and (connection := self.take()) is not None:
            return connection
        if self._is_closed:
            raise NoConnectionError("busy", "shutting down")
        if self._slots < self._max_slots:
            self._slots += 1
        elif self._idle:
            # the one that idled longest makes room, its slot is ours
            self._metrics.idle.dec()
            self._idle.pop(0).quit()
        elif (connection := await self._wait(deadline)) is not None:
            return connection
        return await self._open(deadline)

    async def _wait(self, deadline: float) -> Connection | None:
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                return await waiter
        except BaseException as exc:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # it was served in the very moment in which its caller gave up
                self._pass_on(waiter.result())
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(exc, TimeoutError):
                raise NoConnectionError("busy", f"all {self._max_slots} connections are in use") from exc
            raise

    async def _open(self, deadline: float) -> Connection:
        started = self._clock.monotonic()
        try:
            connection = await self._opener.open(deadline, self._idle_ended)
        except BaseException:
            self._free_slot()
            raise
        self._metrics.connect_s.observe(self._clock.monotonic() - started)
        self._metrics.in_use.inc()
        self._used.add(connection)
        connection.pool = self
        self._learn(connection)
        return connection

    # --- giving it back --------------------------------------------------------------------------

    def give_back(self, connection: Connection, after: After) -> None:
        """It comes back in the state that the dialogue left."""
        match after:
            case After.REUSE:
                self.release(connection)
            case After.RESET:
                self.reset(connection)
            case After.CLOSE:
                self.discard(connection)
            case _:
                assert_never(after)

    def release(self, connection: Connection) -> None:
        """It is ready for MAIL again; retired when it has been used enough."""
        if connection not in self._used:
            return
        connection.is_reused = True
        now = connection.loop.time()
        is_worn = (
            connection.transactions >= _MAX_TRANSACTIONS
            or connection.verifications >= _MAX_VERIFICATIONS
            or connection.refusals >= _MAX_REFUSALS
            or now - connection.opened_at >= _MAX_AGE_S
        )
        is_usable = not (is_worn or connection.trouble or self._is_closed)
        if is_usable and self._waiters and (waiter := self._next_waiter()) is not None:
            waiter.set_result(connection)
            return
        self._used.discard(connection)
        self._metrics.in_use.dec()
        if not is_usable:
            connection.quit()
            self._free_slot()
        else:
            self._idle.append(connection)
            self._metrics.idle.inc()
            connection.rest(now + self._idle_timeout_s)

    def reset(self, connection: Connection) -> None:
        """A transaction may be open on it: RSET, and the release is when that is answered; nobody waits for it."""
        deadline = connection.loop.time() + self._reply_timeout_s

        def answered(future: asyncio.Future[list[ServerReply]]) -> None:
            if not future.cancelled() and future.result() and future.result()[0].is_ok:
                self.release(connection)
            else:
                self.discard(connection)

        connection.exchange(RSET, 1, deadline).add_done_callback(answered)

    def discard(self, connection: Connection) -> None:
        """It is of no use any more: closed at once, and without a dot if content was under way."""
        if connection in self._used:
            self._used.discard(connection)
            self._metrics.in_use.dec()
            connection.abort()
            self._free_slot()

    def close(self) -> None:
        """Idle connections quit, waiting callers get NoConnectionError, used ones quit when they are released."""
        self._is_closed = True
        while self._idle:
            self._metrics.idle.dec()
            self._idle.pop().quit()
            self._slots -= 1
        while (waiter := self._next_waiter()) is not None:
            waiter.set_exception(NoConnectionError("busy", "shutting down"))

    def abort(self) -> None:
        """Close every connection, whoever uses it."""
        self.close()
        for connection in tuple(self._used):
            self.discard(connection)

    # --- inside ----------------------------------------------------------------------------------

    def _idle_ended(self, connection: Connection) -> None:
        self._idle.remove(connection)
        self._metrics.idle.dec()
        connection.quit()
        self._free_slot()

    def _free_slot(self) -> None:
        waiter = self._next_waiter()
        if waiter is None:
            self._slots -= 1
        else:
            waiter.set_result(None)

    def _pass_on(self, served: Connection | None) -> None:
        if served is None:
            self._free_slot()
        else:
            self.release(served)

    def _next_waiter(self) -> asyncio.Future[Connection | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None
