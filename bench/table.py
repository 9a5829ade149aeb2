"""Medians, ratios and the table of `bench forward`; no measuring here.

The figures of one run are compared round by round: in each round every system had the same work within seconds, so
what else the machine did touches numerator and denominator alike.  A ratio is the median of the rounds' ratios, with
the lowest and the highest beside it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.systems import MXGATE, POSTFIX

BUSY_SHARE = 0.8  # of the load's core: above it, msg/s and latency are the load's, not the system's
KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of message; `is_distinct`: each goes to a recipient that the system has not seen."""

    label: str
    size_bytes: int
    messages: int
    is_distinct: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """What one system did with one load.  `load_share`: the part of its core that load and sink used."""

    cpu_us: float
    messages_per_s: float
    p50_ms: float
    p95_ms: float
    load_share: float


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one system in one case."""

    case: Case
    system: str
    rounds: tuple[Round, ...]

    @property
    def cpu_us(self) -> tuple[float, ...]:
        return tuple(one.cpu_us for one in self.rounds)


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory with `connections` messages held before their final dot; `peak`: the highest while they arrived."""

    connections: int
    message_mib: float
    before_mib: float
    held_mib: float
    peak_mib: float

    @property
    def per_connection_mib(self) -> float:
        return (self.held_mib - self.before_mib) / self.connections


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two systems: the median of the rounds' ratios, and their range."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f}-{self.highest:.2f})"


@dataclass(frozen=True, slots=True)
class Gate:
    """Something that must be reached.  `value` is None when this run could not tell; `is_strict`: less, not at most.

    is_floor: it must be at least that.
    """

    label: str
    value: float | None
    must: float
    goal: float | None = None
    unit: str = ""
    is_strict: bool = False
    is_floor: bool = False

    @property
    def is_reached(self) -> bool | None:
        if self.value is None:
            return None
        if self.is_floor:
            return self.value >= self.must
        return self.value < self.must if self.is_strict else self.value <= self.must

    def __str__(self) -> str:
        word = {True: "ok", False: "MISSED", None: "-"}[self.is_reached]
        value = "not measured" if self.value is None else f"{self.value:.2f}{self.unit}"
        side = "at least" if self.is_floor else "below" if self.is_strict else "at most"
        bound = f"must be {side} {self.must:.2f}{self.unit}"
        goal = "" if self.goal is None else f", goal {self.goal:.2f}{self.unit}"
        return f"{word:6s}  {self.label}: {value} ({bound}{goal})"


def spread(values: Sequence[float]) -> float:
    """(highest - lowest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def ratio(values: Sequence[float], to: Sequence[float]) -> Ratio:
    """Round by round; both have the same number of rounds."""
    ratios = [value / base for value, base in zip(values, to, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def find(rows: Sequence[Row], label: str, system: str) -> Row | None:
    """The row of a case and a system; None when it was not measured."""
    return next((row for row in rows if (row.case.label, row.system) == (label, system)), None)


def cached_label(case: Case) -> str:
    """The label of the case that differs from a distinct one only in its recipients."""
    return case.label.partition(",")[0]


def gates(rows: Sequence[Row], holdings: Sequence[Holding]) -> tuple[Gate, ...]:
    """The bounds of PERFORMANCE.md for forwarding."""

    def to_postfix(label: str) -> float | None:
        ours, theirs = find(rows, label, MXGATE), find(rows, label, POSTFIX)
        return ratio(ours.cpu_us, theirs.cpu_us).median if ours and theirs else None

    distinct = next((row for row in rows if row.case.is_distinct and row.system == MXGATE), None)
    cached = find(rows, cached_label(distinct.case), MXGATE) if distinct else None
    return (
        Gate("2 KiB: CPU to postfix-proxy", to_postfix("2 KiB"), 0.4, 0.2),
        Gate("1 MiB: CPU to postfix-proxy", to_postfix("1 MiB"), 1.0),
        Gate(
            "distinct recipients: CPU to the cached case",
            ratio(distinct.cpu_us, cached.cpu_us).median if distinct and cached else None,
            1.35,
        ),
        Gate(
            "memory per connection in a spilled message",
            max((holding.per_connection_mib for holding in holdings), default=None),
            0.5,
            unit=" MiB",
            is_strict=True,
        ),
    )


def render_rows(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """The lines of the CPU table; a column of ratios for each of `peers`."""
    ratios = "".join(f"  {'to ' + peer:>18s}" for peer in peers)
    lines = [
        f"{'case':22s} {'system':14s} {'CPU us':>8s} {'spread':>6s} {'msg/s':>7s} {'p50 ms':>7s} {'p95 ms':>7s}{ratios}"
    ]
    before = ""
    for row in rows:
        label = row.case.label
        line = f"{label if label != before else '':22s} {row.system:14s} {_figures(row)}"
        for peer in peers:
            other = find(rows, label, peer)
            beside = str(ratio(row.cpu_us, other.cpu_us)) if other and other is not row else ""
            line += f"  {beside:>18s}"
        cached = find(rows, cached_label(row.case), row.system) if row.case.is_distinct else None
        if cached:
            line = f"{line.rstrip()}  {ratio(row.cpu_us, cached.cpu_us)} of the cached case"
        if statistics.median(one.load_share for one in row.rounds) > BUSY_SHARE:
            line += "  (the load's core was busy: msg/s and latency are too low and too high)"
        lines.append(line.rstrip())
        before = label
    return lines


def render_holdings(holdings: Sequence[Holding]) -> list[str]:
    """The lines of the memory table."""
    return ["connections  before MiB  held MiB  peak MiB  MiB per connection"] + [
        f"{one.connections:11d}  {one.before_mib:10.1f}  {one.held_mib:8.1f}  {one.peak_mib:8.1f}"
        f"  {one.per_connection_mib:18.2f}"
        for one in holdings
    ]


def _figures(row: Row) -> str:
    rate = statistics.median(one.messages_per_s for one in row.rounds)
    p50 = statistics.median(one.p50_ms for one in row.rounds)
    p95 = statistics.median(one.p95_ms for one in row.rounds)
    cpu_us = row.cpu_us
    return f"{statistics.median(cpu_us):8.0f} {spread(cpu_us):6.0%} {rate:7.0f} {p50:7.1f} {p95:7.1f}"
