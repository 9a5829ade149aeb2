"""What the engine hands to policies: protocols only; the adapters implement them, the testing kit fakes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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

    def observe(self, amount: float) -> None: ...


class Counters(Protocol):
    """Counters of one name; `labels` gives the one of these label values. Values come from closed sets only."""

    def labels(self, *values: str) -> Counter: ...


class Gauges(Protocol):
    """Gauges of one name."""

    def labels(self, *values: str) -> Gauge: ...


class Histograms(Protocol):
    """Histograms of one name."""

    def labels(self, *values: str) -> Histogram: ...


class Metrics(Protocol):
    """Metric families by name. Asking twice for one name gives the same family; bind children once, not per message."""

    def counters(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counters: ...
    def gauges(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauges: ...
    def histograms(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
    ) -> Histograms: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a policy may use beside its settings."""

    clock: Clock
    log: Log
    metrics: Metrics
