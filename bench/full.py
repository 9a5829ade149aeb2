"""mxgate with everything on, in a world of its own: SPF, DKIM, ARC, DMARC, greylist (delay 0), metrics, JSON log.

The world is a corpus of signed messages, a name server that knows their senders, and where the state is; nothing else
of this machine or of any network is asked.  Used by the benchmarks that need no peer: smoke, soak, growth, workers.
"""

import asyncio
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bench.accounting import Group
from bench.corpus import Corpus
from bench.systems import LOG_TAIL_LINES, START_TIMEOUT_S, wait_for_banner
from bench.traffic import CannotRun, Load, free_port
from gateway.demo.nameserver import serve

CONFIG = """\
[server]
hostname = "gw.example"
listen = ["127.0.0.1:{port}"]
workers = {workers}
max_connections = 10000
max_connections_per_client = 10000
spool_dir = "{spool}"

[relay]
domains = ["rcpt.example"]

[[relay.routes]]
domains = ["*"]
downstream = ["127.0.0.1:{sink_port}"]

[dns]
nameservers = ["127.0.0.1:{dns_port}"]

[state]
url = "{state}"

[admin]
listen = "127.0.0.1:{admin_port}"

[log]
format = "json"

[policy.spf]
mode = "enforce"
[policy.dkim]
mode = "enforce"
[policy.arc]
mode = "enforce"
[policy.dmarc]
mode = "enforce"
[policy.greylist]
mode = "enforce"
[policy.greylist.settings]
delay_s = 0
"""


class NameServer:
    """Answers from a zone on a port of the loopback address, in a thread.  A context manager."""

    def __init__(self, zone: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._zone = zone
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="nameserver")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        transport = self._loop.run_until_complete(serve(self._socket, self._zone))
        self._loop.run_forever()
        transport.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


@dataclass(frozen=True, slots=True)
class FullGateway:
    """A gateway that answers.  A context manager; leaving it ends it."""

    port: int
    admin_port: int
    group: Group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.group.stop()

    def scrape(self) -> bytes:
        """Its metrics, merged over the workers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10) as reply:
            body: bytes = reply.read()
        return body

    def worker_pids(self) -> list[int]:
        """Its processes but the supervisor."""
        return [pid for pid in self.group.pids() if pid != self.group.process.pid]

    def load(
        self, programs: Path, corpus: Corpus, messages: int, *, connections: int = 20, first: int = 0
    ) -> Load:
        """Messages of the corpus in turn."""
        return Load(programs, self.port, 0, messages, connections, first, corpus=corpus.files)


@dataclass(frozen=True, slots=True)
class FullStarter:
    """Starts such gateways in front of one sink, each in a directory of its own below `directory`.

    mxgate: the command to measure, as one would type it; empty: the one beside this Python.
    prefix: what runs it (valgrind, for example).
    """

    directory: Path
    sink_port: int
    dns_port: int
    state: str = "memory:"
    cpus: Collection[int] = ()
    mxgate: str = ""
    prefix: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = START_TIMEOUT_S

    def start(self, name: str, *, workers: int = 1) -> FullGateway:
        """Raises CannotRun when it does not answer with a banner in time."""
        directory = self.directory / name
        (directory / "spool").mkdir(parents=True)
        port, admin_port = free_port(), free_port()
        config = directory / "mxgate.toml"
        config.write_text(
            CONFIG.format(
                port=port,
                admin_port=admin_port,
                workers=workers,
                spool=directory / "spool",
                sink_port=self.sink_port,
                dns_port=self.dns_port,
                state=self.state,
            )
        )
        program = shlex.split(self.mxgate) or [str(Path(sys.executable).with_name("mxgate"))]
        command = [*self.prefix, *program, "serve", "--config", str(config)]
        log_path = self.directory / f"{name}.log"
        try:
            with log_path.open("wb") as log:
                group = Group(name, command, log=log, cpus=self.cpus, env=self.env)
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotRun(f"it does not start as {shlex.join(command)}: {error}") from error
        try:
            wait_for_banner(port, group, timeout_s=self.timeout_s)
        except CannotRun as error:
            group.stop()
            said = " / ".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise CannotRun(f"{error}; it was started as {shlex.join(command)} and said: {said}") from error
        except BaseException:
            group.stop()
            raise
        return FullGateway(port, admin_port, group)

    def start_timed(self, name: str) -> tuple[FullGateway, float]:
        """The gateway, and the seconds from the start of its process to its first 220."""
        begun = time.monotonic()
        gateway = self.start(name)
        return gateway, time.monotonic() - begun
