"""processes: what a process uses is read from /proc, and CPU time never falls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.adapters import processes
from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.processes import Processes, Use, use_of
from tests.e2e.net import wait_until


def shown(metrics: ProcessMetrics, name: str) -> dict[tuple[str, ...], float]:
    (family,) = (each for each in metrics.families() if each.definition.name == f"mxgate_process_{name}")
    return {values: number for values, (number,) in family.children().items()}


def test_a_process_is_seen_to_use_what_it_uses() -> None:
    with (
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "x = bytearray(b'x' * 50_000_000)\nprint(1, flush=True)\nwhile True: pass",
            ],
            stdout=subprocess.PIPE,
        ) as child,
        open(os.devnull, "rb") as _,  # noqa: PTH123  # a descriptor
    ):
        try:
            assert child.stdout is not None
            child.stdout.readline()
            wait_until(
                lambda: (use := use_of(child.pid)) and use.cpu_s >= 0.2,
                within_s=30,
                what="CPU of a busy child",
            )
            use = use_of(child.pid)
            assert use is not None
            assert use.resident_bytes > 50_000_000
            assert use.fds == 3
        finally:
            child.kill()


def test_nobody_tells_of_a_process_that_is_not_there(tmp_path: Path) -> None:
    assert use_of(1, tmp_path) is None
    odd = tmp_path / "1"
    odd.mkdir()
    (odd / "stat").write_text("1 (a) S")
    (odd / "statm").write_text("")
    assert use_of(1, tmp_path) is None


def test_a_name_with_blanks_and_parentheses_hides_no_number(tmp_path: Path) -> None:
    of = tmp_path / "7"
    (of / "fd").mkdir(parents=True)
    tick = os.sysconf("SC_CLK_TCK")
    fields = [str(number) for number in range(4, 53)]
    fields[10], fields[11] = str(3 * tick), str(2 * tick)
    (of / "stat").write_text(f"7 (a ) 9 9 9 (b) S {' '.join(fields)}")
    (of / "statm").write_text("100 5 1 1 0 1 0")
    use = use_of(7, tmp_path)
    assert use is not None
    assert use[:2] == (5.0, 5 * os.sysconf("SC_PAGE_SIZE"))


def test_workers_are_counted_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, Use] = {os.getpid(): Use(10, 100, 5), 21: Use(1, 200, 6)}
    monkeypatch.setattr(processes, "use_of", used.get)
    metrics = ProcessMetrics()
    watch = Processes(metrics)
    watch.look([(1, 21)])
    assert shown(metrics, "cpu_seconds_total") == {("supervisor",): 10, ("worker_1",): 1}
    assert shown(metrics, "resident_memory_bytes") == {("supervisor",): 100, ("worker_1",): 200}
    # another process takes the place, and the old one still ends its sessions
    used[21], used[22] = Use(4, 250, 2), Use(0.5, 50, 3)
    watch.look([(1, 21), (1, 22)])
    assert shown(metrics, "cpu_seconds_total") == {("supervisor",): 10, ("worker_1",): 4.5}
    assert shown(metrics, "resident_memory_bytes")["worker_1",] == 300
    assert shown(metrics, "open_fds")["worker_1",] == 5
    del used[21], used[22]
    watch.look([(1, 22)])
    assert shown(metrics, "cpu_seconds_total") == {("supervisor",): 10, ("worker_1",): 4.5}
    assert shown(metrics, "open_fds") == {("supervisor",): 5}
    assert shown(metrics, "max_fds")[()] > 0
