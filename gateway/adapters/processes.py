"""What the processes of the gateway use of the machine, read from /proc (proc(5)); elsewhere nothing is shown.

The supervisor reads it for its workers too, so that one which hangs is seen to hang. CPU time is added up by the
worker's place (worker_1, worker_2, ...): it goes on where another process takes the place over.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gateway.services import Metrics

_PROC = Path("/proc")


class Use(NamedTuple):
    """What one process uses."""

    cpu_s: float
    resident_bytes: int
    fds: int


def use_of(pid: int, proc: Path = _PROC) -> Use | None:
    """What this process uses now; None where nobody can tell, as of a process that has ended."""
    of = proc / str(pid)
    try:
        # the fields behind the command's name, which may hold blanks; utime and stime are fields 14 and 15
        fields = (of / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        pages = int((of / "statm").read_text("ascii").split()[1])
        # since Linux 6.2 the directory's size is their number; before that it is 0
        fds = (of / "fd").stat().st_size or sum(1 for _ in os.scandir(of / "fd"))
    except (OSError, ValueError, IndexError):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Use(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"), fds)


class Processes:
    """Counts what the supervisor and its workers use."""

    def __init__(self, metrics: Metrics) -> None:
        self._cpu = metrics.counters(
            "mxgate_process_cpu_seconds_total", "Seconds of CPU that a process used", ("process",)
        )
        self._resident = metrics.gauges(
            "mxgate_process_resident_memory_bytes", "Octets of memory that a process has in RAM", ("process",)
        )
        self._fds = metrics.gauges(
            "mxgate_process_open_fds", "File descriptors that a process has open", ("process",)
        )
        self._max_fds = metrics.gauges(
            "mxgate_process_max_fds", "File descriptors that each process may have open"
        ).labels()
        self._seen: dict[int, float] = {}  # CPU by pid

    def look(self, workers: Iterable[tuple[int, int]]) -> None:
        """Read what they use; `workers` are numbers and pids. After a reload two processes may have one number."""
        processes = [("supervisor", os.getpid()), *((f"worker_{number}", pid) for number, pid in workers)]
        resident: Counter[str] = Counter()
        fds: Counter[str] = Counter()
        seen: dict[int, float] = {}
        for name, pid in processes:
            use = use_of(pid)
            if use is None:
                continue
            # a fork has used nothing itself: its clock begins with 0
            self._cpu.labels(name).inc(max(0.0, use.cpu_s - self._seen.get(pid, 0.0)))
            seen[pid] = use.cpu_s
            resident[name] += use.resident_bytes
            fds[name] += use.fds
        self._seen = seen
        self._max_fds.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for family, now in ((self._resident, resident), (self._fds, fds)):
            family.clear()
            for name, value in now.items():
                family.labels(name).set(value)
