"""One shared connection to a Redis server: whatever is asked while a batch is under way goes out in the next one.

So any number of questions at once costs one write and about one round trip, and each a few microseconds; a pool of
connections with a round trip for each question costs ten times as much (docs/adr/0010-store.md).

Nothing is sent twice: when a connection breaks, what was under way is answered with the error, since nobody knows
whether the server had it. The next batch opens a new connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from gateway.store import StoreError

Reply: TypeAlias = Any
"""What the server answered, a ResponseError among it; or the StoreError that kept it from answering."""

_BATCH = 512  # commands
# TCP, TLS, authentication, and asking sentinels before that: longer than a command may take.
CONNECT_TIMEOUT_S = 1.0


class Link:
    """A connection that `make` makes, opened when something is asked, with `timeout_s` for each batch.

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
        self._connection: AbstractConnection | None = None
        self._is_stale = False
        self._waiting: list[tuple[bytes, asyncio.Future[Reply]]] = []
        self._task: asyncio.Task[None] | None = None

    def send(self, command: bytes) -> Awaitable[Reply]:
        """The reply to come to a command as `packed` makes it; it is never an exception that is raised."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append((command, answer))
        if self._task is None:
            self._task = loop.create_task(self._work())
        return answer

    async def close(self) -> None:
        """What is under way is answered with an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._disconnect()

    def renew(self) -> None:
        """The next batch opens another connection."""
        self._is_stale = True

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                # a caller that is out of time has gone
                batch = [each for each in batch if not each[1].done()]
                await self._exchange(batch)
        finally:
            self._task = None

    async def _exchange(self, batch: Sequence[tuple[bytes, asyncio.Future[Reply]]]) -> None:
        answered = 0
        failure = StoreError("connect", "closed")
        try:
            connection = await self._connected()
            async with asyncio.timeout(self._timeout_s):
                octets = b"".join([command for command, _ in batch])
                await connection.send_packed_command(octets, check_health=False)
                for _, answer in batch:
                    reply = await _reply(connection)
                    answered += 1
                    if not answer.done():
                        answer.set_result(reply)
        except Exception as exc:  # noqa: BLE001 - to garbage the library answers with whatever it trips over
            failure = StoreError(self._reason(exc), str(exc))
        finally:
            if answered < len(batch):
                await self._disconnect()
                for _, answer in batch[answered:]:
                    if not answer.done():
                        answer.set_result(failure)

    async def _connected(self) -> AbstractConnection:
        """The connection, another one where the server has closed it or said something that nobody asked for."""
        connection = self._connection
        is_good = connection is not None and connection.is_connected and not self._is_stale
        if connection is None or not is_good or await connection.can_read():
            await self._disconnect()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                self._connection = connection = self._make()
                await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def _disconnect(self) -> None:
        self._is_stale = False
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


async def _reply(connection: AbstractConnection) -> Reply:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as exc:
        return exc


def packed(*words: str | bytes | int) -> bytes:
    """A command as the protocol has it (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""
    octets = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(octets) + b"".join([b"$%d\r\n%b\r\n" % (len(each), each) for each in octets])
