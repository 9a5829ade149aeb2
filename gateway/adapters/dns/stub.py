"""Stub: asks name servers by UDP, and by TCP where an answer was cut (RFC 1035 4.2, RFC 7766).

A socket to a server has a source port that the system draws, and serves some questions, each with an id of 16 random
bits (RFC 5452 9.2). It is connected, so the system drops what comes from elsewhere and tells when nobody is there. A
packet that is not the answer, whatever else it is, does not end the wait for the answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from random import SystemRandom
from typing import Any, NamedTuple

from gateway.adapters.dns.message import Heard, Query, query_for, read_message
from gateway.adapters.dns.reply import NoReplyError, Reply
from gateway.lookup import RRType

_QUESTIONS = 32
"""Questions of one socket, before the next one is opened with another source port."""

_TRIES = 3
"""How often a question is sent, at equal parts of its time."""

_MAX_PACKET_BYTES = 4096
"""More than is asked for: who sends somewhat more is read all the same."""

_MAX_CONNECTIONS = 100
_RANDOM = SystemRandom()
_NUMBERS = range(2**16)


class Nameserver(NamedTuple):
    """An IP address and a port."""

    host: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Stub:
    """Asks each of some servers. Made in a running loop; raises OSError for what is no address of a server."""

    def __init__(self, servers: Sequence[Nameserver]) -> None:
        self._loop = asyncio.get_running_loop()
        self._servers = tuple(servers)
        self._addresses = [_address(server) for server in servers]
        self._ports: list[_Port | None] = [None] * len(self._addresses)
        self._connections = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._open: set[_Port] = set()

    async def ask(self, server: int, name: str, rrtype: RRType, timeout_s: float) -> Reply:
        """Ask one server; a question that was lost is sent again. Raises NoReplyError."""
        loop = self._loop
        last = loop.time() + timeout_s
        query = query_for(name, rrtype)
        try:
            heard = await self._by_udp(server, query, timeout_s, edns=True)
            if heard.why == "formerr":
                # RFC 6891 7: a server that does not know EDNS
                heard = await self._by_udp(server, query, last - loop.time(), edns=False)
            if heard.is_cut:
                async with asyncio.timeout_at(last), self._connections:
                    heard = await self._by_tcp(server, query)
        except TimeoutError as exc:
            raise NoReplyError("timeout") from exc
        except (OSError, EOFError) as exc:
            raise NoReplyError("network") from exc
        if heard.reply is None:
            raise NoReplyError(heard.why)
        return heard.reply

    def close(self) -> None:
        """Give up what is under way and close all sockets."""
        for port in list(self._open):
            port.close()

    async def _by_udp(self, server: int, query: Query, timeout_s: float, *, edns: bool) -> Heard:
        port = self._ports[server]
        if port is None or not port.numbers:
            port = self._ports[server] = _Port(self._loop, self._addresses[server], self._open)
        number = port.numbers.pop()
        asking = _Asking(self._loop, port, query, query.wire(number, edns=edns), timeout_s)
        port.asking[number] = asking
        try:
            asking.send()
            return await asking.heard
        finally:
            asking.stop()
            del port.asking[number]
            if not port.numbers and not port.asking:
                port.close()

    async def _by_tcp(self, server: int, query: Query) -> Heard:
        reader, writer = await asyncio.open_connection(*self._servers[server])
        number = _RANDOM.choice(_NUMBERS)
        try:
            wire = query.wire(number)
            # RFC 7766 8: the length and the message in one piece
            writer.write(len(wire).to_bytes(2) + wire)
            while True:
                size_bytes = int.from_bytes(await reader.readexactly(2))
                wire = await reader.readexactly(size_bytes)
                heard = read_message(query, wire) if wire[:2] == number.to_bytes(2) else None
                if heard is not None:
                    return Heard(why="failed") if heard.is_cut else heard
        finally:
            writer.transport.abort()


class _Port:
    """A socket to one server: a source port. `numbers` are the ids that it has left, `asking` who waits, by id."""

    __slots__ = ("_loop", "_open", "_socket", "asking", "numbers")

    def __init__(self, loop: asyncio.AbstractEventLoop, address: _Address, opened: set[_Port]) -> None:
        family, at = address
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(at)
            loop.add_reader(self._socket, self._read)
        except BaseException:
            self._socket.close()
            raise
        self._loop = loop
        self._open = opened
        self.numbers = _RANDOM.sample(_NUMBERS, _QUESTIONS)
        self.asking: dict[int, _Asking] = {}
        opened.add(self)

    def send(self, wire: bytes) -> None:
        """Send a packet, or lose it, as the network might."""
        try:
            self._socket.send(wire)
        except BlockingIOError:
            pass
        except OSError as exc:
            self._fail(exc)

    def close(self) -> None:
        """Close it; who still waits hears of it."""
        self._open.discard(self)
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for asking in self.asking.values():
            asking.end(Heard(why="closed"))

    def _read(self) -> None:
        """Something has arrived. Asked for once more where more may have, which costs less than to be called again."""
        for _ in range(len(self.asking) or 1):
            try:
                wire = self._socket.recv(_MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError as exc:
                self._fail(exc)
                return
            # RFC 5452 9.1: the id first, before anything of a stranger's packet is read
            asking = self.asking.get(int.from_bytes(wire[:2]))
            if asking is not None:
                asking.hear(wire)

    def _fail(self, exc: OSError) -> None:
        """Nobody is there, says the system."""
        for asking in self.asking.values():
            asking.end(exc)


class _Asking:
    """A question that is under way by UDP."""

    __slots__ = ("_every_s", "_left", "_loop", "_port", "_query", "_wire", "heard", "timer")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, port: _Port, query: Query, wire: bytes, timeout_s: float
    ) -> None:
        self._loop = loop
        self._port = port
        self._query = query
        self._wire = wire
        self._left = _TRIES
        self._every_s = timeout_s / _TRIES
        self.heard: asyncio.Future[Heard] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None

    def send(self) -> None:
        """Send it, again and again, and then give up."""
        if not self._left:
            self.end(Heard(why="timeout"))
            return
        self._left -= 1
        self.timer = self._loop.call_later(self._every_s, self.send)
        self._port.send(self._wire)

    def stop(self) -> None:
        """Nobody waits for it any more."""
        if self.timer is not None:
            self.timer.cancel()

    def hear(self, wire: bytes) -> None:
        """A packet with our id."""
        heard = read_message(self._query, wire)
        if heard is not None:
            self.end(heard)

    def end(self, how: Heard | OSError) -> None:
        """It is answered or given up, unless it was before."""
        if self.heard.done():
            return
        if isinstance(how, Heard):
            self.heard.set_result(how)
        else:
            self.heard.set_exception(how)


_Address = tuple[socket.AddressFamily, Any]


def _address(server: Nameserver) -> _Address:
    """As sockets want it, with the zone of an IPv6 address (RFC 4007 11). Raises OSError."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM, flags=flags)
    family, _, _, _, address = found[0]
    return family, address
