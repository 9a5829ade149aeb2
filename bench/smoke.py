"""`bench smoke`: does a message still cost what it did?  Guards the hot path against regressions.

The real gateway with everything on (SPF, DKIM, ARC, DMARC, greylist, metrics, log; warm DNS) runs under callgrind,
which counts the instructions of its worker, in a few rounds of signed messages, one connection after the other.  So
does a fixed piece of pure Python (workload.py).  The ratio of both is compared with the one in smoke.json: above it by
more than 15 % is a failure.

Why instructions: unlike time they hardly depend on what else the machine does (docs/performance.md has what was
measured).  What an idle gateway does each second is counted first and taken off; the rest of the noise is in when
events come together, so the lowest round counts.  It does not see the kernel, caches and waiting: `bench` does.

A change that is meant to cost more, or that made messages cheaper, writes the reference anew: `bench smoke --write`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.corpus import Corpus, make_corpus
from bench.full import FullGateway, FullStarter, NameServer
from bench.table import KIB, Gate
from bench.traffic import CannotRun, Sink, compile_programs
from bench.workload import UNITS

FAILED = 1
REFERENCE = Path(__file__).with_name("smoke.json")
WORKLOAD = Path(__file__).with_name("workload.py")
BOUND = 1.15
ROUNDS = 3
DOMAINS, MESSAGES = 40, 80
START_TIMEOUT_S = 180.0
ATTACH_TIMEOUT_S = 60.0
IDLE_S = 3.0
# The same order in every dict and set of strings.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


def main(arguments: Sequence[str]) -> int:
    """Count and compare; the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench smoke", description="instructions of a message, beside a reference"
    )
    parser.add_argument("--write", action="store_true", help="what is counted now becomes the reference")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="default: %(default)s")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    try:
        messages, unit = _count(max(1, given.rounds))
    except CannotRun as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    now = min(messages) / unit
    rounds_text = ", ".join(f"{each / 1e6:.3f}" for each in messages)
    print(
        f"instructions of a signed message of 2 KiB, everything on: {rounds_text} M in {len(messages)} rounds"
    )
    print(f"instructions of one unit of plain Python: {unit / 1e6:.3f} M")
    print(f"ratio: {now:.2f}; it took {time.monotonic() - begun:.0f} s")
    if given.write:
        REFERENCE.write_text(
            json.dumps({"ratio": round(now, 3), "python": platform.python_version()}, indent=1) + "\n"
        )
        print(f"written to {REFERENCE.name}")
        return 0
    gate = judge(now, json.loads(REFERENCE.read_text())["ratio"])
    print(gate)
    if gate.value is not None and gate.value < 2 - BOUND:
        print("note    messages are much cheaper than the reference says: `bench smoke --write` keeps it so")
    return 0 if gate.is_reached else FAILED


def judge(ratio: float, reference: float) -> Gate:
    """What has to hold of the ratio now."""
    return Gate("instructions of a message to those of the reference", ratio / reference, BOUND)


def total_of(profile: str) -> int:
    """The instructions in a file that callgrind wrote.  Its summary is of no use: it wraps around."""
    found = re.search(r"^totals: (\d+)$", profile, re.MULTILINE)
    if found is None:
        raise CannotRun("callgrind wrote no totals")
    return int(found[1])


def _count(rounds: int) -> tuple[list[float], float]:
    """Instructions of one message in each round, and of one unit of the workload."""
    for program in ("valgrind", "callgrind_control"):
        if shutil.which(program) is None:
            raise CannotRun(f"there is no {program}: apt-get install valgrind")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxgate-smoke-")))
        compile_programs(directory)
        unit = _count_workload(directory)
        corpus = make_corpus(directory, domains=DOMAINS, messages=MESSAGES, size_bytes=2 * KIB)
        name_server = stack.enter_context(NameServer(corpus.zone))
        sink = stack.enter_context(Sink(directory))
        starter = FullStarter(
            directory,
            sink.port,
            name_server.port,
            mxgate=f"{sys.executable} -m gateway",
            prefix=_callgrind(directory),
            env=ENVIRONMENT,
            timeout_s=START_TIMEOUT_S,
        )
        gateway = stack.enter_context(starter.start("mxgate"))
        return _count_messages(gateway, directory, corpus, sink, rounds), unit


def _count_messages(
    gateway: FullGateway, directory: Path, corpus: Corpus, sink: Sink, rounds: int
) -> list[float]:
    (worker,) = gateway.worker_pids()
    # two times: the first fills the caches, the second is the first that finds them
    for warm in range(2):
        sink.check(gateway.load(directory, corpus, MESSAGES, connections=1, first=warm * MESSAGES).run())
    counter = Counter(directory, worker)
    counter.begin()
    time.sleep(IDLE_S)
    idle_per_s = counter.end() / IDLE_S
    counted = []
    for number in range(rounds):
        counter.begin()
        sent = gateway.load(directory, corpus, MESSAGES, connections=1, first=(2 + number) * MESSAGES).run()
        counted.append((counter.end() - idle_per_s * sent.wall_s) / MESSAGES)
        sink.check(sent)
    return counted


def _count_workload(directory: Path) -> float:
    with subprocess.Popen(
        [*_callgrind(directory), sys.executable, str(WORKLOAD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise CannotRun("the workload does not start under valgrind")
        counter = Counter(directory, process.pid)
        counter.begin()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        counted = counter.end() / UNITS
        process.stdin.close()
    return counted


class Counter:
    """Counts the instructions of a process that runs under callgrind, from `begin` to `end`, any number of times."""

    def __init__(self, directory: Path, pid: int) -> None:
        self._directory = directory
        self._pid = pid
        self._dumps = 0

    def begin(self) -> None:
        self._tell("--instr=on")
        self._tell("--zero")

    def end(self) -> int:
        self._tell("--dump")
        self._dumps += 1
        self._tell("--instr=off")
        return total_of((self._directory / f"callgrind.{self._pid}.{self._dumps}").read_text())

    def _tell(self, what: str) -> None:
        done = subprocess.run(
            ["callgrind_control", what, str(self._pid)],
            capture_output=True,
            text=True,
            check=False,
            timeout=ATTACH_TIMEOUT_S,
        )
        if "OK" not in done.stdout:
            raise CannotRun(f"callgrind_control {what} says: {(done.stdout + done.stderr).strip()}")


def _callgrind(directory: Path) -> list[str]:
    return [
        "valgrind",
        "--tool=callgrind",
        "--instr-atstart=no",
        # a forked worker has no control port without it
        "--trace-children=yes",
        f"--callgrind-out-file={directory}/callgrind.%p",
        f"--log-file={directory}/valgrind.%p",
    ]
