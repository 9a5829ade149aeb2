"""What metrics cost: a call of each kind, a push of a worker, and scrapes of four workers that have mail to forward.

Scrapes are timed from the request to the last octet while the load runs. The supervisor's CPU for one is taken from
many in a row, behind the load; its CPU without scrapes, under load, is what pushes cost.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.traffic import Load, Sink, compile_programs
from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.processes import use_of
from tests.e2e.gateway import Gateway, config_for
from tests.e2e.net import LOOPBACK, free_port

WORKERS = 4
ACCEPTED = {"text": "text/plain", "OpenMetrics": "application/openmetrics-text; version=1.0.0"}


class Scrapes(NamedTuple):
    """What many scrapes of one format took; times are of the client, `cpu_ms` of the supervisor for one."""

    name: str
    octets: int
    under_load_ms: Sequence[float]
    cpu_ms: float


def _call_us(call: Callable[[], object], count: int) -> float:
    """The best of seven."""
    best = float("inf")
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - begun)
    return best / count * 1e6


def calls(count: int) -> dict[str, float]:
    """Microseconds of a call."""
    metrics = ProcessMetrics()
    counter = metrics.counters("mxgate_a_total", "A").labels()
    histogram = metrics.histograms("mxgate_b_seconds", "B").labels()
    return {
        "inc()": _call_us(counter.inc, count),
        "observe()": _call_us(lambda: histogram.observe(0.02), count),
        "observe(), with a transaction": _call_us(
            lambda: histogram.observe(0.02, "1m80vxzckjnp001-1"), count
        ),
    }


class Loaded:
    """A gateway of four workers with all its default policies but the greylist, and a load that goes on."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        compile_programs(directory)
        self._directory = directory
        sink = stack.enter_context(Sink(directory))
        self._admin = f"{LOOPBACK}:{free_port()}"
        config = config_for(
            (LOOPBACK, sink.port),
            overrides={
                "server": {"workers": WORKERS, "max_connections_per_client": 1000},
                "relay": {"domains": ["rcpt.example"]},
                "admin": {"listen": self._admin},
                "state": {"url": "memory:"},
            },
        )
        self.gateway = Gateway(config, directory)
        stack.callback(self.gateway.kill)
        self.gateway.wait_ready()
        self.sent = 0
        self._is_over = threading.Event()

    def load(self) -> threading.Thread:
        """Messages, until `rest`."""
        self._is_over.clear()

        def send() -> None:
            while not self._is_over.is_set():
                done = Load(self._directory, self.gateway.address[1], 2048, 100, first=self.sent).run()
                assert not done.failed
                assert not done.refused
                self.sent += done.accepted

        thread = threading.Thread(target=send)
        thread.start()
        return thread

    def rest(self, thread: threading.Thread) -> None:
        self._is_over.set()
        thread.join()

    def scrape(self, accept: str) -> tuple[float, int]:
        """Milliseconds and octets."""
        request = urllib.request.Request(f"http://{self._admin}/metrics", headers={"Accept": accept})
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=30) as response:
            octets = len(response.read())
        return (time.perf_counter() - begun) * 1e3, octets

    def supervisor_cpu_s(self) -> float:
        use = use_of(self.gateway.process.pid)
        assert use is not None
        return use.cpu_s


def scrapes(loaded: Loaded, seconds: int, in_a_row: int) -> tuple[list[Scrapes], float, float]:
    """Each format; CPU of the supervisor for pushes, as a part of a core; messages a second."""
    thread = loaded.load()
    time.sleep(2)
    begun, before, sent = time.monotonic(), loaded.supervisor_cpu_s(), loaded.sent
    time.sleep(seconds)
    lasted = time.monotonic() - begun
    pushes = (loaded.supervisor_cpu_s() - before) / lasted
    per_second = (loaded.sent - sent) / lasted
    under_load: dict[str, list[tuple[float, int]]] = {name: [] for name in ACCEPTED}
    for _ in range(seconds):
        for name, accept in ACCEPTED.items():
            under_load[name].append(loaded.scrape(accept))
            time.sleep(0.5)
    loaded.rest(thread)
    found = []
    for name, accept in ACCEPTED.items():
        before = loaded.supervisor_cpu_s()
        for _ in range(in_a_row):
            loaded.scrape(accept)
        cpu_ms = (loaded.supervisor_cpu_s() - before) / in_a_row * 1e3
        times = [took for took, _ in under_load[name]]
        found.append(Scrapes(name, under_load[name][-1][1], times, cpu_ms))
    return found, pushes, per_second


def main(arguments: list[str]) -> None:
    """Measure and print."""
    is_quick = "--quick" in arguments
    for name, took in calls(20_000 if is_quick else 200_000).items():
        print(f"{name:30} {took:6.2f} us")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxgate-bench-")))
        found, pushes, per_second = scrapes(
            Loaded(directory, stack), 3 if is_quick else 15, 50 if is_quick else 300
        )
    print(f"\n{WORKERS} workers, {per_second:.0f} messages a second")
    print(f"pushes of all workers           {pushes * 100:5.2f} % of a core, of the supervisor")
    print("\nscrape        octets   median ms   highest ms   CPU ms   each 15 s, of a core")
    for each in found:
        median, highest = statistics.median(each.under_load_ms), max(each.under_load_ms)
        print(
            f"{each.name:12} {each.octets:7} {median:11.1f} {highest:12.1f} {each.cpu_ms:8.1f}"
            f" {each.cpu_ms / 15_000:22.3%}"
        )
