"""The demo's name server: it answers from one zone, by UDP, and no other name exists."""

from __future__ import annotations

import asyncio
import socket

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.zone


async def serve(sock: socket.socket, zone_text: str) -> asyncio.DatagramTransport:
    """Serve the records of a zone file on the socket until the transport is closed."""
    zone = dns.zone.from_text(zone_text, origin=dns.name.root, relativize=False, check_origin=False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Server(zone), sock=sock)
    return transport


def answer(query: bytes, zone: dns.zone.Zone) -> bytes:
    """The response to one query. Raises DNSException for what is none."""
    message = dns.message.from_wire(query)
    response = dns.message.make_response(message, recursion_available=True)
    for question in message.question:
        records = zone.get_rrset(question.name, question.rdtype)
        if records is not None:
            response.answer.append(records)
        elif not any(name.is_subdomain(question.name) for name in zone):
            # RFC 8020 2: a name exists when there is something below it
            response.set_rcode(dns.rcode.NXDOMAIN)
    return response.to_wire()


class _Server(asyncio.DatagramProtocol):
    def __init__(self, zone: dns.zone.Zone) -> None:
        self._zone = zone
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        try:
            self._transport.sendto(answer(data, self._zone), addr)
        except dns.exception.DNSException:
            return  # no query: nobody waits for an answer
