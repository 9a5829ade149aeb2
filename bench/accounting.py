"""Groups of processes whose CPU time and memory count together.

A group is a server that the benchmark started, with everything that it starts in turn.  Its CPU time is what its
own cgroup counted (v1 cpuacct or v2 cpu.stat): exact, and with the processes that ended.  Where no cgroup may be made,
it is summed from /proc/PID/stat over the process tree, with the children that were waited for: in steps of a clock
tick per process, and without those who left the tree (daemons that fork twice).

Its memory is the proportional set size (PSS): pages that processes share are counted once.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

CGROUP_ROOT = Path("/sys/fs/cgroup")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
QUIET_STEP_S = 0.05
QUIET_CPU_S = 0.002  # less CPU than this in a step: nothing is being worked off


class Meter(Protocol):
    """Counts the CPU time of one group."""

    kind: str

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` so that it counts, with all that it starts."""
        ...

    def cpu_s(self, root: int) -> float: ...

    def pids(self, root: int) -> list[int]: ...

    def close(self) -> None:
        """Give back what the system holds for it; the processes have ended."""


class CgroupMeter:
    """A cgroup of its own; `read_s` reads its counter."""

    def __init__(self, path: Path, kind: str, read_s: Callable[[Path], float]) -> None:
        self.kind = kind
        self._path = path
        self._read_s = read_s
        path.mkdir()

    def wrap(self, command: Sequence[str]) -> list[str]:
        # A shell that enters the cgroup and becomes the command; a function between fork and exec does not do where
        # there are threads.
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self._path / "cgroup.procs"), *command]

    def cpu_s(self, root: int) -> float:
        return self._read_s(self._path)

    def pids(self, root: int) -> list[int]:
        return [int(pid) for pid in (self._path / "cgroup.procs").read_text().split()]

    def close(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # a process that will not die: the empty directory is all that stays
            self._path.rmdir()


class ProcMeter:
    """The sum of /proc/PID/stat over the tree below the root."""

    kind = "/proc"

    def wrap(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def cpu_s(self, root: int) -> float:
        total = 0
        for pid in self.pids(root):
            with contextlib.suppress(OSError, IndexError):
                total += sum(int(ticks) for ticks in _stat(pid)[11:15])  # utime stime cutime cstime
        return total * TICK_S

    def pids(self, root: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                pid = int(entry.name)
                children.setdefault(int(_stat(pid)[1]), []).append(pid)
        found: list[int] = []
        waiting = [root]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += children.get(pid, [])
        return found

    def close(self) -> None:
        pass


def new_meter(name: str) -> Meter:
    """The best meter that this machine allows."""
    unique = f"mxgate-bench-{os.getpid()}-{name}"
    for parent, kind, read_s in _cgroup_parents():
        with contextlib.suppress(OSError):
            meter = CgroupMeter(parent / unique, kind, read_s)
            if subprocess.run(meter.wrap(["true"]), capture_output=True, check=False).returncode == 0:
                return meter
            meter.close()  # it could be made, but not entered
    return ProcMeter()


class Group:
    """One started program and everything below it.  A context manager: leaving it ends them all."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: IO[bytes] | int = subprocess.DEVNULL,
        cpus: Collection[int] = (),
        env: Mapping[str, str] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.name = name
        self.meter = meter or new_meter(name)
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, cpus or allowed)  # what is started here inherits it
            self.process = subprocess.Popen(
                self.meter.wrap(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        except BaseException:
            self.meter.close()
            raise
        finally:
            os.sched_setaffinity(0, allowed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def is_running(self) -> bool:
        return self.process.poll() is None

    def cpu_s(self) -> float:
        return self.meter.cpu_s(self.process.pid)

    def pids(self) -> list[int]:
        return self.meter.pids(self.process.pid)

    def pss_mib(self, pids: Collection[int] | None = None) -> float:
        """Of these of its processes; None: of all."""
        return sum(_pss_kib(pid) for pid in (self.pids() if pids is None else pids)) / 1024

    def wait_quiet(self, quiet_s: float = 0.3, limit_s: float = 60.0) -> None:
        """Return when the group has used no CPU for `quiet_s`: what it still owed to the last load is paid."""
        end = time.monotonic() + limit_s
        busy = time.monotonic()
        last = self.cpu_s()
        while time.monotonic() - busy < quiet_s and time.monotonic() < end:
            time.sleep(QUIET_STEP_S)
            cpu = self.cpu_s()
            if cpu - last > QUIET_CPU_S:
                busy = time.monotonic()
            last = cpu

    def stop(self, patience_s: float = 10.0) -> None:
        """End every process: SIGTERM to the first, and SIGKILL to whoever is left when it ended or patience did."""
        known = self._births()
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            known |= self._births()
            self.process.kill()
            self.process.wait()
        known |= self._births()
        deadline = time.monotonic() + patience_s
        while (
            left := [pid for pid, birth in known.items() if _birth(pid) == birth]
        ) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.meter.close()

    def _births(self) -> dict[int, str]:
        """The living processes.  A number with another birth belongs to a stranger."""
        return {pid: birth for pid in self.pids() if (birth := _birth(pid))}


def _cgroup_parents() -> Iterator[tuple[Path, str, Callable[[Path], float]]]:
    """Where a cgroup with a CPU counter may perhaps be made: below our own, else at the root of what we see."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "cpuacct" in controllers.split(","):
                for base in (CGROUP_ROOT / "cpuacct", CGROUP_ROOT / controllers):
                    for parent in (base / path.lstrip("/"), base):
                        if (parent / "cpuacct.usage").exists():
                            yield parent, "cgroup v1", _usage_v1
            elif not controllers:
                for parent in (CGROUP_ROOT / path.lstrip("/"), CGROUP_ROOT):
                    if (parent / "cgroup.controllers").exists():
                        yield parent, "cgroup v2", _usage_v2


def _usage_v1(path: Path) -> float:
    return int((path / "cpuacct.usage").read_text()) / 1e9


def _usage_v2(path: Path) -> float:
    found = re.search(r"^usage_usec (\d+)", (path / "cpu.stat").read_text(), re.MULTILINE)
    return int(found[1]) / 1e6 if found else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the command's name: state, ppid, pgrp, session, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _birth(pid: int) -> str:
    """When the process began, in ticks since the system did; "" if there is none, or only its remains (a zombie)."""
    with contextlib.suppress(OSError, IndexError):
        fields = _stat(pid)
        return "" if fields[0] == "Z" else fields[19]
    return ""


def _pss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0
