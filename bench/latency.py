"""How long a client waits for the reply to its final dot, at half of what each system carries.

Each system's capacity is measured first: 20 connections that never wait.  Then messages begin at half that rate, at
random intervals, so that they meet as strangers' mail does; the downstream alone gets the rate of the fastest.  The
systems take turns.

They are those of the performance lab (lab.py), with its DNS, Redis and messages, in namespaces as its run.sh makes
them; the clients and the downstream are ours, since the lab's know no rate.
`measure` starts `python -m bench.latency` in there.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.accounting import Group
from bench.lab import Lab
from bench.measure import Cores
from bench.systems import wait_for_banner
from bench.traffic import CannotRun, CorpusFiles, Load, Sink, compile_programs

DOWNSTREAM = "downstream"
SINK_PORT, SERVER = 2500, "203.0.114.1"
WARM_UP = 1000  # of them Haraka's compiler is content
CONNECTIONS, MOST_AT_ONCE = 20, 200
CAPACITY_S, ROUND_S = 3.0, 4.0
LIMIT_S = 600.0
# As the lab's run.sh has it, but for what is run at the end.
NAMESPACES = r"""
ip link set lo up; ip addr add 203.0.114.1/24 dev lo
echo "nameserver 127.0.0.1" >"$LAB_WORK/run/resolv.conf"; mount --bind "$LAB_WORK/run/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o mode=755 tmpfs "$LAB_SHM"; cp -a "$LAB_WORK/etc" "$LAB_SHM/etc"; mkdir "$LAB_SHM/run"
sysctl -qw net.ipv4.tcp_tw_reuse=1 net.ipv4.ip_local_port_range="2600 65000" net.core.somaxconn=4096 2>/dev/null || true
ulimit -n 20000
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one system, medians over the rounds: from the final dot to the reply, at `rate_per_s`."""

    capacity_per_s: float | None  # None: the downstream alone, whose capacity is not asked
    rate_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def measure(lab: Lab, systems: Sequence[str], *, rounds: int) -> dict[str, Latency]:
    """By system, with DOWNSTREAM; who does not start is not there.  Raises CannotRun when nothing can be measured."""
    with tempfile.TemporaryDirectory(prefix="mxgate-latency-") as directory:
        out = Path(directory, "latency.json")
        inner = [sys.executable, "-m", "bench.latency", ",".join(systems), str(rounds), str(out)]
        environment = {
            "LAB": str(lab.directory),
            "LAB_WORK": str(lab.work),
            "LAB_SHM": str(lab.shm),
            "MXGATE": lab.mxgate,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        lab.shm.mkdir(exist_ok=True)
        # one measurement at a time, the lab's own too
        command = ["flock", str(lab.work / "run.lock"), "unshare", "--mount", "--net", "--pid", "--fork"]
        command += ["--kill-child", "--mount-proc", "bash", "-euc", NAMESPACES, "latency", *inner]
        try:
            subprocess.run(
                command, stdout=sys.stderr, env=os.environ | environment, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CannotRun(f"not done within {LIMIT_S:.0f} s") from error
        if not out.exists():
            raise CannotRun("it ended without a result")
        return {name: Latency(**one) for name, one in json.loads(out.read_text()).items()}


def fill(text: str, values: Mapping[str, str]) -> str:
    """The lab's templates: what stands between @ signs is replaced, if it is known."""
    return re.sub(r"@([A-Z_]+)@", lambda found: values.get(found[1], found[0]), text)


class _Inside:
    """The lab's servers, in its namespaces."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._lab, self._work, self._shm = (Path(os.environ[name]) for name in ("LAB", "LAB_WORK", "LAB_SHM"))
        self._directory = directory
        self._stack = stack
        self._cores = Cores.choose()
        self._sent = 0
        if self._cores.load:
            os.sched_setaffinity(0, self._cores.load)  # clients, downstream, DNS and Redis inherit it
        compile_programs(directory)
        self._start("dns", ["nsd", "-d", "-c", f"{self._shm}/etc/nsd.conf"], frozenset())
        redis = ["redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._start("redis", [*redis, "--dir", str(self._shm)], frozenset())
        self.sink = stack.enter_context(Sink(directory, port=SINK_PORT))

    def start(self, name: str) -> tuple[int, Group]:
        """One of the lab's systems: its port and its processes.  Raises CannotRun when it does not answer."""
        definition = tomllib.loads((self._lab / "systems" / f"{name}.toml").read_text())
        port = int(definition["port"])
        config = self._directory / f"{name}.conf"
        environment = {"PORT": str(port), "SINK_PORT": str(SINK_PORT), **definition.get("env", {})}
        values = {
            "LAB": str(self._lab),
            "WORK": str(self._work),
            "SHM": str(self._shm),
            "PY": f"{self._work}/venv/bin/python",
            "CONFIG": str(config),
            **environment,
        }
        if "config" in definition:
            config.write_text(fill((self._lab / "conf" / definition["config"]).read_text(), values))
        (command,) = (fill(each, values) for each in definition["start"])
        group = self._start(name, ["bash", "-c", command], self._cores.system, environment)
        wait_for_banner(port, group, timeout_s=60.0)
        return port, group

    def load(self, port: int, messages: int, rate: float = 0.0) -> Load:
        """Messages of the lab's corpus, none a second time before all were sent."""
        first, self._sent = self._sent, self._sent + messages
        corpus = CorpusFiles(self._work / "data" / "2k.idx", self._work / "data" / "2k.dat")
        at_once = MOST_AT_ONCE if rate else CONNECTIONS
        return Load(
            self._directory, port, 0, messages, at_once, first, corpus=corpus, address=SERVER, rate=rate
        )

    def load_sink(self, messages: int, rate: float) -> Load:
        """The same to the downstream, which is on the loopback address."""
        first, self._sent = self._sent, self._sent + messages
        return Load(self._directory, self.sink.port, 2048, messages, MOST_AT_ONCE, first, rate=rate)

    def _start(
        self, name: str, command: Sequence[str], cpus: frozenset[int], env: Mapping[str, str] | None = None
    ) -> Group:
        log = self._stack.enter_context((self._directory / f"{name}.log").open("wb"))
        return self._stack.enter_context(Group(name, command, log=log, cpus=cpus, env=env))


def main(systems: Sequence[str], rounds: int, out: Path) -> None:
    """Measure inside the namespaces."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxgate-latency-")))
        inside = _Inside(directory, stack)
        ports: dict[str, int] = {}
        rates: dict[str, float] = {}
        capacities: dict[str, float | None] = {}
        for name in systems:
            try:
                port, group = inside.start(name)
                inside.sink.check(inside.load(port, WARM_UP).run())
                first = inside.load(port, WARM_UP // 2).run()
                inside.sink.check(first)
                sent = inside.load(port, max(100, round(CAPACITY_S * first.accepted / first.wall_s))).run()
                inside.sink.check(sent)
                group.wait_quiet()
            except (CannotRun, OSError) as error:
                print(f"latency: {name} is left out: {error}", file=sys.stderr)
                continue
            ports[name], capacities[name] = port, sent.accepted / sent.wall_s
            rates[name] = sent.accepted / sent.wall_s / 2
        if not rates:
            sys.exit("latency: no system runs")
        fastest = max(rates, key=rates.__getitem__)
        rates[DOWNSTREAM], capacities[DOWNSTREAM] = rates[fastest], None
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rates}
        for _ in range(rounds):
            for name, rate in rates.items():
                messages = max(100, round(rate * ROUND_S))
                load = (
                    inside.load_sink(messages, rate)
                    if name == DOWNSTREAM
                    else inside.load(ports[name], messages, rate)
                )
                sent = load.run()
                inside.sink.check(sent)
                found[name].append((sent.dot_p50_ms, sent.dot_p95_ms, sent.dot_p99_ms))
                print(f"  {name}: {rate:.0f}/s, p99 {sent.dot_p99_ms:.1f} ms", file=sys.stderr, flush=True)
    result = {}
    for name, done in found.items():
        p50, p95, p99 = (statistics.median(column) for column in zip(*done, strict=True))
        result[name] = asdict(Latency(capacities[name], rates[name], p50, p95, p99))
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3]))
