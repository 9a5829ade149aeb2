"""The fast back end: c-ares by aiodns.

What c-ares does otherwise than we want is kept from it: search lists and hosts files (its plain query knows neither),
the choice of a server (each has a channel of its own), a port and a cache that live on (a channel is soon replaced,
and asked nothing twice).
Names that are no host names, packets that it cannot read and answers that are slow go to the other back end. Of "no
data" and "no such name" it tells no TTL: whether a server sends the SOA that allows to remember them (RFC 2308 5) is
asked once for each channel by the other back end. It takes reply codes that it does not know for "no data".
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

import aiodns
import pycares

from gateway.adapters.dns.names import text_of_presentation
from gateway.adapters.dns.reply import CNAME, MAX_RECORDS, BackEnd, NoReplyError, Reply, Resource
from gateway.adapters.dns.wire import Nameserver
from gateway.errors import GatewayError
from gateway.lookup import Mx, Record, RRType
from gateway.session import unmapped

if not hasattr(aiodns.DNSResolver, "query_dns"):
    raise ImportError("aiodns 4 or newer is needed")

_MAX_QUESTIONS = 256
"""Questions of one channel: while it is busy c-ares keeps its port, and it remembers answers without a bound."""

_FLAGS = (
    pycares.ARES_FLAG_EDNS
    | pycares.ARES_FLAG_NOCHECKRESP  # which server is asked next is not c-ares's choice
    | pycares.ARES_FLAG_NO_DFLT_SVR
)
_NEGATIVE_S = 60
"""How long "no data" and "no such name" are remembered of a server that sends SOAs; c-ares keeps them to itself."""

# Of a question's time, for c-ares; with servers that are quick it takes less by itself.
_TRY_SHARE = 0.2

# c-ares refuses to ask for other names; these are the octets that it takes for those of a host name.
_HOST_NAME = re.compile(r"[a-z0-9_./*-]+")

_WHY = {
    pycares.errno.ARES_ESERVFAIL: "servfail",
    pycares.errno.ARES_EREFUSED: "refused",
    pycares.errno.ARES_EFORMERR: "formerr",
    pycares.errno.ARES_ENOTIMP: "notimp",
    pycares.errno.ARES_ECONNREFUSED: "network",
    pycares.errno.ARES_EOF: "network",
    pycares.errno.ARES_ECANCELLED: "closed",
    pycares.errno.ARES_EDESTRUCTION: "closed",
}
_FOR_THE_OTHER = frozenset(
    [
        # c-ares hears no answer that comes after its timeout, and its timeout is short
        pycares.errno.ARES_ETIMEOUT,
        # it gives up at packets that it cannot read, whoever sent them
        pycares.errno.ARES_EBADRESP,
        pycares.errno.ARES_EBADNAME,
        pycares.errno.ARES_EBADQUERY,
    ]
)


class CaresError(GatewayError):
    """c-ares does not take the name servers."""


class _Channel:
    """A channel to one server, and how far it is used up.

    `known` are the questions of which c-ares may have the answer: it remembers them beyond their TTL, so they go to
    the other back end. `sends_soa`: whether the server sends an SOA with "no data" and "no such name", None while
    nobody knows. One domain that has none does not speak for all, so the next channel finds out again.
    """

    __slots__ = ("asked", "is_retired", "known", "resolver", "sends_soa", "waiting")

    def __init__(self, server: Nameserver, timeout_s: float) -> None:
        self.resolver = aiodns.DNSResolver(
            [_written(server)],
            asyncio.get_running_loop(),
            timeout=timeout_s * _TRY_SHARE,
            tries=1,
            flags=_FLAGS,
        )
        self.asked = 0
        self.known: set[tuple[str, RRType]] = set()
        self.waiting = 0
        self.is_retired = False
        self.sends_soa: bool | None = None


class CaresBackEnd:
    """Asks by c-ares, and by `other` what c-ares cannot; no question has more than `timeout_s`. Raises CaresError."""

    name = "aiodns"

    def __init__(self, servers: Sequence[Nameserver], timeout_s: float, other: BackEnd) -> None:
        self._servers = tuple(servers)
        self._timeout_s = timeout_s
        self._other = other
        try:
            self._channels = [_Channel(server, timeout_s) for server in self._servers]
        except pycares.AresError as exc:
            raise CaresError(str(exc)) from exc
        self._retired: set[_Channel] = set()

    async def ask(self, server: int, name: str, rrtype: RRType, timeout_s: float) -> Reply:
        """Ask one server. Raises NoReplyError."""
        if _HOST_NAME.fullmatch(name) is None:
            return await self._other.ask(server, name, rrtype, timeout_s)
        loop = asyncio.get_running_loop()
        last = loop.time() + timeout_s
        channel = self._channel(server)
        channel.waiting += 1
        try:
            if (name, rrtype) not in channel.known:
                channel.known.add((name, rrtype))
                reply = await self._ask(channel, name, rrtype, last)
                if reply is not None:
                    return reply
        finally:
            channel.waiting -= 1
            await self._clear(channel)
        reply = await self._other.ask(server, name, rrtype, max(0.0, last - loop.time()))
        if not reply.resources:
            channel.sends_soa = reply.negative_ttl_s is not None
        return reply

    async def _ask(self, channel: _Channel, name: str, rrtype: RRType, last: float) -> Reply | None:
        """What c-ares says until `last`, in the loop's time; None when the other back end is to be asked."""
        try:
            async with asyncio.timeout_at(last):
                # absolute: with its final dot
                return _reply(await channel.resolver.query_dns(name + ".", rrtype))
        except TimeoutError as exc:
            raise NoReplyError("timeout") from exc
        except aiodns.error.DNSError as exc:
            code = exc.args[0]
            if code in (pycares.errno.ARES_ENODATA, pycares.errno.ARES_ENOTFOUND):
                if channel.sends_soa is None:
                    return None
                ttl_s = _NEGATIVE_S if channel.sends_soa else None
                return Reply(code == pycares.errno.ARES_ENOTFOUND, (), ttl_s)
            if code not in _FOR_THE_OTHER:
                raise NoReplyError(_WHY.get(code, "failed")) from exc
        return None

    async def close(self) -> None:
        """Close all channels."""
        for channel in (*self._channels, *self._retired):
            await channel.resolver.close()
        await self._other.close()

    def _channel(self, server: int) -> _Channel:
        """The channel of one more question; with its last one it retires, so that this one's end closes it."""
        channel = self._channels[server]
        channel.asked += 1
        if channel.asked >= _MAX_QUESTIONS:
            self._channels[server] = _Channel(self._servers[server], self._timeout_s)
            channel.is_retired = True
            self._retired.add(channel)
        return channel

    async def _clear(self, channel: _Channel) -> None:
        """Close a channel that has no more to do."""
        if channel.is_retired and not channel.waiting:
            self._retired.discard(channel)
            await channel.resolver.close()


def _written(server: Nameserver) -> str:
    """As c-ares reads it: the zone of an IPv6 address (RFC 4007 11) stands behind the port."""
    host, percent, zone = server.host.partition("%")
    return f"{Nameserver(host, server.port)}{percent}{zone}"


def _reply(result: pycares.DNSResult) -> Reply:
    if len(result.answer) > MAX_RECORDS:
        raise NoReplyError("too_large")
    negative_ttl_s = min(
        (
            min(each.ttl, each.data.minimum)
            for each in result.authority
            if isinstance(each.data, pycares.SOARecordData)
        ),
        default=None,
    )
    resources = []
    for each in result.answer:
        if each.record_class == pycares.QUERY_CLASS_IN and (reader := _READERS.get(type(each.data))):
            kind, value_of = reader
            resources.append(Resource(text_of_presentation(each.name), kind, each.ttl, value_of(each.data)))
    return Reply(resources=tuple(resources), negative_ttl_s=negative_ttl_s)


_READERS: dict[type, tuple[RRType | str, Callable[..., Record]]] = {
    pycares.ARecordData: (RRType.A, lambda data: IPv4Address(data.addr)),
    pycares.AAAARecordData: (RRType.AAAA, lambda data: unmapped(IPv6Address(data.addr))),
    pycares.MXRecordData: (
        RRType.MX,
        lambda data: Mx(data.priority, text_of_presentation(data.exchange)),
    ),
    pycares.NSRecordData: (RRType.NS, lambda data: text_of_presentation(data.nsdname)),
    pycares.PTRRecordData: (RRType.PTR, lambda data: text_of_presentation(data.dname)),
    pycares.TXTRecordData: (RRType.TXT, lambda data: data.data),
    pycares.CNAMERecordData: (CNAME, lambda data: text_of_presentation(data.cname)),
}
