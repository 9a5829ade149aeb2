"""CPU and memory of process trees."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from bench.accounting import Group, Meter, ProcMeter, new_meter

BURN_S = 0.4
BURN = f"import time\nwhile time.process_time() < {BURN_S}: pass\n"
IDLE = "import time; time.sleep(60)"


def python(*lines: str) -> list[str]:
    return [sys.executable, "-S", "-c", "\n".join(lines)]


METERS: list[Callable[[], Meter]] = [lambda: new_meter("test"), ProcMeter]


@pytest.fixture(params=METERS, ids=["best", "proc"])
def meter(request: pytest.FixtureRequest) -> Meter:
    """What this machine has (a cgroup, where one may be made), and what every machine has."""
    made: Meter = request.param()
    return made


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_counts_a_burning_child(meter: Meter) -> None:
    parent = python(
        "import subprocess, sys, time",
        f"subprocess.Popen([sys.executable, '-S', '-c', {BURN + IDLE!r}])",
        IDLE,
    )
    with Group("test", parent, meter=meter) as group:
        wait_for(lambda: group.cpu_s() >= BURN_S - 0.05)
        assert len(group.pids()) == 2


def test_counts_a_child_that_has_ended(meter: Meter) -> None:
    parent = python(
        "import subprocess, sys, time", f"subprocess.run([sys.executable, '-S', '-c', {BURN!r}])", IDLE
    )
    with Group("test", parent, meter=meter) as group:
        wait_for(lambda: group.cpu_s() >= BURN_S - 0.05 and len(group.pids()) == 1)
        group.wait_quiet(limit_s=5.0)
        assert BURN_S - 0.05 <= group.cpu_s() < BURN_S + 2.0


def test_does_not_count_others(meter: Meter) -> None:
    with Group("test", python(IDLE), meter=meter) as group:
        group.wait_quiet()
        before_s = group.cpu_s()
        subprocess.run(python(BURN), check=True)
        assert group.cpu_s() - before_s < 0.1


def test_waits_until_the_work_is_done(meter: Meter) -> None:
    with Group("test", python(BURN, IDLE), meter=meter) as group:
        group.wait_quiet()
        assert group.cpu_s() >= BURN_S - 0.05


def test_memory_includes_children(meter: Meter) -> None:
    big = "block = bytearray(b'x') * (32 << 20)"
    parent = python(
        "import subprocess, sys",
        f"subprocess.Popen([sys.executable, '-S', '-c', {big + chr(10) + IDLE!r}])",
        IDLE,
    )
    with Group("test", parent, meter=meter) as group:
        wait_for(lambda: group.pss_mib() > 32)


def test_runs_on_the_cores_it_is_given() -> None:
    core = min(os.sched_getaffinity(0))
    allowed = os.sched_getaffinity(0)
    with Group("test", python(IDLE), cpus=[core]) as group:
        assert os.sched_getaffinity(group.process.pid) == {core}
    assert os.sched_getaffinity(0) == allowed


def test_leaves_no_process_behind(meter: Meter) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    parent = python(
        "import subprocess, sys",
        f"subprocess.Popen([sys.executable, '-S', '-c', {stubborn + chr(10) + IDLE!r}])",
        IDLE,
    )
    with Group("test", parent, meter=meter) as group:
        wait_for(lambda: len(group.pids()) == 2)
        pids = group.pids()
    assert group.process.returncode == -signal.SIGTERM
    # A killed grandchild may stay for a moment as a zombie of whoever inherited it.
    assert [pid for pid in pids if is_alive(pid)] == []


def test_kills_what_does_not_end_when_told(meter: Meter) -> None:
    stubborn = python("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)", IDLE)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output, os.fdopen(writing, "wb") as log:
        group = Group("test", stubborn, log=log, meter=meter)
        output.readline()
        group.stop(patience_s=0.2)
    assert group.process.returncode == -signal.SIGKILL


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a pseudo-file
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
