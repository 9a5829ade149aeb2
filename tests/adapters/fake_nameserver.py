"""A name server that follows a script: what it sends for a question, by UDP and by TCP at the same port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.rrset

from gateway.adapters.dns import Nameserver
from tests.e2e.net import LOOPBACK, free_port

Script = Callable[[dns.message.Message, bool], Iterable[bytes | float]]
"""Given a question and whether it came by TCP: packets to send, and seconds to wait between them."""


def reply_to(query: dns.message.Message, *records: str, code: int = 0) -> dns.message.Message:
    """A reply with these records in its answer section: `a.example.org. 60 IN A 192.0.2.1`."""
    message = dns.message.make_response(query)
    message.flags |= dns.flags.RA
    message.request_payload = 65_535  # whatever it is, and by TCP too, it is not cut by us
    message.set_rcode(code)  # type: ignore[arg-type]  # an int does
    message.answer += [_rrset(record) for record in records]
    return message


def _rrset(record: str) -> dns.rrset.RRset:
    name, ttl, rdclass, rdtype, rdata = record.split(maxsplit=4)
    return dns.rrset.from_text(name, int(ttl), rdclass, rdtype, rdata)


class FakeNameserver(asyncio.DatagramProtocol):
    """Answers by its script, or not at all; `heard` are the names asked for, with how they came."""

    def __init__(self, script: Script | None = None, *, at: Nameserver | None = None) -> None:
        self.script = script
        self.heard: list[tuple[str, str]] = []
        self.packets: list[bytes] = []
        self.ports: list[int] = []
        """From which ports questions came by UDP."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self.at = at or Nameserver(LOOPBACK, free_port())

    @asynccontextmanager
    async def running(self, *, with_tcp: bool = True) -> AsyncIterator[FakeNameserver]:
        """From here on it listens; without TCP, connections are refused."""
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=self.at)
        if with_tcp:
            self._tcp = await asyncio.start_server(self._serve, *self.at)
        try:
            yield self
        finally:
            self._udp.close()
            if self._tcp is not None:
                self._tcp.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)  # what was closed is closed in the loop's next turn

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        udp = self._udp
        assert udp is not None
        self.ports.append(addr[1])
        saying = self._say(data, lambda packet: udp.sendto(packet, addr), is_tcp=False)
        self._keep(asyncio.create_task(saying))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(packet: bytes) -> None:
            writer.write(len(packet).to_bytes(2) + packet)

        task = asyncio.current_task()
        assert task is not None
        self._keep(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    size_bytes = int.from_bytes(await reader.readexactly(2))
                    await self._say(await reader.readexactly(size_bytes), send, is_tcp=True)
        finally:
            writer.close()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _say(self, data: bytes, send: Callable[[bytes], None], *, is_tcp: bool) -> None:
        query = dns.message.from_wire(data)
        self.packets.append(data)
        self.heard.append((query.question[0].name.to_text(), "tcp" if is_tcp else "udp"))
        for what in self.script(query, is_tcp) if self.script else ():
            if isinstance(what, bytes):
                send(what)
            else:
                await asyncio.sleep(what)
