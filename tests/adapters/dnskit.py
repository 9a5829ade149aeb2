"""What the tests of the resolver share: one with what it writes to, and a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

from gateway.adapters.dns.resolver import CachingResolver
from gateway.adapters.dns.stub import Nameserver, Stub
from gateway.adapters.dns.upstream import Upstream
from gateway.app import SystemClock
from gateway.lookup import Answer, Question, RRType, ask
from gateway.services import Clock, Instruments
from gateway.session import Envelope, Session, Transaction
from tests.fakes import FakeLog, FakeMetrics


class Kit:
    """A resolver, and what it writes to."""

    def __init__(
        self,
        servers: Sequence[Nameserver],
        *,
        timeout_s: float = 3.0,
        clock: Clock | None = None,
    ) -> None:
        self.log, self.metrics = FakeLog(), FakeMetrics()
        self.instruments = Instruments(clock or SystemClock(), self.log, self.metrics)
        self.stub = Stub(servers)
        self.upstream = Upstream(servers, self.stub, self.instruments, timeout_s)
        self.resolver = CachingResolver(self.upstream, self.instruments, total_timeout_s=20)

    async def ask(self, name: str, rrtype: RRType = RRType.A) -> Answer:
        """One question, outside a transaction."""
        (answer,) = await self.resolver.run(ask(Question(name, rrtype)))
        return answer

    async def close(self) -> None:
        await self.resolver.close()
        await self.stub.close()


def transaction() -> Transaction:
    return Transaction(
        "t1", Session("s1", IPv4Address("192.0.2.9"), 25, helo="client.example.org"), Envelope(None)
    )
