"""Stub: asks name servers by UDP, and by TCP where an answer was cut (RFC 1035 4.2, RFC 7766).

A socket to a server has a source port that the system draws, and serves some questions, each with an id of 16 random
bits (RFC 5452 9.2). It is connected, so the system drops what comes from elsewhere and tells when nobody is there. A
packet that is not the answer, whatever else it is, does not end the wait for the answer.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gateway.adapters.dns.message import Query, query_for, read_message
from gateway.adapters.dns.reply import Reply
from gateway.lookup import RRType

_QUESTIONS = 32
"""Questions of one socket at most, before the next one is opened with another source port."""

_TRIES = 3
"""How often a question is sent, at equal parts of its time."""

_TICK_S = 0.05
"""How often it is looked for questions that have no answer."""

_MAX_PACKET_BYTES = 4096
"""More than is asked for: who sends somewhat more is read all the same."""

_MAX_CONNECTIONS = 100


class Nameserver(NamedTuple):
    """An IP address and a port."""

    host: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Done = Callable[[Reply | str], None]
"""What is told of a question: the reply, or why there is none (one of FAILURES)."""


class Stub:
    """Asks each of some servers. Made in a running loop; raises OSError for what is no address of a server."""

    def __init__(self, servers: Sequence[Nameserver]) -> None:
        self.loop = asyncio.get_running_loop()
        self.open: set[_Port] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._servers = tuple(servers)
        self._addresses = [_address(server) for server in servers]
        self._ports: list[_Port | None] = [None] * len(self._addresses)
        self._connections = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, server: int, name: str, rrtype: RRType, timeout_s: float, done: Done) -> None:
        """Ask one server; a question that was lost is sent again. `done` is called once, in time, unless it closes."""
        now = self.loop.time()
        self.send(_Asking(self, server, query_for(name, rrtype), now + timeout_s, done), now)

    async def close(self) -> None:
        """Close all sockets; of what is under way nobody hears any more."""
        for port in list(self.open):
            port.close()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, asking: _Asking, now: float) -> None:
        """Send a question by UDP."""
        port = self._ports[asking.server]
        if port is None or not port.numbers:
            try:
                port = self._ports[asking.server] = _Port(self, self._addresses[asking.server])
            except OSError:
                asking.done("network")
                return
        if self._timer is None:
            self._timer = self.loop.call_later(_TICK_S, self._tick)
        asking.begin(port, now)

    def _tick(self) -> None:
        """Send again what was not answered, or give it up. A timer for each question costs as much as its packet."""
        now = self.loop.time()
        try:
            for port in list(self.open):
                port.tick(now)
        finally:
            is_asking = any(port.asking for port in self.open)
            self._timer = self.loop.call_later(_TICK_S, self._tick) if is_asking else None

    def connect(self, asking: _Asking) -> None:
        """Ask by TCP what was cut."""
        task = self.loop.create_task(self._connected(asking))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, asking: _Asking) -> None:
        heard: Reply | str
        try:
            async with asyncio.timeout_at(asking.last), self._connections:
                heard = await _by_tcp(self._servers[asking.server], asking)
        except TimeoutError:
            heard = "timeout"
        except (OSError, EOFError):
            heard = "network"
        asking.done(heard)


async def _by_tcp(server: Nameserver, asking: _Asking) -> Reply | str:
    reader, writer = await asyncio.open_connection(*server)
    number = _numbers()[0].to_bytes(2)
    try:
        wire = asking.query.wire(int.from_bytes(number), edns=asking.with_edns)
        # RFC 7766 8: the length and the message in one piece
        writer.write(len(wire).to_bytes(2) + wire)
        while True:
            size_bytes = int.from_bytes(await reader.readexactly(2))
            wire = await reader.readexactly(size_bytes)
            heard = read_message(asking.query, wire) if wire[:2] == number else None
            if heard is not None:
                return heard.reply or heard.why or "failed"
    finally:
        writer.transport.abort()


class _Port:
    """A socket to one server, so a source port. `numbers` are the ids that it has left, `asking` who waits, by id."""

    __slots__ = ("_socket", "_stub", "asking", "numbers")

    def __init__(self, stub: Stub, address: _Address) -> None:
        family, at = address
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(at)
            stub.loop.add_reader(self._socket, self._read)
        except BaseException:
            self._socket.close()
            raise
        self._stub = stub
        self.numbers = _numbers()
        self.asking: dict[int, _Asking] = {}
        stub.open.add(self)

    def send(self, wire: bytes) -> None:
        """Send a packet, or lose it, as the network might."""
        try:
            self._socket.send(wire)
        except BlockingIOError:
            pass
        except OSError:
            self._fail()

    def end(self, number: int) -> None:
        """A question waits no more; behind its last one the port is closed."""
        del self.asking[number]
        if not self.asking and not self.numbers:
            self.close()

    def tick(self, now: float) -> None:
        """It is now so late for who waits."""
        for number, asking in list(self.asking.items()):
            # what came of those before may have ended it
            if now >= asking.next_at and number in self.asking:
                asking.try_again()

    def close(self) -> None:
        """Close it; who still waits waits for nothing."""
        self._stub.open.discard(self)
        self._stub.loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        """Something has arrived; where more may have it is looked for, which costs less than to be called again."""
        for _ in range(len(self.asking) or 1):
            try:
                wire = self._socket.recv(_MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._fail()
                return
            # RFC 5452 9.1: the id first, before anything of a stranger's packet is read
            asking = self.asking.get(int.from_bytes(wire[:2]))
            if asking is not None:
                asking.hear(wire)
                if not self.asking:
                    return

    def _fail(self) -> None:
        """Nobody is there, says the system. Behind an error uvloop reads no more, so the port is given up."""
        self.numbers.clear()
        for asking in list(self.asking.values()):
            asking.end("network")  # the last one closes the port
        if self._socket.fileno() >= 0:
            self.close()


class _Asking:
    """A question that is under way."""

    __slots__ = (
        "_every_s",
        "_left",
        "_number",
        "_port",
        "_stub",
        "_wire",
        "done",
        "last",
        "next_at",
        "query",
        "server",
        "with_edns",
    )

    def __init__(self, stub: Stub, server: int, query: Query, last: float, done: Done) -> None:
        self.server = server
        self.query = query
        self.last = last
        self.done = done
        self._stub = stub
        self.with_edns = True

    def begin(self, port: _Port, now: float) -> None:
        """Send it by UDP, again where no answer comes."""
        self._port = port
        self._number = number = port.numbers.pop()
        port.asking[number] = self
        self._wire = self.query.wire(number, edns=self.with_edns)
        self._left = _TRIES - 1
        self._every_s = (self.last - now) / _TRIES
        self.next_at = now + self._every_s
        port.send(self._wire)

    def try_again(self) -> None:
        """Send it once more, or give up."""
        if not self._left:
            self.end("timeout")
            return
        self._left -= 1
        self.next_at += self._every_s
        # what is asked from now on comes from elsewhere: the way of this port's packets may be one that is dead
        self._port.numbers.clear()
        self._port.send(self._wire)

    def hear(self, wire: bytes) -> None:
        """A packet with our id."""
        heard = read_message(self.query, wire)
        if heard is None:
            return
        stub = self._stub
        if heard.why in {"formerr", "notimp"} and self.with_edns:
            # RFC 6891 7, RFC 2671 5.3: a server that does not know EDNS
            self._port.end(self._number)
            self.with_edns = False
            stub.send(self, stub.loop.time())
        elif heard.is_cut:
            self._port.end(self._number)
            stub.connect(self)
        else:
            self.end(heard.reply or heard.why)

    def end(self, heard: Reply | str) -> None:
        """It is answered or given up."""
        self._port.end(self._number)
        self.done(heard)


_Address = tuple[socket.AddressFamily, Any]


def _address(server: Nameserver) -> _Address:
    """As sockets want it, with the zone of an IPv6 address (RFC 4007 11). Raises OSError."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM, flags=flags)
    family, _, _, _, address = found[0]
    return family, address


def _numbers() -> list[int]:
    """Ids that nobody can guess, each once."""
    return list(dict.fromkeys(memoryview(os.urandom(2 * _QUESTIONS)).cast("H")))
