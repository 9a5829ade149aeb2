"""The table of `bench`: what the lab's runs found, merged, with ratios to each reference peer; no measuring here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.lab import LabMemory, LabRound, LabRun
from bench.latency import Latency
from bench.own import Own
from bench.table import BUSY_SHARE, Gate, Ratio, ratio, spread

# The lab's names of systems.
MXGATE, BARE = "mxgate", "mxgate-bare"
HARAKA, HARAKA_BARE = "haraka-auth", "haraka-bare"
MILTER, RSPAMD, PROXY = "postfix-milter", "postfix-rspamd", "postfix-proxy"
AIOSMTPD = "py-aiosmtpd-fast-auth"
# The columns of ratios, and who is a column's peer in which scenario.
PEERS = {"haraka": (HARAKA, HARAKA_BARE), "postfix": (MILTER, PROXY), "rspamd": (RSPAMD,)}
# PERFORMANCE.md 4: scenario -> must and goal, to Haraka and to Postfix with milters.
TO_HARAKA = {
    "warm": (0.30, 0.13),
    "cold": (0.45, 0.25),
    "ten": (0.30, 0.12),
    "20k": (0.35, 0.15),
    "1m": (0.22, 0.10),
}
TO_MILTER = {
    "warm": (0.18, 0.08),
    "cold": (0.25, 0.13),
    "ten": (0.16, 0.06),
    "20k": (0.27, 0.12),
    "1m": (0.60, 0.30),
}
LABELS = {
    "warm": "2 KiB",
    "cold": "2 KiB, cold DNS",
    "ten": "2 KiB, 10 on a connection",
    "20k": "20 KiB",
    "1m": "1 MiB",
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run of the lab: its name here, its label in the table, who is measured, and run.sh's words for it."""

    name: str
    label: str
    systems: tuple[str, ...]
    arguments: tuple[str, ...]


Runs = Mapping[str, tuple[Scenario, LabRun]]


@dataclass(slots=True)
class Found:
    """All that one `bench` found."""

    runs: dict[str, tuple[Scenario, LabRun]] = field(default_factory=dict)
    latency: dict[str, Latency] = field(default_factory=dict)
    own: Own | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def render(runs: Runs) -> list[str]:
    """The lines of the table; none without runs."""
    if not runs:
        return []
    header = (
        f"{'scenario':25s} {'system':21s} {'CPU us':>7s} {'spread':>6s} {'msg/s':>6s}"
        f" {'p50 ms':>6s} {'p95':>6s} {'p99':>6s} {'PSS MiB':>7s}"
    )
    lines = [header + "".join(f"  {'to ' + peer:>17s}" for peer in PEERS)]
    for scenario, run in runs.values():
        label = scenario.label
        for name, rounds in run.rounds.items():
            lines.append(
                f"{label:25s} {name:21s} {_figures(rounds)}{_cpu_ratios(run, name)}{_doubts(rounds)}".rstrip()
            )
            label = ""
        for name, memory in run.memory.items():
            lines.append(
                f"{label:25s} {name:21s} {_memory_figures(memory)}{_memory_ratios(run, name)}".rstrip()
            )
            label = ""
    return lines


def render_latency(found: Mapping[str, Latency]) -> list[str]:
    """The lines of the second table; none without figures."""
    if not found:
        return []
    lines = [
        "From the final dot to the reply, at half of each system's capacity, messages at random intervals:",
        "",
        f"{'system':21s} {'capacity/s':>10s} {'rate/s':>7s} {'p50 ms':>7s} {'p95':>7s} {'p99':>7s}",
    ]
    for name, one in found.items():
        capacity = "" if one.capacity_per_s is None else f"{one.capacity_per_s:.0f}"
        lines.append(
            f"{name:21s} {capacity:>10s} {one.rate_per_s:7.0f} {one.p50_ms:7.2f} {one.p95_ms:7.2f} {one.p99_ms:7.2f}"
        )
    return lines


def gates(runs: Runs, found: Mapping[str, Latency]) -> list[Gate]:
    """The marks of PERFORMANCE.md 4 for everything that is compared; not measured is what was left out."""
    marks = []
    for name, label in LABELS.items():
        marks.append(Gate(f"{label}: CPU to Haraka", _cpu(runs, name, MXGATE, HARAKA), *TO_HARAKA[name]))
        marks.append(
            Gate(f"{label}: CPU to Postfix + milters", _cpu(runs, name, MXGATE, MILTER), *TO_MILTER[name])
        )
    at_half = found.get(MXGATE)
    return [
        *marks,
        Gate("2 KiB: CPU to Postfix + rspamd", _cpu(runs, "warm", MXGATE, RSPAMD), 0.35, 0.15),
        Gate(
            "forwarding only: CPU to Postfix's before-queue proxy",
            _cpu(runs, "forward", BARE, PROXY),
            0.4,
            0.2,
        ),
        Gate(
            "messages/s of a core at 100 connections to Haraka's",
            _per_round(runs, "hundred", MXGATE, HARAKA, "messages_per_s"),
            3.0,
            6.0,
            is_floor=True,
        ),
        Gate(
            "p95 at 20 connections to Haraka's", _per_round(runs, "warm", MXGATE, HARAKA, "p95_ms"), 0.2, 0.05
        ),
        Gate("p99 from dot to reply at half load", at_half.p99_ms if at_half else None, 30.0, 10.0, " ms"),
        Gate("idle session", _memory_of(runs, "idle", "session"), 12.0, 6.0, " KiB"),
        Gate("50 x 10 MiB in flight, above idle", _memory_of(runs, "held", "peak"), 150.0, 60.0, " MiB"),
    ]


def _figures(rounds: Sequence[LabRound]) -> str:
    def median(name: str) -> float:
        return float(statistics.median(getattr(one, name) for one in rounds))

    cpu_us = [one.cpu_us for one in rounds]
    return (
        f"{median('cpu_us'):7.0f} {spread(cpu_us):6.0%} {median('messages_per_s'):6.0f} {median('p50_ms'):6.1f}"
        f" {median('p95_ms'):6.1f} {median('p99_ms'):6.1f} {rounds[-1].pss_mib:7.0f}"
    )


def _memory_figures(memory: LabMemory) -> str:
    if memory.kib_per_session is not None:
        text = f"{memory.kib_per_session:.1f} KiB a session, {memory.held} of {memory.asked} held"
    else:
        text = (
            f"{memory.peak_mib - memory.before_mib:.1f} MiB above idle, {memory.held} of {memory.asked} held"
        )
    return f"{text:51s}"


def _doubts(rounds: Sequence[LabRound]) -> str:
    refused = "" if all(one.is_all_accepted for one in rounds) else "  (not all was accepted)"
    is_busy = statistics.median(one.load_share for one in rounds) > BUSY_SHARE
    return refused + ("  (the load's core was busy)" if is_busy else "")


def _cpu_ratios(run: LabRun, name: str) -> str:
    text = ""
    for peers in PEERS.values():
        to = next((peer for peer in peers if peer in run.rounds and peer != name), None)
        beside = str(_ratio(run, name, to, "cpu_us")) if to and name not in peers else ""
        text += f"  {beside:>17s}"
    return text


def _memory_ratios(run: LabRun, name: str) -> str:
    text = ""
    for peers in PEERS.values():
        to = next((run.memory[peer] for peer in peers if peer in run.memory and peer != name), None)
        value, base = _value(run.memory[name]), _value(to) if to else None
        beside = f"{value / base:.2f}" if value is not None and base else ""
        text += f"  {beside:>17s}"
    return text


def _value(memory: LabMemory) -> float | None:
    """What is compared; None of a system that did not hold all."""
    if not memory.is_whole:
        return None
    return (
        memory.kib_per_session if memory.kib_per_session is not None else memory.peak_mib - memory.before_mib
    )


def _ratio(run: LabRun, name: str, to: str, what: str) -> Ratio:
    def values(system: str) -> list[float]:
        return [getattr(one, what) for one in run.rounds[system]]

    return ratio(values(name), values(to))


def _per_round(runs: Runs, scenario: str, name: str, to: str, what: str) -> float | None:
    if scenario not in runs:
        return None
    run = runs[scenario][1]
    return _ratio(run, name, to, what).median if name in run.rounds and to in run.rounds else None


def _cpu(runs: Runs, scenario: str, name: str, to: str) -> float | None:
    return _per_round(runs, scenario, name, to, "cpu_us")


def _memory_of(runs: Runs, scenario: str, what: str) -> float | None:
    memory = runs[scenario][1].memory.get(MXGATE) if scenario in runs else None
    if memory is None or not memory.is_whole:
        return None
    return memory.kib_per_session if what == "session" else memory.peak_mib - memory.before_mib
