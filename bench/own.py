"""What is measured of mxgate alone: its start, two workers beside one, the metrics' scrape, memory after many messages.

Everything is on, with state in Redis, in the world of full.py.  `bench growth` is the last of them by itself.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.accounting import Group
from bench.corpus import Corpus, make_corpus
from bench.full import FullGateway, FullStarter, NameServer
from bench.systems import MXGATE, Starter
from bench.table import KIB, Gate, Ratio, ratio
from bench.traffic import CannotRun, Load, Sink, compile_programs
from tests.e2e.redis import RedisServer

FAILED = 1
DOMAINS, MESSAGES = 50, 500
WARM_UP = 1000
SCRAPES, IDLE_S = 50, 5.0
GROWTH_MOST = 1.05
# Ten thousand messages have filled every cache; what is later added is added by messages.
SETTLED = 10_000
GROWTH_STEPS = (SETTLED, 100_000)
QUICK_STEPS = (2_000,)


@dataclass(frozen=True, slots=True)
class Workers:
    """Two workers beside one, in alternating rounds, on all cores; the clients are there, too."""

    cpu: Ratio
    throughput: Ratio


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of two workers, merged: CPU of one scrape, and what the idle gateway uses of a core."""

    cpu_ms: float
    bytes: int
    idle_share: float


@dataclass(frozen=True, slots=True)
class Memory:
    """PSS of all processes, and of the one worker among them."""

    all_mib: float
    worker_mib: float


@dataclass(frozen=True, slots=True)
class Own:
    """All of it; `memory`: by the messages that one worker had forwarded by then."""

    start_s: tuple[float, ...]
    start_cpu_s: tuple[float, ...]
    workers: Workers
    scrape: Scrape
    memory: dict[int, Memory]


@dataclass(frozen=True, slots=True)
class World:
    """What a gateway needs around it."""

    directory: Path
    corpus: Corpus
    sink: Sink
    starter: FullStarter

    def run(self, gateway: FullGateway, messages: int, first: int) -> tuple[float, float]:
        """CPU of one message in us, and messages a second."""
        before_s = gateway.group.cpu_s()
        sent = gateway.load(self.directory, self.corpus, messages, first=first).run()
        gateway.group.wait_quiet()
        self.sink.check(sent)
        return (gateway.group.cpu_s() - before_s) / messages * 1e6, sent.accepted / sent.wall_s


@contextmanager
def world(mxgate: str = "") -> Iterator[World]:
    """Everything but the gateway."""
    with tempfile.TemporaryDirectory(prefix="mxgate-own-") as name:
        directory = Path(name)
        compile_programs(directory)
        corpus = make_corpus(directory, domains=DOMAINS, messages=MESSAGES, size_bytes=2 * KIB)
        redis = RedisServer()
        try:
            with NameServer(corpus.zone) as name_server, Sink(directory) as sink:
                starter = FullStarter(directory, sink.port, name_server.port, redis.url, mxgate=mxgate)
                yield World(directory, corpus, sink, starter)
        finally:
            redis.close()


def measure(*, mxgate: str = "", is_quick: bool = False) -> Own:
    """All of it; a minute, and more with the memory of 100,000 messages."""
    rounds, messages = (2, 500) if is_quick else (5, 2000)
    with world(mxgate) as around:
        return Own(
            *_starts(around, rounds),
            _workers(around, rounds, messages),
            _scrape(around),
            memory_after(around, QUICK_STEPS if is_quick else GROWTH_STEPS),
        )


def gates(own: Own) -> tuple[Gate, ...]:
    """The marks of PERFORMANCE.md and of the issue."""
    return (
        Gate("start to the first 220", statistics.median(own.start_s), 1.0, unit=" s", is_strict=True),
        Gate("two workers: CPU to one worker", own.workers.cpu.median, 1.05),
        Gate(
            "merged scrape, one a second: share of a core",
            own.scrape.cpu_ms / 10,
            1.0,
            unit=" %",
            is_strict=True,
        ),
        Gate("PSS of a worker", max(one.worker_mib for one in own.memory.values()), 60.0, 40.0, " MiB"),
        growth_gate(own.memory),
    )


def growth_gate(memory: dict[int, Memory]) -> Gate:
    """Memory after the most messages to that after the fewest; not measured with one of them only."""
    fewest, most = min(memory), max(memory)
    value = memory[most].all_mib / memory[fewest].all_mib if most > fewest else None
    return Gate(f"memory after {most:,} messages to that after {fewest:,}", value, GROWTH_MOST)


def render(own: Own) -> list[str]:
    """Lines for people."""
    memory = ", ".join(
        f"{one.all_mib:.1f} MiB after {messages:,} (the worker {one.worker_mib:.1f})"
        for messages, one in own.memory.items()
    )
    starts, workers, scrape = own.start_s, own.workers, own.scrape
    start = f"{statistics.median(starts):.2f} s ({min(starts):.2f}-{max(starts):.2f} of {len(starts)})"
    idle = f"idle: {scrape.idle_share:.2%} of a core"
    return [
        f"start to the first 220: {start}, CPU {statistics.median(own.start_cpu_s):.2f} s",
        f"two workers to one: CPU of a message {workers.cpu}, messages/s {workers.throughput}",
        f"merged scrape of two workers: {scrape.cpu_ms:.1f} ms CPU, {scrape.bytes / KIB:.0f} KiB; {idle}",
        f"PSS of supervisor and one worker: {memory} messages",
    ]


def memory_after(around: World, steps: Sequence[int]) -> dict[int, Memory]:
    """Memory when so many messages were forwarded in all; everything on."""
    with around.starter.start("growing") as gateway:
        found = {}
        done = 0
        for step in steps:
            _progress(f"memory after {step:,} messages")
            around.run(gateway, step - done, done)
            done = step
            found[step] = _memory(gateway.group)
        return found


def bare_memory_after(around: World, steps: Sequence[int], mxgate: str) -> dict[int, Memory]:
    """The same with the relay guard alone."""
    with Starter(around.directory, around.sink.port, mxgate=mxgate).start(MXGATE, "-growing") as running:
        found = {}
        done = 0
        for step in steps:
            _progress(f"memory after {step:,} messages")
            sent = Load(around.directory, running.port, 2 * KIB, step - done, first=done).run()
            running.group.wait_quiet()
            around.sink.check(sent)
            done = step
            found[step] = _memory(running.group)
        return found


def main(arguments: Sequence[str]) -> int:
    """`bench growth`; the exit code."""
    parser = argparse.ArgumentParser(prog="bench growth", description="memory after many messages")
    parser.add_argument(
        "--messages", type=int, default=GROWTH_STEPS[-1], metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--bare", action="store_true", help="the relay guard alone: all policies are off")
    parser.add_argument("--mxgate", default="", metavar="COMMAND", help="the mxgate to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    given = parser.parse_args(arguments)
    steps = [SETTLED * 10**power for power in range(9) if SETTLED * 10**power < given.messages]
    steps.append(given.messages)
    try:
        with world(given.mxgate) as around:
            found = (
                bare_memory_after(around, steps, given.mxgate) if given.bare else memory_after(around, steps)
            )
    except CannotRun as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    print(f"{'messages':>10s} {'PSS MiB':>8s} {'of the worker':>13s}")
    for messages, one in found.items():
        print(f"{messages:10,d} {one.all_mib:8.1f} {one.worker_mib:13.1f}")
    gate = growth_gate(found)
    print(f"\n{gate}")
    if given.json:
        given.json.write_text(
            json.dumps({str(messages): asdict(one) for messages, one in found.items()}, indent=1) + "\n"
        )
    return FAILED if gate.is_reached is False else 0


def _memory(group: Group) -> Memory:
    workers = [pid for pid in group.pids() if pid != group.process.pid]
    return Memory(group.pss_mib(), group.pss_mib(workers))


def _starts(around: World, times: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds, and CPU seconds."""
    _progress(f"start: {times} times")
    took, used = [], []
    for number in range(times):
        gateway, seconds = around.starter.start_timed(f"start-{number}")
        with gateway:
            took.append(seconds)
            used.append(gateway.group.cpu_s())
    return tuple(took), tuple(used)


def _workers(around: World, rounds: int, messages: int) -> Workers:
    _progress(f"workers: {rounds} rounds of {messages}")
    with around.starter.start("one") as one, around.starter.start("two", workers=2) as two:
        gateways = (one, two)
        for gateway in gateways:
            around.run(gateway, 2 * WARM_UP, 0)
        cpu: tuple[list[float], list[float]] = ([], [])
        rate: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for which, gateway in enumerate(gateways):
                cpu_us, per_s = around.run(gateway, messages, 0)
                cpu[which].append(cpu_us)
                rate[which].append(per_s)
    return Workers(ratio(cpu[1], cpu[0]), ratio(rate[1], rate[0]))


def _scrape(around: World) -> Scrape:
    _progress("scrape")
    with around.starter.start("scraped", workers=2) as gateway:
        around.run(gateway, WARM_UP, 0)
        size = len(gateway.scrape())
        begun, before_s = time.monotonic(), gateway.group.cpu_s()
        time.sleep(IDLE_S)
        idle_share = (gateway.group.cpu_s() - before_s) / (time.monotonic() - begun)
        begun, before_s = time.monotonic(), gateway.group.cpu_s()
        for _ in range(SCRAPES):
            gateway.scrape()
        took_s = time.monotonic() - begun
        cpu_s = gateway.group.cpu_s() - before_s - idle_share * took_s
    return Scrape(cpu_s / SCRAPES * 1e3, size, idle_share)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
