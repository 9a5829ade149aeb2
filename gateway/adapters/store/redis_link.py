"""One shared connection to a Redis server: questions leave at once, and replies come in their order.

What is asked while several questions are under way goes out together. So any number of them at once costs few writes
and about one round trip, and each a few microseconds; a pool of connections with a round trip for each question costs
ten times as much (docs/adr/0010-store.md).

Nothing is sent twice: when a connection breaks, what was under way is answered with the error, since nobody knows
whether the server had it. The next question opens a new connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from gateway.store import StoreError

T = TypeVar("T")

Reply: TypeAlias = Any
"""What the server answered, a ResponseError among it; or the StoreError that kept it from answering."""

# TCP, TLS, authentication, and asking sentinels before that: longer than a command may take.
CONNECT_TIMEOUT_S = 1.0
# Timers of uvloop may fire up to one turn of its clock (1 ms) early, and its clock stands still meanwhile.
_EARLY_S = 0.002
# So many commands leave as they come; what is asked while they are under way leaves as one write
_AT_ONCE = 8
_NOTHING = object()


class Link:
    """A connection that `make` makes, opened when something is asked, with `timeout_s` for each command.

    The connection has no `socket_timeout` of its own: it is not read by a task, which could be timed.
    `reason` says in one word what an exception of the library means.
    """

    def __init__(
        self,
        make: Callable[[], AbstractConnection],
        reason: Callable[[BaseException], str],
        *,
        timeout_s: float,
    ) -> None:
        self._make = make
        self._reason = reason
        self._timeout_s = timeout_s
        self._wire: _Wire | None = None
        self._waiting: list[tuple[bytes, asyncio.Future[Reply]]] = []  # for a connection
        self._opening: asyncio.Task[None] | None = None

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    def send(self, command: bytes) -> Awaitable[Reply]:
        """The reply to come to a command as `packed` makes it; it is never an exception that is raised."""
        answer: asyncio.Future[Reply] = self._loop.create_future()
        if self._wire is not None and not self._wire.is_over:
            self._wire.ask(command, answer)
        else:
            self._waiting.append((command, answer))
            if self._opening is None:
                self._opening = self._loop.create_task(self._open())
        return answer

    async def close(self) -> None:
        """What is under way is answered with an error."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._wire is not None:
            self._wire.fail(StoreError("connect", "closed"))
            await self._leave()

    def renew(self) -> None:
        """What is asked from now on is asked on another connection."""
        if self._wire is not None:
            self._wire.is_over = True

    async def _open(self) -> None:
        """Open a connection for those who wait for one; there is none that could be used."""
        failure = StoreError("connect", "closed")
        try:
            await self._leave()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = self._make()
                try:
                    await connection.connect()  # type: ignore[no-untyped-call]
                except BaseException:
                    await connection.disconnect(nowait=True)
                    raise
            self._wire = _Wire(connection, self._reason, self._timeout_s, self._loop)
        except Exception as exc:  # noqa: BLE001 - to garbage the library answers with whatever it trips over
            failure = StoreError(self._reason(exc), str(exc))
        finally:
            self._opening = None
            waiting, self._waiting = self._waiting, []
            for command, answer in waiting:
                # a caller that is out of time has gone
                if answer.done():
                    continue
                if self._wire is None:
                    answer.set_result(failure)
                else:
                    self._wire.ask(command, answer)

    async def _leave(self) -> None:
        """Give the connection up, when it has answered what it was asked."""
        if self._wire is not None:
            await self._wire.close()
            self._wire = None


class _Wire(asyncio.Protocol):
    """A connection that is open: commands leave, and replies are for who waits longest.

    The library has opened it and reads the replies out of what arrives; its streams, with a turn of the loop for each
    step, are left out. `is_over`: nothing more is to be asked here.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        reason: Callable[[BaseException], str],
        timeout_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # The library has no other way to the octets of a connection that it has opened.
        stream, writer = connection._reader, connection._writer  # noqa: SLF001
        assert stream is not None
        assert writer is not None
        self.is_over = False
        self._connection = connection
        self._reason = reason
        self._timeout_s = timeout_s
        self._loop = loop
        self._stream = stream
        self._transport = writer.transport
        self._unsent: list[bytes] = []
        self._pending: deque[tuple[float, asyncio.Future[Reply]]] = deque()
        self._reading: Coroutine[Any, Any, Reply] | None = None  # of a reply that has not arrived as a whole
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._transport.set_protocol(self)

    def ask(self, command: bytes, answer: asyncio.Future[Reply]) -> None:
        """Send a command; its reply, or why there is none, becomes the result of `answer`."""
        self._pending.append((self._loop.time() + self._timeout_s, answer))
        if len(self._pending) <= _AT_ONCE:
            self._transport.write(command)
        else:
            self._unsent.append(command)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._on_timer)

    def fail(self, failure: StoreError) -> None:
        """Answer all who wait with this; the first one counts. What a broken connection says belongs to nobody."""
        self.is_over = True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        self._unsent.clear()
        while self._pending:
            self._answer(failure)

    async def close(self) -> None:
        """Close it when nobody waits any more."""
        self.is_over = True
        if self._pending:
            self._drained = self._loop.create_future()
            await self._drained
        self.fail(StoreError("connect", "closed"))
        await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        try:
            self._stream.feed_data(data)
            while self._pending and (reply := self._read()) is not _NOTHING:
                self._answer(reply)
            if self._unsent:
                self._transport.write(b"".join(self._unsent))
                self._unsent.clear()
            # what nobody asked for would be taken for the reply to what is asked next
            if not self._pending and _done(self._connection.can_read()):
                self.is_over = True
        except Exception as exc:  # noqa: BLE001 - as when a connection is opened
            self.fail(StoreError(self._reason(exc), str(exc)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(StoreError("connect", str(exc or "closed by the server")))

    def _answer(self, reply: Reply) -> None:
        _, answer = self._pending.popleft()
        if not answer.done():
            answer.set_result(reply)
        if self._drained is not None and not self._pending and not self._drained.done():
            self._drained.set_result(None)

    def _read(self) -> Reply:
        """The next reply, _NOTHING while it has not arrived as a whole."""
        reading = self._reading or self._connection.read_response(
            disable_decoding=True, disconnect_on_error=False
        )
        self._reading = None
        try:
            reading.send(None)
        except StopIteration as done:
            return done.value
        except ResponseError as exc:
            return exc
        self._reading = reading
        return _NOTHING

    def _on_timer(self) -> None:
        """A timer that fires for one who has his answer sets itself anew."""
        self._timer = None
        if self._pending:
            left_s = self._pending[0][0] - self._loop.time()
            if left_s <= _EARLY_S:
                self.fail(StoreError("timeout"))
            else:
                self._timer = self._loop.call_later(left_s, self._on_timer)


def _done(coro: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that does not wait for anything."""
    try:
        coro.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coro.close()
    raise RuntimeError("it waits")


def packed(*words: str | bytes | int) -> bytes:
    """A command as the protocol has it (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""
    octets = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(octets) + b"".join([b"$%d\r\n%b\r\n" % (len(each), each) for each in octets])
