"""The back end that is always there: messages by dnspython, sockets by asyncio.

RFC 1035, EDNS (RFC 6891), TCP when the answer was cut (RFC 7766). Each question has a socket of its own, so a source
port that the system draws, and an id of 16 random bits. A packet that is not the answer, whatever else it is, does not
end the wait for the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from gateway.adapters.dns.names import text_of
from gateway.adapters.dns.reply import CNAME, FAILURES, MAX_RECORDS, NoReplyError, Reply, Resource
from gateway.lookup import Mx, Record, RRType
from gateway.session import unmapped

PAYLOAD_BYTES = 1232
"""Largest UDP answer asked for: fits any path without fragments (DNS flag day 2020)."""

_MAX_SOCKETS = 500
_TC_BIT = 2  # of the message's third octet
_TRIES = 3
_TYPES = {**{dns.rdatatype.from_text(each): each for each in RRType}, dns.rdatatype.CNAME: CNAME}


class Nameserver(NamedTuple):
    """An IP address and a port."""

    host: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class WireBackEnd:
    """Asks by messages that dnspython writes and reads."""

    name = "dnspython"

    def __init__(self, servers: Sequence[Nameserver]) -> None:
        self._servers = tuple(servers)
        self._sockets = asyncio.Semaphore(_MAX_SOCKETS)

    async def ask(self, server: int, name: str, rrtype: RRType, timeout_s: float) -> Reply:
        """Ask one server by UDP, and by TCP where that answer was cut. Raises NoReplyError."""
        qname = dns.name.Name([*(label.encode() for label in name.split(".")), b""])
        query = dns.message.make_query(qname, rrtype, use_edns=0, payload=PAYLOAD_BYTES)
        at = self._servers[server]
        try:
            async with asyncio.timeout(timeout_s), self._sockets:
                message = await _by_udp(query, at, timeout_s)
                if message.rcode() == dns.rcode.FORMERR:
                    # RFC 6891 7: a server that does not know EDNS
                    query.use_edns(False)
                    message = await _by_udp(query, at, timeout_s)
                if message.flags & dns.flags.TC:
                    message = await _by_tcp(query, at)
        except TimeoutError as exc:
            raise NoReplyError("timeout") from exc
        except (OSError, EOFError, dns.exception.DNSException) as exc:
            raise NoReplyError("network") from exc
        return _reply(message)

    async def close(self) -> None:
        """Nothing stays open behind a question; what was closed last is so in the loop's next turn."""
        await asyncio.sleep(0)


class _Answers(asyncio.DatagramProtocol):
    """One question's socket."""

    def __init__(self, query: dns.message.Message) -> None:
        self._query = query
        self.answer: asyncio.Future[dns.message.Message] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        if not self.answer.done() and (message := _answer_to(self._query, data)) is not None:
            self.answer.set_result(message)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _by_udp(query: dns.message.Message, server: Nameserver, timeout_s: float) -> dns.message.Message:
    # connected: the system drops what comes from elsewhere, and tells when nobody is there
    transport, answers = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Answers(query), remote_addr=server
    )
    try:
        wire = query.to_wire()
        for _ in range(_TRIES - 1):
            transport.sendto(wire)
            await asyncio.wait([answers.answer], timeout=timeout_s / _TRIES)
            if answers.answer.done():
                break
        else:
            transport.sendto(wire)
        return await answers.answer
    finally:
        transport.close()
        if not answers.answer.cancel():
            answers.answer.exception()  # looked at, also when the wait was cut short


async def _by_tcp(query: dns.message.Message, server: Nameserver) -> dns.message.Message:
    reader, writer = await asyncio.open_connection(*server)
    try:
        wire = query.to_wire()
        # RFC 7766 8: the length and the message in one piece
        writer.write(len(wire).to_bytes(2) + wire)
        while True:
            size_bytes = int.from_bytes(await reader.readexactly(2))
            message = _answer_to(query, await reader.readexactly(size_bytes))
            if message is not None:
                return message
    finally:
        writer.transport.abort()


def _answer_to(query: dns.message.Message, wire: bytes) -> dns.message.Message | None:
    """The message, if it is one and answers this query."""
    # RFC 5452 9.1: id and question; the id first, before anything of a stranger's packet is read
    if wire[:2] != query.id.to_bytes(2):
        return None
    try:
        # what a cut message holds does not count, and may end in the middle of a record
        is_cut = bool(wire[2:3]) and bool(wire[2] & _TC_BIT)
        message = dns.message.from_wire(wire, ignore_trailing=True, question_only=is_cut)
    except (dns.exception.DNSException, ValueError):
        return None
    return message if query.is_response(message) else None


def _reply(message: dns.message.Message) -> Reply:
    code = message.rcode()
    if code not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        word = dns.rcode.to_text(code).lower()
        raise NoReplyError(word if word in FAILURES else "failed")
    if sum(map(len, message.answer)) > MAX_RECORDS:
        raise NoReplyError("too_large")
    negative_ttl_s = min(
        (
            min(rrset.ttl, each.minimum)
            for rrset in message.authority
            for each in rrset
            if rrset.rdtype == dns.rdatatype.SOA
        ),
        default=None,
    )
    resources = tuple(
        Resource(owner, kind, rrset.ttl, _value(kind, each))
        for rrset in message.answer
        if rrset.rdclass == dns.rdataclass.IN and (kind := _TYPES.get(rrset.rdtype))
        for owner in [_text(rrset.name)]
        for each in rrset
    )
    return Reply(code == dns.rcode.NXDOMAIN, resources, negative_ttl_s)


def _text(name: dns.name.Name) -> str:
    return text_of(name.labels[:-1])


def _value(kind: RRType | str, rdata: object) -> Record:
    match kind:
        case RRType.A:
            return IPv4Address(rdata.address)  # type: ignore[attr-defined]  # dnspython types by number
        case RRType.AAAA:
            return unmapped(IPv6Address(rdata.address))  # type: ignore[attr-defined]
        case RRType.MX:
            return Mx(rdata.preference, _text(rdata.exchange))  # type: ignore[attr-defined]
        case RRType.TXT:
            return b"".join(rdata.strings)  # type: ignore[attr-defined]
        case _:
            return _text(rdata.target)  # type: ignore[attr-defined]
