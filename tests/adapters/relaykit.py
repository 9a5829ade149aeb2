"""What the tests of the relay share: a relay to a sink with short timeouts, mail to give it, and both event loops."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, ParamSpec

import pytest
import uvloop

from gateway.adapters.relay import HostSettings, RelaySettings, RouteSettings, SmtpRelay
from gateway.adapters.relay.pool import Pool
from gateway.relaying import Delivery
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp.address import Domain, Mailbox
from gateway.smtp.reply import DOWNSTREAM_TROUBLE, Reply
from tests.adapters.sink import Sink
from tests.fakes import FakeServices

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


@dataclass
class Bench:
    """A relay with its one route "main", and what it left behind."""

    relay: SmtpRelay
    services: FakeServices

    async def deliver(self, *rcpts: str, content: Any = None, **parameters: Any) -> Delivery:
        tx = Transaction("t1", SESSION, envelope(*rcpts, **parameters))
        return await self.relay.deliver(tx, content or Mail())

    async def verify(self, *rcpts: str, **parameters: Any) -> list[str]:
        """The downstream's words on these recipients."""
        asked = envelope(*rcpts, **parameters)
        return [str(reply) for reply in await self.replies(asked)]

    async def replies(self, asked: Envelope) -> Sequence[Reply]:
        return await self.relay.verify(SESSION, asked, asked.rcpts)

    @property
    def errors(self) -> dict[str, float]:
        found = self.services.metrics.of("mxgate_relay_errors_total")
        return {error: count for (_, error), count in found.items()}

    @property
    def connections(self) -> dict[str, float]:
        found = self.services.metrics.of("mxgate_relay_connections")
        return {state: count for (_, state), count in found.items()}

    @property
    def pool(self) -> Pool:
        return next(self.relay._table.hosts()).pool

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [line.keys for line in self.services.log.lines if line.event == "relay.failed"]


def settings_for(sink: Sink, host: HostSettings | None = None, **changes: Any) -> RelaySettings:
    route = RouteSettings("main", ("*",), (host or HostSettings("127.0.0.1", sink.port),))
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
async def relay_to(sink: Sink, *, host: HostSettings | None = None, **changes: Any) -> AsyncIterator[Bench]:
    """A relay to this sink, not started: nothing is asked before a test asks."""
    services = FakeServices()
    settings = settings_for(sink, host, **changes)
    relay = SmtpRelay(settings, clock=services.clock, log=services.log, metrics=services.metrics)
    try:
        yield Bench(relay, services)
    finally:
        await relay.close()
        assert services.metrics.of("mxgate_relay_connections") == {}


async def turns(claim: Callable[[], object]) -> None:
    """Let the loop turn until the claim is true, or often enough to see that it does not become so."""
    for _ in range(1000):
        if claim():
            return
        await asyncio.sleep(0)
