"""What the tests of the relay share: a relay to a sink with short timeouts, mail to give it, and both event loops."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, ParamSpec, TypeAlias

import pytest
import uvloop

from gateway.adapters.relay import HostSettings, RelaySettings, RouteSettings, SmtpRelay
from gateway.adapters.relay.host import Host
from gateway.adapters.relay.pool import Pool
from gateway.relaying import Delivery
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp.address import Domain, Mailbox
from gateway.smtp.reply import DOWNSTREAM_TROUBLE, Reply
from tests.adapters.sink import Sink
from tests.fakes import FakeServices, Line

P = ParamSpec("P")
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
PREFIX = b"Received: by mx.example.org\r\n"
MESSAGE = b"Subject: x\r\n\r\nbody\r\n"
SESSION = Session("s1", ip_address("192.0.2.1"), 4711)
# Long enough for a loaded machine to do what is expected, for waits that are not what a test is about.
LONG_S = 20.0
TROUBLE = str(DOWNSTREAM_TROUBLE)
SHORT_S = 0.05
SHORT: dict[str, Any] = {"reply_timeout_s": SHORT_S, "final_timeout_s": SHORT_S}
SHORT_GREETING: dict[str, Any] = {"connect_timeout_s": 0.2}
Sinks: TypeAlias = Sink | Sequence[Sequence[Sink]]


def both_loops(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in asyncio's loop and in uvloop's."""

    @functools.wraps(test)
    def run(loop_name: str, *args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(asyncio.wait_for(test(*args, **kwargs), 2 * LONG_S))

    loop_name = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([loop_name, *own])  # type: ignore[attr-defined]  # pytest reads it
    decorated: Callable[..., None] = pytest.mark.parametrize("loop_name", LOOPS)(run)
    return decorated


def mailbox(text: str) -> Mailbox:
    local, _, domain = text.rpartition("@")
    return Mailbox(local, Domain(domain))


def envelope(*rcpts: str, **parameters: Any) -> Envelope:
    names = rcpts or ("b@example.org",)
    return Envelope(mailbox("a@example.net"), tuple(Recipient(mailbox(name)) for name in names), **parameters)


@dataclass(frozen=True)
class Mail:
    """Content in blocks."""

    pieces: Sequence[bytes] = (MESSAGE,)
    prefix: bytes = PREFIX
    is_stuffed: bool = True
    size: int | None = None

    @property
    def size_bytes(self) -> int:
        if self.size is not None:
            return self.size
        return len(self.prefix) + sum(len(piece) for piece in self.pieces)

    def blocks(self) -> Iterator[bytes]:
        yield from self.pieces


BLOCK = b"x" * 62 + b"\r\n"


class Generated:
    """Blocks that are made when they are asked for."""

    prefix = PREFIX
    is_stuffed = True

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.asked = 0
        self.size_bytes = len(PREFIX) + blocks * 65536

    def blocks(self) -> Iterator[bytes]:
        for _ in range(self._blocks):
            self.asked += 1
            yield BLOCK * 1024


class Bell(list[Line]):
    """The lines of a log; rings at each new one."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def append(self, line: Line) -> None:
        super().append(line)
        self.event.set()


@dataclass
class Bench:
    """A relay with its one route "main", and what it left behind."""

    relay: SmtpRelay
    services: FakeServices

    async def start(self) -> None:
        """Start it, and wait until each host was asked once."""
        await self.relay.start()
        await self.probed()

    async def probed(self) -> None:
        """Wait for the probes that are under way."""
        probes = [host._probe for host in self.hosts if host._probe is not None]
        await asyncio.gather(*probes, return_exceptions=True)

    async def until(self, claim: Callable[[], object]) -> None:
        """Wait for a claim that becomes true with a line of the log."""
        async with asyncio.timeout(LONG_S):
            while not claim():
                lines = self.services.log.lines
                assert isinstance(lines, Bell)
                lines.event.clear()
                await lines.event.wait()

    async def deliver(
        self, *rcpts: str, content: Any = None, session: Session = SESSION, **parameters: Any
    ) -> Delivery:
        tx = Transaction("t1", session, envelope(*rcpts, **parameters))
        return await self.relay.deliver(tx, content or Mail())

    async def verify(self, *rcpts: str, session: Session = SESSION, **parameters: Any) -> list[str]:
        """The downstream's words on these recipients."""
        asked = envelope(*rcpts, **parameters)
        return [str(reply) for reply in await self.replies(asked, session)]

    async def replies(self, asked: Envelope, session: Session = SESSION) -> Sequence[Reply]:
        return await self.relay.verify(session, asked, asked.rcpts)

    @property
    def errors(self) -> dict[str, float]:
        """Trouble by kind, of all hosts together."""
        return self._total("mxgate_relay_errors_total")

    @property
    def connections(self) -> dict[str, float]:
        """Connections by state, of all hosts together."""
        return self._total("mxgate_relay_connections")

    def _total(self, name: str) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for (_, _, label), count in self.services.metrics.of(name).items():
            total[label] += count
        return dict(total)

    @property
    def hosts(self) -> list[Host]:
        return list(self.relay._table.hosts())

    @property
    def pool(self) -> Pool:
        return self.hosts[0].pool

    @property
    def up(self) -> list[bool]:
        """Which hosts are up, as the gauge says it."""
        gauges = self.services.metrics
        found = [bool(gauges["mxgate_relay_up", host.route, host.name]) for host in self.hosts]
        assert found == [host.is_up for host in self.hosts]
        return found

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line.keys for line in self.services.log.lines if line.event == event]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.logged("relay.failed")


def host_of(sink: Sink, **changes: Any) -> HostSettings:
    return HostSettings("127.0.0.1", sink.port, **changes)


def settings_for(sinks: Sinks, host: HostSettings | None = None, **changes: Any) -> RelaySettings:
    """One route to these sinks. Changes that are a route's go there, the others to the relay's settings."""
    match sinks:
        case Sink():
            groups: Sequence[Sequence[Sink]] = [[sinks]]
        case _:
            groups = sinks
    hosts = tuple(tuple(host or host_of(sink) for sink in group) for group in groups)
    names = ("verify_recipients", "protocol", "identity", "groups")
    of_route = {"groups": hosts, **{name: changes.pop(name) for name in names if name in changes}}
    route = RouteSettings("main", ("*",), **of_route)
    settings = RelaySettings(
        "gw.example.org",
        (route,),
        connect_timeout_s=LONG_S,
        reply_timeout_s=LONG_S,
        final_timeout_s=LONG_S,
        deliver_timeout_s=LONG_S,
        verify_timeout_s=LONG_S,
        drain_timeout_s=LONG_S,
        idle_timeout_s=LONG_S,
    )
    return replace(settings, **changes)


@asynccontextmanager
async def relay_to(sinks: Sinks, *, host: HostSettings | None = None, **changes: Any) -> AsyncIterator[Bench]:
    """A relay to one sink, or to groups of them; not started: nothing is asked before a test asks."""
    services = FakeServices()
    services.log.lines = Bell()
    settings = settings_for(sinks, host, **changes)
    relay = SmtpRelay(settings, clock=services.clock, log=services.log, metrics=services.metrics)
    try:
        yield Bench(relay, services)
    finally:
        await relay.close()
        assert services.metrics.of("mxgate_relay_connections") == {}
        assert services.metrics.of("mxgate_relay_waiting") == {}


async def turns(claim: Callable[[], object]) -> None:
    """Let the loop turn until the claim is true, or often enough to see that it does not become so."""
    for _ in range(1000):
        if claim():
            return
        await asyncio.sleep(0)
