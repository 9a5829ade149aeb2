"""The measuring of `bench forward`: CPU in alternating rounds, then memory; every load is checked at the sink.

The systems are started together and get their loads in turn, round by round.  The memory of mxgate alone is measured
afterwards, in a fresh process for each number of connections, since one that was big once may keep its memory.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.systems import MXGATE, Running, Starter
from bench.table import KIB, MIB, Case, Holding, Round, Row
from bench.traffic import CannotRun, Load, Sink

CONNECTIONS = 20
RECIPIENTS = 100
HELD_MIB = 10
WARM_UP_MESSAGES = 300  # every recipient comes up, so that none is new later
# Parts of a round of 2 KiB: as many messages as give every case about the same time.
SHARE_20_KIB, SHARE_1_MIB = 0.5, 0.03


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures; `messages`: of a round of 2 KiB, the other sizes get their share of it."""

    systems: tuple[str, ...]
    rounds: int
    messages: int
    held_connections: tuple[int, ...]

    def cases(self) -> tuple[Case, ...]:
        return (
            Case("2 KiB", 2 * KIB, self.messages),
            Case("2 KiB, new recipients", 2 * KIB, self.messages, is_distinct=True),
            Case("20 KiB", 20 * KIB, max(CONNECTIONS, round(self.messages * SHARE_20_KIB))),
            Case("1 MiB", MIB, max(CONNECTIONS, round(self.messages * SHARE_1_MIB))),
        )


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores a system has and which its clients and its downstream; empty: any."""

    system: frozenset[int] = frozenset()
    load: frozenset[int] = frozenset()

    @classmethod
    def choose(cls) -> Self:
        here = sorted(os.sched_getaffinity(0))
        return cls(frozenset(here[:1]), frozenset(here[-1:])) if len(here) > 1 else cls()


class Measurement:
    """One run: what it found, and what went wrong."""

    def __init__(self, plan: Plan, programs: Path, sink: Sink, starter: Starter) -> None:
        self.rows: list[Row] = []
        self.holdings: list[Holding] = []
        self.failures: list[str] = []
        self.meters: dict[str, str] = {}
        self._plan = plan
        self._programs = programs
        self._sink = sink
        self._starter = starter
        self._sent = 0  # a message's number never comes twice

    def measure_cpu(self) -> None:
        with ExitStack() as stack:
            running: list[Running] = []
            for name in self._plan.systems:
                with self._noting_failure(name):
                    system = stack.enter_context(self._starter.start(name))
                    self._warm_up(system)
                    running.append(system)
                    self.meters[name] = system.group.meter.kind
            for case in self._plan.cases():
                systems = [one for one in running if one.name == MXGATE or not case.is_distinct]
                if systems:
                    self.rows += self._measure_case(case, systems)

    def measure_memory(self) -> None:
        for connections in self._plan.held_connections:
            _progress(f"memory: {connections} x {HELD_MIB} MiB held")
            with (
                self._noting_failure("memory"),
                self._starter.start(MXGATE, f"-held-{connections}") as system,
            ):
                self._warm_up(system)
                self.holdings.append(self._hold(system, connections))

    def _measure_case(self, case: Case, systems: Sequence[Running]) -> list[Row]:
        _progress(f"{case.label}: {self._plan.rounds} rounds of {case.messages}")
        rounds: dict[str, list[Round]] = {one.name: [] for one in systems}
        for _ in range(self._plan.rounds):
            for system in systems:
                with self._noting_failure(f"{system.name}, {case.label}"):
                    rounds[system.name].append(self._round(system, case))
        return [
            Row(case, name, tuple(done)) for name, done in rounds.items() if len(done) == self._plan.rounds
        ]

    def _round(self, system: Running, case: Case) -> Round:
        load = self._load(
            system, case.size_bytes, case.messages, recipients=0 if case.is_distinct else RECIPIENTS
        )
        before_s = system.group.cpu_s()
        sent = load.run()
        system.group.wait_quiet()
        cpu_s = system.group.cpu_s() - before_s
        arrived = self._sink.check(sent)
        return Round(
            cpu_us=cpu_s / sent.accepted * 1e6,
            messages_per_s=sent.accepted / sent.wall_s,
            p50_ms=sent.p50_ms,
            p95_ms=sent.p95_ms,
            load_share=(sent.cpu_s + arrived.cpu_s) / sent.wall_s,
        )

    def _hold(self, system: Running, connections: int) -> Holding:
        before = peak = system.group.pss_mib()
        with self._load(system, HELD_MIB * MIB, connections).hold() as held:
            while not held.is_written():
                peak = max(peak, system.group.pss_mib())
            system.group.wait_quiet()  # what the clients wrote may still lie in sockets
            while_held = system.group.pss_mib()
            sent = held.release()
        self._sink.check(sent)
        return Holding(connections, HELD_MIB, before, while_held, max(peak, while_held))

    def _warm_up(self, system: Running) -> None:
        """Imports, caches, pools: what happens once is no cost of a message."""
        self._sink.check(self._load(system, 2 * KIB, WARM_UP_MESSAGES).run())
        system.group.wait_quiet()

    def _load(self, system: Running, size_bytes: int, messages: int, *, recipients: int = RECIPIENTS) -> Load:
        first, self._sent = self._sent, self._sent + messages
        return Load(self._programs, system.port, size_bytes, messages, CONNECTIONS, first, recipients)

    @contextmanager
    def _noting_failure(self, what: str) -> Iterator[None]:
        try:
            yield
        except CannotRun as error:
            self.failures.append(f"{what}: {error}")
            self._sink.read()  # the next load starts from zero


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
