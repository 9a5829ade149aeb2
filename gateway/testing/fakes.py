"""Fakes of everything that a policy, the pipeline and the gatekeeper work with; a test owns them and looks into them.

Each is the whole protocol of gateway.services or gateway.relaying, so mypy tells when they drift.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple, TypeVar

from gateway.lookup import TRAIL, Lookup, Question
from gateway.relaying import Content, Delivery, Offer
from gateway.services import HttpError, HttpResponse, Merge, Services
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp import reply
from gateway.smtp.address import Mailbox
from gateway.smtp.content import unstuff
from gateway.smtp.reply import Reply
from gateway.testing.zone import Zone

T = TypeVar("T")

STORED = Reply(250, "2.0.0", "Stored as 1")
"""What the downstream says behind the dot unless a test wants something else."""


class FakeClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time_s = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 UTC
        self.uptime_s = 1000.0

    def now(self) -> float:
        return self.time_s

    def monotonic(self) -> float:
        return self.uptime_s

    def advance(self, seconds: float) -> None:
        self.time_s += seconds
        self.uptime_s += seconds


@dataclass(frozen=True)
class Line:
    """One line of the log."""

    level: str
    event: str
    keys: dict[str, Any]


class FakeLog:
    """Keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def debug(self, event: str, **keys: object) -> None:
        self.lines.append(Line("debug", event, keys))

    def info(self, event: str, **keys: object) -> None:
        self.lines.append(Line("info", event, keys))

    def warning(self, event: str, **keys: object) -> None:
        self.lines.append(Line("warning", event, keys))

    def error(self, event: str, **keys: object) -> None:
        self.lines.append(Line("error", event, keys))

    def of(self, level: str) -> list[Line]:
        """The lines of one level."""
        return [line for line in self.lines if line.level == level]


class _Child:
    """One child of a family of any kind."""

    def __init__(self, values: dict[Any, float], seen: list[float], key: tuple[str, ...]) -> None:
        self._values, self._seen, self._key = values, seen, key

    def inc(self, amount: float = 1) -> None:
        self._values[self._key] += amount

    def dec(self, amount: float = 1) -> None:
        self._values[self._key] -= amount

    def set(self, value: float) -> None:
        self._values[self._key] = value

    def observe(self, amount: float, tx: str = "") -> None:
        self._seen.append(amount)


class _Family:
    def __init__(self, metrics: FakeMetrics, name: str, labels: tuple[str, ...]) -> None:
        self._metrics, self._name, self._labels = metrics, name, labels

    def labels(self, *values: str) -> _Child:
        assert len(values) == len(self._labels), (self._name, values)
        key = (self._name, *values)
        return _Child(self._metrics.values, self._metrics.observed[key], key)

    def clear(self) -> None:
        for key in [key for key in self._metrics.values if key[0] == self._name]:
            del self._metrics.values[key]


class FakeMetrics:
    """`metrics["mxgate_x_total", "label"]` is a counter's or gauge's value; `observed` what histograms saw."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = defaultdict(float)
        self.observed: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.values.get((key,) if isinstance(key, str) else key, 0)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """The children of one family that are not 0, by their labels."""
        return {key[1:]: value for key, value in self.values.items() if key[0] == name and value}

    def counters(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> _Family:
        return _Family(self, name, labels)

    def gauges(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), merge: Merge = Merge.SUM
    ) -> _Family:
        return _Family(self, name, labels)

    def histograms(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
    ) -> _Family:
        return _Family(self, name, labels)


class FakeDns:
    """Answers from a zone; `prefetched` are the questions that were asked ahead.

    Each `run` suspends for so many `turns` of the loop: with 0 it answers at once, as a cache does.
    """

    def __init__(self, zone: Zone | None = None, *, turns: int = 0) -> None:
        self.zone = zone or Zone()
        self.turns = turns
        self.prefetched: list[Question] = []

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return self._answered(lookup, tx)

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        before = len(self.zone.trail)
        self._answered(lookup, tx)
        self.prefetched += [asked.question for asked in self.zone.trail[before:]]

    def _answered(self, lookup: Lookup[T], tx: Transaction | None) -> T:
        """As the resolver does: what was asked for a transaction is remembered with it, each question once."""
        before = len(self.zone.trail)
        result = self.zone.run(lookup)
        if tx is not None:
            trail = TRAIL.get(tx) or []
            TRAIL.put(tx, trail)
            known = {asked.question for asked in trail}
            trail += [asked for asked in self.zone.trail[before:] if asked.question not in known]
        return result


class HttpRequest(NamedTuple):
    """One request of a policy; `content` is all of it."""

    method: str
    url: str
    content: bytes
    headers: tuple[tuple[str, str], ...]
    socket: str

    def all(self, name: str) -> list[str]:
        """The values of the headers of this name, compared without case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


HttpAnswer = Callable[[HttpRequest], HttpResponse]


def nobody_answers(request: HttpRequest) -> HttpResponse:
    """No service is there."""
    raise HttpError("connect", f"{request.url}: nobody answers here")


class FakeHttp:
    """Services that answer as the test says; `requests` are what they were asked.

    `answer` makes a response of a request, or raises HttpError. Each request suspends for so many `turns` of the loop.
    """

    def __init__(self, answer: HttpAnswer = nobody_answers, *, turns: int = 0) -> None:
        self.answer = answer
        self.turns = turns
        self.requests: list[HttpRequest] = []

    async def request(
        self,
        method: str,
        url: str,
        *,
        content: bytes | Callable[[], Iterable[bytes]] = b"",
        headers: Sequence[tuple[str, str]] = (),
        socket: str = "",
        timeout_s: float | None = None,
        max_bytes: int = 65_536,
    ) -> HttpResponse:
        for name, value in headers:
            if any(each in "\r\n\0" for each in name + value):
                raise ValueError(f"{name}: {value!r} is no header")
        octets = content if isinstance(content, bytes) else b"".join(content())
        self.requests.append(HttpRequest(method, url, octets, tuple(headers), socket))
        for _ in range(self.turns):
            await asyncio.sleep(0)
        response = self.answer(self.requests[-1])
        if len(response.content) > max_bytes:
            raise HttpError("too_large", url)
        return response


@dataclass(frozen=True)
class FakeServices(Services):
    """Services whose parts are known to be fakes: `FakeServices.make()`."""

    clock: FakeClock = field(default_factory=FakeClock)
    log: FakeLog = field(default_factory=FakeLog)
    metrics: FakeMetrics = field(default_factory=FakeMetrics)
    dns: FakeDns = field(default_factory=FakeDns)
    http: FakeHttp = field(default_factory=FakeHttp)


@dataclass(frozen=True)
class Delivered:
    """One message as the downstream got it."""

    tx: Transaction
    prefix: bytes
    rest: bytes
    is_stuffed: bool
    size_bytes: int

    @property
    def message(self) -> bytes:
        """The message without dot-stuffing."""
        return unstuff(self.prefix) + (unstuff(self.rest) if self.is_stuffed else self.rest)


class FakeRelay:
    """A relay with one route "main" for everything that takes everything, unless a test says otherwise.

    Set `verify_gate` or `deliver_gate` to an Event to have the call wait for it; `called` is set when one arrives.
    """

    def __init__(self) -> None:
        self.offered = Offer(eightbitmime=True, smtputf8=True, dsn=True, size=0)
        self.routes: dict[str, str | None] = {}  # by domain
        self.refusals: dict[str, Reply] = {}  # by route
        self.most = 0  # recipients of one transaction
        self.limits: dict[str, int] = {}  # the same by route
        self.words: dict[str, Reply] = {}  # the downstream's, by mailbox
        self.delivery = Delivery(STORED, stored=True)
        self.error: Exception | None = None  # raised by deliver: a defect
        self.asked: list[tuple[str, ...]] = []
        self.last: list[float] = []  # until when each call may take
        self.delivered: list[Delivered] = []
        self.delivered_to: list[str] = []  # the route that each call was given
        self.deliveries: dict[str, Delivery] = {}  # by that route, else `delivery`
        self.cancelled: list[str] = []
        self.called = asyncio.Event()
        self.verify_gate: asyncio.Event | None = None
        self.deliver_gate: asyncio.Event | None = None

    def offer(self) -> Offer:
        return self.offered

    def route(self, mailbox: Mailbox) -> str | None:
        return self.routes.get(str(mailbox.domain), "main")

    def refusal(self, route: str, envelope: Envelope) -> Reply | None:
        return self.refusals.get(route)

    def max_recipients(self, route: str) -> int:
        return self.limits.get(route, self.most)

    def state(self) -> Mapping[str, object]:
        return {}

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], last: float = inf
    ) -> Sequence[Reply]:
        self.last.append(last)
        names = tuple(str(r.mailbox) for r in rcpts)
        self.asked.append(names)
        await self._pass("verify", self.verify_gate)
        return [self.words.get(name, reply.RECIPIENT_OK) for name in names]

    async def deliver(self, tx: Transaction, content: Content, route: str = "") -> Delivery:
        self.delivered_to.append(route)
        await self._pass("deliver", self.deliver_gate)
        if self.error is not None:
            raise self.error
        rest = b"".join(content.blocks())
        delivered = Delivered(tx, content.prefix, rest, content.is_stuffed, content.size_bytes)
        delivery = self.deliveries.get(route, self.delivery)
        if delivery.stored:
            self.delivered.append(delivered)
        return delivery

    async def _pass(self, call: str, gate: asyncio.Event | None) -> None:
        self.called.set()
        if gate is None:
            return
        try:
            await gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(call)
            raise
