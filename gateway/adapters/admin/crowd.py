"""All connections of the admin port: how many there may be, and what each may cost before it has asked for anything.

Whoever may reach the port may open connections, say nothing, speak slowly or without end. The supervisor owns the
port, so none of that may cost it memory, descriptors, or an answer to the next probe: when there are too many
connections the one that has been idle for longest goes, one that asks for nothing goes after some seconds, and one that
sends much faster than it is answered goes at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

MAX_CONNECTIONS: Final = 100
REQUEST_S: Final = 10.0
"""From the connection to the end of its first request's header."""
MAX_UNANSWERED_BYTES: Final = 256 * 1024
"""What a connection may send before its next request is looked at; a request is at most a few KiB."""
MAX_LIFE_S: Final = 600.0


class Crowd:
    """Counts them all. `admit` wraps what makes a protocol; `middleware` tells of requests."""

    def __init__(self) -> None:
        self._members: OrderedDict[asyncio.BaseTransport, _Member] = OrderedDict()  # the longest idle first

    def admit(self, new: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A factory of protocols whose connections are counted here."""
        return lambda: _Member(self, new())

    def disperse(self) -> None:
        """Cut all that are left."""
        for transport in [*self._members]:
            _cut(transport)

    def joined(self, transport: asyncio.BaseTransport, member: _Member) -> None:
        if len(self._members) >= MAX_CONNECTIONS:
            longest_idle = next(iter(self._members))
            del self._members[longest_idle]
            _cut(longest_idle)
        self._members[transport] = member

    def left(self, transport: asyncio.BaseTransport) -> None:
        self._members.pop(transport, None)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        if transport is not None and (member := self._members.get(transport)) is not None:
            member.has_asked()
            self._members.move_to_end(transport)
        return await handler(request)


class _Member(asyncio.Protocol):
    """One connection, in front of aiohttp's own protocol."""

    def __init__(self, crowd: Crowd, inner: asyncio.Protocol) -> None:
        self._crowd = crowd
        self._inner = inner
        self._unanswered_bytes = 0
        self._timers: list[asyncio.TimerHandle] = []
        self._transport: asyncio.BaseTransport | None = None

    def has_asked(self) -> None:
        """A whole header of a request is here."""
        self._unanswered_bytes = 0
        self._timers[0].cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(after_s, _cut, transport) for after_s in (REQUEST_S, MAX_LIFE_S)]
        self._crowd.joined(transport, self)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        assert self._transport is not None
        self._crowd.left(self._transport)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unanswered_bytes += len(data)
        if self._unanswered_bytes > MAX_UNANSWERED_BYTES:
            assert self._transport is not None
            _cut(self._transport)
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _cut(transport: asyncio.BaseTransport) -> None:
    assert isinstance(transport, asyncio.Transport)
    transport.abort()
