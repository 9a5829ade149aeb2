"""The connections to one host: idle ones are reused, the last first; how many there are is bounded.

Who must wait waits in order. A connection that `take` or `acquire` gave belongs to the caller until `release`,
`reset` or `discard`. Where the downstream takes a connection for one client's (XCLIENT, PROXY), it is reused for that
client only, and idle ones of others make room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, assert_never

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import NoConnectionError, Opener
from gateway.adapters.relay.settings import Identity, RelaySettings
from gateway.services import Clock, Gauge, Histogram
from gateway.session import Session
from gateway.smtp.client import RSET, After, ServerReply

# DESIGN.md section 6. MTAs slow down or close after so many errors (Postfix: smtpd_soft_error_limit 10) and so many
# commands without mail (Postfix: smtpd_junk_command_limit 100; each verification is a RSET).
_MAX_REFUSALS = 8
_MAX_VERIFICATIONS = 50
# Exim's smtp_accept_max_per_connection is 1000 MAIL commands, then it says 421.
_MAX_TRANSACTIONS = 500
# Postfix's own client (smtp_connection_reuse_time_limit): changes of names and balancers take effect.
_MAX_AGE_S = 300.0
# Timers of uvloop may fire up to one turn of its clock (1 ms) early, and its clock stands still meanwhile.
_EARLY_S = 0.005

# Whom a connection belongs to where the downstream was told the client; None: to everybody.
_OWNERS: dict[Identity, Callable[[Session], Hashable]] = {
    Identity.XCLIENT: lambda session: (session.client, session.helo, session.esmtp, session.user),
    Identity.PROXY_V2: lambda session: session.client,
}


def refusals_left(connection: Connection) -> int:
    """How many more of its answers may be refusals before it has to retire; at least 1 when it was just got."""
    return _MAX_REFUSALS - connection.refusals


class DismissedError(NoConnectionError):
    """The host went down while its caller waited for one of its connections; another host may serve."""

    def __init__(self) -> None:
        super().__init__("busy", "the host went down")


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """What a pool reports; bound to its host."""

    in_use: Gauge
    idle: Gauge
    waiting: Gauge
    connect_s: Histogram


class Watcher(Protocol):
    """Who wants to know what becomes of the pool's attempts to connect, before anybody else does."""

    def opened(self, connection: Connection) -> None:
        """The host answered."""

    def not_opened(self, trouble: NoConnectionError, *, is_hurried: bool) -> None:
        """It did not. `is_hurried`: the caller's time was up, which may be why."""


class _Waiter(NamedTuple):
    """Gets a connection, or None: a slot to open one."""

    future: asyncio.Future[Connection | None]
    owner: Hashable


class Pool:
    """At most `max_connections_per_host` connections, those that are being opened included."""

    def __init__(
        self,
        opener: Opener,
        settings: RelaySettings,
        identity: Identity,
        clock: Clock,
        metrics: PoolMetrics,
        watcher: Watcher,
    ) -> None:
        self._opener = opener
        self._addresses = opener.addresses
        self._reply_timeout_s = settings.reply_timeout_s
        self._idle_timeout_s = settings.idle_timeout_s
        self._max_slots = settings.max_connections_per_host
        self._owner = _OWNERS.get(identity)
        self._clock = clock
        self._metrics = metrics
        self._watcher = watcher
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()
        # connections, and permissions to open one
        self._slots = 0
        self._waiters: deque[_Waiter] = deque()
        self._is_closed = False

    @property
    def in_use(self) -> int:
        """Connections that somebody uses or opens."""
        return self._slots - len(self._idle)

    @property
    def idle(self) -> int:
        """Connections that nobody uses."""
        return len(self._idle)

    # --- getting one -----------------------------------------------------------------------------

    def take(self, client: Session | None) -> Connection | None:
        """An idle connection that still lives, without waiting; None when there is none for this client."""
        while self._idle:
            connection = self._idle.pop() if self._owner is None else self._pop_own(self._owner_of(client))
            if connection is None:
                return None
            self._metrics.idle.dec()
            if connection.wake():
                self._metrics.in_use.inc()
                self._used.add(connection)
                return connection
            connection.abort()
            self._free_slot()
        return None

    async def acquire(
        self, client: Session | None, deadline: float, *, fresh: bool = False, is_urgent: bool = False
    ) -> Connection:
        """An idle connection or a new one, waiting for a slot until `deadline`. Raises NoConnectionError.

        `client` None is ourselves. `fresh`: none that has been idle, unless it was handed over by a user who has just
        finished with it. `is_urgent`: in front of all who wait.
        """
        if not fresh and (connection := self.take(client)) is not None:
            return connection
        if self._is_closed:
            raise NoConnectionError("busy", "shutting down")
        if self._slots < self._max_slots:
            self._slots += 1
        elif self._idle:
            # the one that idled longest makes room, its slot is ours
            self._metrics.idle.dec()
            self._idle.pop(0).quit()
        elif (connection := await self._wait(client, deadline, is_urgent=is_urgent)) is not None:
            return connection
        return await self._open(client, deadline)

    async def _wait(self, client: Session | None, deadline: float, *, is_urgent: bool) -> Connection | None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), self._owner_of(client))
        (self._waiters.appendleft if is_urgent else self._waiters.append)(waiter)
        self._metrics.waiting.inc()
        try:
            async with asyncio.timeout_at(deadline):
                return await waiter.future
        except BaseException as exc:
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                # it was served in the very moment in which its caller gave up
                self._pass_on(future.result())
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(exc, TimeoutError):
                raise NoConnectionError("busy", f"all {self._max_slots} connections are in use") from exc
            raise
        finally:
            self._metrics.waiting.dec()

    async def _open(self, client: Session | None, deadline: float) -> Connection:
        started = self._clock.monotonic()
        try:
            connection = await self._opener.open(client, deadline, self._idle_ended)
        except NoConnectionError as trouble:
            is_hurried = asyncio.get_running_loop().time() + _EARLY_S >= deadline
            # before the slot is free: who waits for it may have to go elsewhere
            self._watcher.not_opened(trouble, is_hurried=is_hurried)
            self._free_slot()
            raise
        except BaseException:
            self._free_slot()
            raise
        self._metrics.connect_s.observe(self._clock.monotonic() - started)
        self._metrics.in_use.inc()
        self._used.add(connection)
        connection.owner = self._owner_of(client)
        if self._owner is not None and client is None:
            # our own, where each has to be a client's: it retires when it is released
            connection.transactions = _MAX_TRANSACTIONS
        self._watcher.opened(connection)
        return connection

    def _owner_of(self, client: Session | None) -> Hashable:
        return None if self._owner is None or client is None else self._owner(client)

    def _pop_own(self, owner: Hashable) -> Connection | None:
        for position in range(len(self._idle) - 1, -1, -1):
            if self._idle[position].owner == owner:
                return self._idle.pop(position)
        return None

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
        """It is ready for MAIL again; retired when used enough, or when its address is not the host's any more."""
        if connection not in self._used:
            return
        connection.is_reused = True
        now = connection.loop.time()
        is_worn = (
            connection.transactions >= _MAX_TRANSACTIONS
            or connection.verifications >= _MAX_VERIFICATIONS
            or connection.refusals >= _MAX_REFUSALS
            or now - connection.opened_at >= _MAX_AGE_S
            or connection.address not in self._addresses.known
        )
        is_usable = not (is_worn or connection.trouble or self._is_closed)
        if is_usable and self._waiters and (waiter := self._next_waiter(connection.owner)) is not None:
            waiter.set_result(connection)
            return
        self._used.discard(connection)
        self._metrics.in_use.dec()
        if not is_usable or self._waiters:
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

    def dismiss(self) -> None:
        """The host is down: idle connections quit, waiting callers get DismissedError."""
        self._quit_idle()
        self._send_home(DismissedError)

    def close(self) -> None:
        """Idle connections quit, waiting callers get NoConnectionError, used ones quit when they are released."""
        self._is_closed = True
        self._quit_idle()
        self._send_home(lambda: NoConnectionError("busy", "shutting down"))

    def abort(self) -> None:
        """Close every connection, whoever uses it."""
        self.close()
        for connection in tuple(self._used):
            self.discard(connection)

    # --- inside ----------------------------------------------------------------------------------

    def _quit_idle(self) -> None:
        while self._idle:
            self._metrics.idle.dec()
            self._idle.pop().quit()
            self._slots -= 1

    def _send_home(self, error: Callable[[], NoConnectionError]) -> None:
        while self._waiters:
            future = self._waiters.popleft().future
            if not future.done():
                future.set_exception(error())

    def _idle_ended(self, connection: Connection) -> None:
        self._idle.remove(connection)
        self._metrics.idle.dec()
        connection.quit()
        self._free_slot()

    def _free_slot(self) -> None:
        self._drop_gone()
        if self._waiters:
            self._waiters.popleft().future.set_result(None)
        else:
            self._slots -= 1

    def _pass_on(self, served: Connection | None) -> None:
        if served is None:
            self._free_slot()
        else:
            self.release(served)

    def _next_waiter(self, owner: Hashable) -> asyncio.Future[Connection | None] | None:
        """Who waits first, if it is this owner."""
        self._drop_gone()
        if self._waiters and self._waiters[0].owner == owner:
            return self._waiters.popleft().future
        return None

    def _drop_gone(self) -> None:
        while self._waiters and self._waiters[0].future.done():
            self._waiters.popleft()
