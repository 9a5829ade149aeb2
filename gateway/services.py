"""What the engine hands to policies: protocols only; the adapters implement them, the testing kit fakes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gateway.errors import GatewayError
from gateway.store import Keyspace, NoStore

if TYPE_CHECKING:
    from gateway.lookup import Lookup
    from gateway.session import Transaction
    from gateway.store import Operation, Page

T = TypeVar("T")


class Clock(Protocol):
    """Time, injected so that tests own it."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back; only differences mean anything."""


class Log(Protocol):
    """Structured log: an event named noun.verb and fixed keys. Values from outside are escaped by the writer."""

    def debug(self, event: str, **keys: object) -> None: ...
    def info(self, event: str, **keys: object) -> None: ...
    def warning(self, event: str, **keys: object) -> None: ...
    def error(self, event: str, **keys: object) -> None: ...


class Counter(Protocol):
    """A number that only grows."""

    def inc(self, amount: float = 1) -> None: ...


class Gauge(Protocol):
    """A number that goes up and down."""

    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...


class Histogram(Protocol):
    """Observations counted in buckets."""

    def observe(self, amount: float, tx: str = "") -> None:
        """Count one; `tx` is the id of the transaction that it is an example of, shown beside its bucket."""


class Merge(StrEnum):
    """What the gauges of several workers make together."""

    SUM = "sum"
    MIN = "min"  # as for the time when a certificate expires
    MAX = "max"


class Counters(Protocol):
    """Counters of one name; `labels` gives the one of these label values. Values come from closed sets only."""

    def labels(self, *values: str) -> Counter: ...


class Gauges(Protocol):
    """Gauges of one name."""

    def labels(self, *values: str) -> Gauge: ...
    def clear(self) -> None:
        """Forget all of them: label values that hold no more are not shown."""


class Histograms(Protocol):
    """Histograms of one name."""

    def labels(self, *values: str) -> Histogram: ...


class Metrics(Protocol):
    """Metric families by name. Asking twice for one name gives the same family; bind children once, not per message."""

    def counters(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counters: ...
    def gauges(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), merge: Merge = Merge.SUM
    ) -> Gauges: ...
    def histograms(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
    ) -> Histograms: ...


class Resolver(Protocol):
    """DNS. What is asked for one transaction is remembered with it: one question has one answer, failures too."""

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        """Drive a Lookup to its end, which it always reaches: behind its time every answer is OUT_OF_TIME.

        It has `timeout_s` seconds, and never more than leaves the policy that asks time to judge; without `tx` or
        with `own_budget` what it takes is not charged to the time that a message has for questions of strangers.
        Does not suspend while the cache has all answers.
        """

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        """Begin what `run` will be asked later, as from `on_header`. Raises nothing, promises nothing."""


class Store(Protocol):
    """What is kept between messages, shared by workers and machines; policies see their Keyspace of it."""

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        """The answers in order. Each operation is atomic on its key; together they cost one round trip.

        Raises StoreError when any of them was not answered, and NotACounterError when one adds to no counter; the
        others may have been done all the same.
        """

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        """A page of the entries whose keys begin with `prefix`, as Keyspace.scan promises it. Raises StoreError."""


class HttpError(GatewayError):
    """A service gave no answer that could be used; the engine's `on_error` decides where a policy lets it pass.

    `reason` is one word of a closed set: connect, tls, timeout, closed, too_large, protocol.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What a service answered, whatever its status. `headers` have lower-case names, of several the last one."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Http(Protocol):
    """HTTP/1.1 for callouts to services of the operator's own: bounded in time and size, never by way of a proxy."""

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
        """One request and its answer, of any status; a redirect is one, and is not followed.

        `content` that is large is given as a function (`tx.message.blocks`): it is sent block by block, and asked for
        again where a connection that was kept turns out to be dead; in chunks, unless `headers` has a Content-Length.
        `socket` is the path of a Unix socket that is
        connected to instead of the URL's host. All of it takes at most `timeout_s` seconds, and never more than leaves
        the policy time to judge. Certificates are verified (https). Raises HttpError, also for an answer of more than
        `max_bytes`, and ValueError for a header or URL that cannot be sent.
        """


class NoHttp:
    """What a policy has that did not declare `needs_http`."""

    async def request(self, method: str, url: str, **_: object) -> HttpResponse:
        raise RuntimeError("a policy that uses services.http declares needs_http = True")


@dataclass(frozen=True, slots=True)
class Instruments:
    """What every part of the gateway works with."""

    clock: Clock
    log: Log
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Services(Instruments):
    """Everything that a policy may use beside its settings."""

    dns: Resolver
    store: Keyspace = field(default_factory=lambda: Keyspace(NoStore(), ""))
    http: Http = field(default_factory=NoHttp)
