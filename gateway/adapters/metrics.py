"""Metrics: counted in each worker, merged in the supervisor, rendered there by prometheus_client.

A worker counts in ProcessMetrics and pushes `snapshot()` each second: families that changed, with absolute values, so
that a lost push costs nothing. MergedMetrics in the supervisor takes the snapshots and renders what /metrics shows.
Counters and histograms of a worker that ended are kept, so that sums never fall; its gauges vanish. Gauges of living
workers are added up, unless the family says otherwise.

An observation may name its transaction. The newest one of each bucket is shown as that bucket's exemplar, in
OpenMetrics only; its time is that of the push, at most a second late, so that observing costs no look at the clock.

Counting is not left to prometheus_client, whose inc() and observe() take six to eight times as long because they lock
for threads: a process of ours counts in one thread only (docs/adr/0002-metrics.md).
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, assert_never

from gateway.services import Merge

if TYPE_CHECKING:
    from prometheus_client import Metric

# What travels, in JSON's types: families, each [kind, name, documentation, labels, buckets, merge, children]; a child
# is [label values, numbers, exemplars]. Numbers are a counter's or gauge's value, or the counts of a histogram's
# buckets and the sum; exemplars are [bucket, transaction, amount, time].
Snapshot: TypeAlias = list[Any]
Exemplars: TypeAlias = list[list[Any]]

# Seconds; up to the 300 s that a downstream may take for its final reply (DESIGN.md section 8).
DEFAULT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# https://prometheus.io/docs/concepts/data_model; colons are for recording rules.
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Kind(StrEnum):
    """The metric types of the exposition formats that we use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_COMBINE: dict[Merge, Callable[[Iterable[float]], float]] = {Merge.SUM: sum, Merge.MIN: min, Merge.MAX: max}


class _Number:
    """What counters and gauges have in common."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value: float = 0

    def numbers(self) -> list[float]:
        return [self._value]

    @staticmethod
    def exemplars() -> Exemplars:
        return []


class Counter(_Number):
    """A number that only grows."""

    __slots__ = ()

    def inc(self, amount: float = 1) -> None:
        if amount < 0:
            raise ValueError("a counter only grows")
        self._value += amount


class Gauge(_Number):
    """A number that goes up and down."""

    __slots__ = ()

    def inc(self, amount: float = 1) -> None:
        self._value += amount

    def dec(self, amount: float = 1) -> None:
        self._value -= amount

    def set(self, value: float) -> None:
        self._value = value


class Histogram:
    """Observations counted in buckets; `limits` are their inclusive upper ends without the last, infinity."""

    __slots__ = ("_counts", "_examples", "_exemplars", "_limits", "_sum")

    def __init__(self, limits: tuple[float, ...]) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum: float = 0
        self._examples: dict[int, tuple[str, float]] = {}  # since the last push, by bucket
        self._exemplars: dict[int, list[Any]] = {}

    def observe(self, amount: float, tx: str = "") -> None:
        bucket = bisect_left(self._limits, amount)
        self._counts[bucket] += 1
        self._sum += amount
        if tx:
            self._examples[bucket] = tx, amount

    def numbers(self) -> list[float]:
        return [*self._counts, self._sum]

    def exemplars(self) -> Exemplars:
        """The newest example of each bucket that has one; those that are new are of now."""
        if self._examples:
            now = round(time.time(), 3)
            for bucket, (tx, amount) in self._examples.items():
                self._exemplars[bucket] = [bucket, tx, amount, now]
            self._examples.clear()
        return [*self._exemplars.values()]


M = TypeVar("M", Counter, Gauge, Histogram)


class Definition(NamedTuple):
    """What all metrics of one name have in common. `labels` are the names of the labels."""

    kind: Kind
    name: str
    documentation: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    merge: Merge = Merge.SUM


class Family(Generic[M]):
    """All metrics of one name: what gateway.services calls Counters, Gauges or Histograms.

    A family without labels is exposed from the start, with zero; one with labels as its metrics come into being.
    """

    def __init__(self, definition: Definition, make: Callable[[], M]) -> None:
        self.definition = definition
        self._make: Callable[[], M] = make
        self._metrics: dict[tuple[str, ...], M] = {}
        if not definition.labels:
            self.labels()

    def labels(self, *values: str) -> M:
        """The metric of these label values, the same each time."""
        metric = self._metrics.get(values)
        if metric is None:
            if len(values) != len(self.definition.labels):
                raise ValueError(
                    f"{self.definition.name} has the labels {self.definition.labels}, not {values}"
                )
            metric = self._metrics[values] = self._make()
        return metric

    def clear(self) -> None:
        """Forget all metrics, so that those of label values that hold no more are not shown."""
        self._metrics.clear()

    def children(self) -> dict[tuple[str, ...], list[float]]:
        return {values: metric.numbers() for values, metric in self._metrics.items()}

    def exemplars(self, values: tuple[str, ...]) -> Exemplars:
        return self._metrics[values].exemplars()


class ProcessMetrics:
    """The Metrics service of one process.

    Names are given as they are exposed. A bad name, or one that already means something else, is a ValueError.
    """

    def __init__(self) -> None:
        self._families: dict[str, Family[Any]] = {}
        self._pushed: dict[str, dict[tuple[str, ...], list[float]]] = {}

    def counters(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Family[Counter]:
        if not name.endswith("_total"):
            raise ValueError(f"the name of a counter ends in _total: {name}")
        return self._family(Definition(Kind.COUNTER, name, documentation, labels), Counter)

    def gauges(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), merge: Merge = Merge.SUM
    ) -> Family[Gauge]:
        return self._family(Definition(Kind.GAUGE, name, documentation, labels, merge=merge), Gauge)

    def histograms(
        self, name: str, documentation: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
    ) -> Family[Histogram]:
        limits = buckets or DEFAULT_BUCKETS
        if list(limits) != sorted(set(limits)):
            raise ValueError(f"the buckets of {name} do not ascend")
        return self._family(
            Definition(Kind.HISTOGRAM, name, documentation, labels, limits), lambda: Histogram(limits)
        )

    def snapshot(self) -> Snapshot:
        """The families that changed since the last snapshot, for MergedMetrics.update."""
        changed: Snapshot = []
        for name, family in self._families.items():
            children = family.children()
            if children != self._pushed.get(name):
                self._pushed[name] = children
                changed.append(
                    [
                        *family.definition,
                        [[values, numbers, family.exemplars(values)] for values, numbers in children.items()],
                    ]
                )
        return changed

    def families(self) -> tuple[Family[Any], ...]:
        """All families, in the order in which they were made."""
        return tuple(self._families.values())

    def _family(self, definition: Definition, make: Callable[[], M]) -> Family[M]:
        family = self._families.get(definition.name)
        if family is None:
            for name in (definition.name, *definition.labels):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{name!r} cannot be the name of a metric or a label")
            family = self._families[definition.name] = Family(definition, make)
        elif family.definition != definition:
            raise ValueError(f"the metric {definition.name} is already defined in another way")
        return family


_Numbers: TypeAlias = list[float]
_Children: TypeAlias = Mapping[tuple[str, ...], tuple[_Numbers, Exemplars]]


class MergedMetrics:
    """What all workers and the supervisor itself counted. `own` is the supervisor's Metrics service."""

    def __init__(self) -> None:
        self.own = ProcessMetrics()
        self._definitions: dict[str, Definition] = {}
        self._living: dict[int, dict[str, tuple[Definition, _Children]]] = {}
        self._ended: dict[str, tuple[Definition, _Children]] = {}

    def update(self, pid: int, snapshot: Snapshot) -> None:
        """Take a snapshot of a living process."""
        families = self._living.setdefault(pid, {})
        for kind, name, documentation, labels, buckets, merge, children in snapshot:
            definition = Definition(
                Kind(kind), name, documentation, tuple(labels), tuple(buckets), Merge(merge)
            )
            self._definitions[name] = definition
            families[name] = (
                definition,
                {tuple(values): (numbers, exemplars) for values, numbers, exemplars in children},
            )

    def end(self, pid: int) -> None:
        """A process ended: keep what it counted, forget its gauges."""
        for name, (definition, children) in self._living.pop(pid, {}).items():
            if definition.kind is not Kind.GAUGE:
                kept = [self._ended[name]] if name in self._ended else []
                self._ended[name] = definition, _merge(definition, [*kept, (definition, children)])

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that an HTTP Accept header asks for, and its content type."""
        # Imported here because a worker, which never renders, should not carry it.
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

        encode, content_type = choose_encoder(accept)
        return encode(self), content_type

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's question."""
        self.update(os.getpid(), self.own.snapshot())
        for name, definition in sorted(self._definitions.items()):
            sources = [families[name] for families in self._living.values() if name in families]
            if name in self._ended:
                sources.append(self._ended[name])
            if children := _merge(definition, sources):
                yield _metric(definition, children)


def _merge(definition: Definition, sources: Iterable[tuple[Definition, _Children]]) -> _Children:
    combine = _COMBINE[definition.merge]
    merged: dict[tuple[str, ...], tuple[_Numbers, Exemplars]] = {}
    for source, children in sources:
        # A newer version of a policy may define its metric anew. The numbers of the old one cannot be added to it.
        if source != definition:
            continue
        for values, child in children.items():
            known = merged.get(values)
            if known is None:
                merged[values] = child
            else:
                numbers = [combine(pair) for pair in zip(known[0], child[0], strict=True)]
                merged[values] = numbers, _newest(known[1] + child[1])
    return merged


def _newest(exemplars: Exemplars) -> Exemplars:
    """One for each bucket."""
    return [*{each[0]: each for each in sorted(exemplars, key=lambda each: each[3])}.values()]


def _metric(definition: Definition, children: _Children) -> Metric:
    from prometheus_client.core import (  # noqa: PLC0415  # as above
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.samples import Exemplar  # noqa: PLC0415

    name, documentation, labels = definition.name, definition.documentation, definition.labels
    match definition.kind:
        case Kind.COUNTER:
            counter = CounterMetricFamily(name, documentation, labels=labels)
            for values, ((number,), _) in children.items():
                counter.add_metric(values, number)
            return counter
        case Kind.GAUGE:
            gauge = GaugeMetricFamily(name, documentation, labels=labels)
            for values, ((number,), _) in children.items():
                gauge.add_metric(values, number)
            return gauge
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(name, documentation, labels=labels)
            # Written as other Prometheus clients do: "1.0", "+Inf".
            limits = [*(str(float(limit)) for limit in definition.buckets), "+Inf"]
            for values, ((*counts, total), exemplars) in children.items():
                buckets: list[Any] = [*zip(limits, accumulate(counts), strict=True)]
                for bucket, tx, amount, at in exemplars:
                    buckets[bucket] = (*buckets[bucket], Exemplar({"tx": tx}, amount, at))
                histogram.add_metric(values, buckets, total)
            return histogram
        case never:
            assert_never(never)
