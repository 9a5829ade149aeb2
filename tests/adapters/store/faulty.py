"""A server between a store and a real Redis that does what a test says: refuse, hold back, delay, or talk nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum

from tests.e2e.net import LOOPBACK, Address


class Fault(StrEnum):
    """What happens to what the server says."""

    NONE = "none"
    SILENT = "silent"  # connections are taken and nothing ever answers: a black hole
    SLOW = "slow"  # each answer 2 s late
    GARBAGE = "garbage"
    CLOSE = "close"  # the connection ends as soon as something is asked


SLOW_S = 2.0


class FaultyProxy:
    """Passes on to `server`; `fault` may be changed at any time and holds for what is said from then on."""

    def __init__(self, server: Address) -> None:
        self.fault = Fault.NONE
        self.connections = 0
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._listening = await asyncio.start_server(self._serve, LOOPBACK, self.port)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and end those that there are."""
        assert self._listening is not None
        self._listening.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        there = None
        try:
            there = await asyncio.open_connection(*self._server)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, there[1], answers=False))
                group.create_task(self._pass_on(there[0], writer, answers=True))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            if there is not None:
                there[1].close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        while octets := await reader.read(65536):
            match self.fault:
                case Fault.SILENT:
                    continue
                case Fault.SLOW if answers:
                    await asyncio.sleep(SLOW_S)
                case Fault.GARBAGE if answers:
                    octets = b"\xff\x00 garbage\r\n" * 3
                case Fault.CLOSE if not answers:
                    break
                case _:
                    pass
            writer.write(octets)
            await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def faulty_proxy(server: Address) -> AsyncIterator[FaultyProxy]:
    """One in front of a server, stopped at the end."""
    proxy = FaultyProxy(server)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
