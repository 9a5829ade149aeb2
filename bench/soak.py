"""`bench soak`: the whole gateway under load for minutes, while its workers are killed and it is reloaded.

Two workers with everything on get 70 % of the load that they carried before, at random intervals. A worker is killed
(SIGKILL) every 20 s, and halfway between them the configuration is reloaded (SIGHUP). Clients behave as mail servers
do: what was not accepted comes again. Afterwards it is compared, message by message:

lost      accepted with 250, but it never reached the downstream
doubled   it reached the downstream more than once, though no connection of its client broke
turned    connections refused, and replies 4xx and 5xx: neither a kill nor a reload may cause any
broken    connections that ended without a reply: those of a killed worker, and no others

Memory (PSS) and open files of the gateway are noted each few seconds; their growth is the last half's median to that of
the first, without the first tenth. Exit code 1 when something of all this was found.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.corpus import Corpus, make_corpus
from bench.full import FullGateway, FullStarter, NameServer
from bench.table import KIB, Gate
from bench.traffic import CannotRun, Load, Sent, Sink, compile_programs, sent_by
from tests.e2e.redis import RedisServer

FAILED = 1
SHARE = 0.7  # of the measured capacity
DISTURB_S = 20.0
SAMPLE_S = 2.0
ENOUGH_SAMPLES = 30
WORKERS = 2
DOMAINS, MESSAGES = 50, 500
CONNECTIONS = 200  # at most at once: what comes on top waits
CAPACITY_S = 5.0
WARM_UP = 1000
BROKEN = frozenset({"banner", "before", "after"})
# A killed worker's connections end at once; that their clients see it may take longer on a busy machine.
KILL_SHOWS_S = 3.0
# What a median of a noisy series may differ by without having grown.
MEMORY_GROWTH, FILES_GROWTH = 1.05, 1.10


@dataclass(frozen=True, slots=True)
class Sample:
    """The gateway at a moment; `supervisor_*`: of the process that lives as long as the soak."""

    at_s: float
    pss_mib: float
    files: int
    processes: int
    supervisor_pss_mib: float
    supervisor_files: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of every message.  The ids are their numbers."""

    accepted: int
    arrived: int
    lost: tuple[int, ...]
    doubled: tuple[int, ...]
    doubled_by_breaks: int
    broken: dict[str, int]
    broken_unprovoked: int
    turned: dict[str, int]


@dataclass(frozen=True, slots=True)
class Soak:
    """One run."""

    minutes: float
    capacity_per_s: float
    rate_per_s: float
    messages: int
    sent: Sent
    ledger: Ledger
    kills: int
    reloads: int
    samples: tuple[Sample, ...]
    failed_reloads: int
    tracebacks: int


def main(arguments: Sequence[str]) -> int:
    """Soak and print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench soak", description="load, kills and reloads; nothing may be lost"
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--rate", type=float, default=0.0, metavar="N", help="messages a second (70 %% of the capacity)"
    )
    parser.add_argument(
        "--disturb", type=float, default=DISTURB_S, metavar="S", help="seconds from kill to kill (20)"
    )
    parser.add_argument(
        "--mxgate", default="", metavar="COMMAND", help="the mxgate to soak (the one of this Python)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the series and the counts")
    given = parser.parse_args(arguments)
    try:
        soak = _soak(given.minutes, given.rate, given.disturb, given.mxgate)
    except CannotRun as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    print("\n".join(render(soak)))
    if given.json:
        given.json.write_text(json.dumps(asdict(soak), indent=1) + "\n")
    return FAILED if any(gate.is_reached is False for gate in gates(soak)) else 0


def compare(attempts: Iterable[str], arrived: Iterable[str], kills_s: Sequence[float] = ()) -> Ledger:
    """The clients' log and the sink's, as load.c and sink.c write them; and when workers were killed."""
    ends: dict[int, list[str]] = {}
    unprovoked = 0
    for line in attempts:
        number, word, at_s = line.split()
        ends.setdefault(int(number), []).append(word)
        if word in BROKEN and not any(0 <= float(at_s) - kill_s <= KILL_SHOWS_S for kill_s in kills_s):
            unprovoked += 1
    stored = Counter(int(line) for line in arrived)
    accepted = {number for number, words in ends.items() if "250" in words}
    words = Counter(word for all_words in ends.values() for word in all_words)
    more = [number for number, count in stored.items() if count > 1]
    unexplained = [number for number in more if not BROKEN & set(ends.get(number, ()))]
    return Ledger(
        accepted=len(accepted),
        arrived=stored.total(),
        lost=tuple(sorted(accepted - stored.keys())),
        doubled=tuple(sorted(unexplained)),
        doubled_by_breaks=len(more) - len(unexplained),
        broken={word: words[word] for word in sorted(BROKEN) if words[word]},
        broken_unprovoked=unprovoked,
        turned={word: count for word, count in sorted(words.items()) if word != "250" and word not in BROKEN},
    )


def growth(values: Sequence[float]) -> float | None:
    """The median of the last half to that of the first, without the first tenth; None for too few values."""
    settled = values[len(values) // 10 :]
    if len(settled) < ENOUGH_SAMPLES:
        return None
    half = len(settled) // 2
    return statistics.median(settled[half:]) / statistics.median(settled[:half])


def gates(soak: Soak) -> tuple[Gate, ...]:
    """What has to hold."""
    # while a reload has two generations of workers, memory says nothing
    settled = [one for one in soak.samples if one.processes <= 1 + WORKERS]
    return (
        Gate("messages that never got through", soak.messages - soak.ledger.accepted, 0),
        Gate("messages accepted with 250 and not stored", len(soak.ledger.lost), 0),
        Gate("messages stored twice without a broken connection", len(soak.ledger.doubled), 0),
        Gate("connections refused, and replies 4xx or 5xx", sum(soak.ledger.turned.values()), 0),
        Gate("connections broken without a kill", soak.ledger.broken_unprovoked, 0),
        Gate("reloads that failed, and tracebacks in the log", soak.failed_reloads + soak.tracebacks, 0),
        Gate("growth of memory (PSS)", growth([one.pss_mib for one in settled]), MEMORY_GROWTH),
        Gate(
            "growth of the supervisor's memory (PSS)",
            growth([one.supervisor_pss_mib for one in settled]),
            MEMORY_GROWTH,
        ),
        Gate(
            "growth of the supervisor's open files",
            growth([one.supervisor_files for one in settled]),
            FILES_GROWTH,
        ),
    )


def render(soak: Soak) -> list[str]:
    """The report's lines."""
    ledger, sent = soak.ledger, soak.sent
    share = (
        f"{soak.rate_per_s / soak.capacity_per_s:.0%} of what it carried before ({soak.capacity_per_s:.0f})"
    )
    latencies = f"p50 {sent.dot_p50_ms:.1f}, p95 {sent.dot_p95_ms:.1f}, p99 {sent.dot_p99_ms:.1f} ms"
    broken, turned = _counted(ledger.broken), _counted(ledger.turned)
    header = f"{'minute':>8s} {'PSS MiB':>8s} {'files':>6s} {'processes':>9s} {'supervisor PSS':>14s} {'files':>6s}"
    lines = [
        f"{soak.minutes:g} minutes at {soak.rate_per_s:.0f} messages/s, {share}",
        f"{soak.kills} kills, {soak.reloads} reloads; dot to reply: {latencies}",
        f"{ledger.accepted} accepted at {sent.accepted / sent.wall_s:.0f}/s, {ledger.arrived} stored",
        f"connections that broke: {broken}; turned away: {turned}",
        f"messages stored twice after such a break: {ledger.doubled_by_breaks}",
        "",
        header,
        *map(_line, _ten_of(soak.samples)),
        "",
        *map(str, gates(soak)),
    ]
    if ledger.lost or ledger.doubled:
        lines.append(f"numbers: lost {ledger.lost[:20]}, doubled {ledger.doubled[:20]}")
    return lines


def _line(one: Sample) -> str:
    return (
        f"{one.at_s / 60:8.1f} {one.pss_mib:8.1f} {one.files:6d} {one.processes:9d} {one.supervisor_pss_mib:14.1f}"
        f" {one.supervisor_files:6d}"
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "none"


def _ten_of(samples: Sequence[Sample]) -> Sequence[Sample]:
    """About ten of them, the first and the last among them."""
    if len(samples) <= 10:
        return samples
    return [samples[round(k * (len(samples) - 1) / 9)] for k in range(10)]


def _soak(minutes: float, rate: float, disturb_s: float, mxgate: str) -> Soak:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxgate-soak-")))
        compile_programs(directory)
        corpus = make_corpus(directory, domains=DOMAINS, messages=MESSAGES, size_bytes=2 * KIB)
        name_server = stack.enter_context(NameServer(corpus.zone))
        redis = RedisServer()
        stack.callback(redis.close)
        stored = directory / "stored"
        with Sink(directory, stored) as sink:
            starter = FullStarter(directory, sink.port, name_server.port, redis.url, mxgate=mxgate)
            with starter.start("mxgate", workers=WORKERS) as gateway:
                capacity, first = _capacity(gateway, directory, corpus, sink)
                rate = rate or SHARE * capacity
                load = Load(
                    directory,
                    gateway.port,
                    0,
                    max(CONNECTIONS, round(rate * minutes * 60)),
                    CONNECTIONS,
                    first,
                    corpus=corpus.files,
                    rate=rate,
                    log=directory / "attempts",
                    is_persistent=True,
                )
                _progress(f"{minutes:g} minutes at {rate:.0f} messages/s")
                disturbed = Disturbance(gateway, disturb_s)
                with load.start() as process:
                    disturbed.go_on_while(lambda: process.poll() is None)
                    sent = sent_by(process)
                gateway.group.wait_quiet()
        log = (directory / "mxgate.log").read_text(errors="replace")
        with (directory / "attempts").open() as attempts, stored.open() as arrived:
            # what was sent to find the capacity is not in the attempts' log
            ledger = compare(attempts, (line for line in arrived if int(line) >= first), disturbed.kills_s)
    return Soak(
        minutes,
        capacity,
        rate,
        load.messages,
        sent,
        ledger,
        len(disturbed.kills_s),
        disturbed.reloads,
        tuple(disturbed.samples),
        failed_reloads=log.count('"reload.failed"') + log.count('"config.rejected"'),
        tracebacks=log.count("Traceback"),
    )


def _capacity(gateway: FullGateway, programs: Path, corpus: Corpus, sink: Sink) -> tuple[float, int]:
    """Messages a second with 20 connections that never wait, and the first number that is free then."""
    _progress("capacity")
    sink.check(gateway.load(programs, corpus, WARM_UP).run())
    sent = gateway.load(programs, corpus, WARM_UP, first=WARM_UP).run()
    sink.check(sent)
    messages = max(WARM_UP, round(CAPACITY_S * sent.accepted / sent.wall_s))
    sent = gateway.load(programs, corpus, messages, first=2 * WARM_UP).run()
    sink.check(sent)
    return sent.accepted / sent.wall_s, 2 * WARM_UP + messages


class Disturbance:
    """Kills a worker and reloads, in turn, each every `every_s`; notes memory and open files meanwhile."""

    def __init__(self, gateway: FullGateway, every_s: float) -> None:
        self.kills_s: list[float] = []
        self.reloads = 0
        self.samples: list[Sample] = []
        self._gateway = gateway
        self._every_s = every_s
        self._began = time.monotonic()

    def go_on_while(self, is_running: Callable[[], bool]) -> None:
        self._began = time.monotonic()
        next_kill, next_reload = self._every_s / 2, self._every_s
        next_sample = 0.0
        while is_running():
            now = time.monotonic() - self._began
            if now >= next_kill:
                self._kill()
                next_kill += self._every_s
            if now >= next_reload:
                self._gateway.group.process.send_signal(signal.SIGHUP)
                self.reloads += 1
                next_reload += self._every_s
            if now >= next_sample:
                self.samples.append(self._sample(now))
                next_sample += SAMPLE_S
            time.sleep(0.05)

    def _kill(self) -> None:
        """The oldest worker: it has sessions, one that was just started may have none."""
        for pid in sorted(self._gateway.worker_pids())[:1]:
            with contextlib.suppress(ProcessLookupError):
                self.kills_s.append(time.monotonic())
                os.kill(pid, signal.SIGKILL)

    def _sample(self, at_s: float) -> Sample:
        group = self._gateway.group
        root = group.process.pid
        pids = group.pids()
        return Sample(
            at_s,
            group.pss_mib(),
            sum(map(_files, pids)),
            len(pids),
            group.pss_mib([root]),
            _files(root),
        )


def _files(pid: int) -> int:
    """How many a process has open; 0 when it has just ended."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
