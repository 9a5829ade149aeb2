"""The systems that are measured: how each is configured and started to forward to a sink.

mxgate          the real program, `mxgate serve`, one worker, the relay guard alone
aiosmtpd        peers/aiosmtpd_forwarder.py: aiosmtpd in front, smtplib behind
postfix-proxy   Debian's Postfix as a before-queue proxy (smtpd_proxy_filter)
"""

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.accounting import Group
from bench.peers import postfix_proxy
from bench.traffic import CannotRun, free_port

MXGATE = "mxgate"
AIOSMTPD = "aiosmtpd"
POSTFIX = "postfix-proxy"
SYSTEMS = (MXGATE, AIOSMTPD, POSTFIX)
AIOSMTPD_FORWARDER = Path(__file__).parent / "peers" / "aiosmtpd_forwarder.py"
START_TIMEOUT_S = 30.0
LOG_TAIL_LINES = 3

# No limit may shape the figures; all but the relay guard is off.
MXGATE_CONFIG = """\
[server]
hostname = "gw.example"
listen = ["127.0.0.1:{port}"]
workers = 1
max_connections = 10000
max_connections_per_client = 10000
spool_dir = "{spool}"

[relay]
domains = ["rcpt.example"]

[[relay.routes]]
domains = ["*"]
downstream = ["127.0.0.1:{sink_port}"]

[admin]
listen = "127.0.0.1:{admin_port}"

[policy.spf]
mode = "off"
[policy.dkim]
mode = "off"
[policy.arc]
mode = "off"
[policy.dmarc]
mode = "off"
[policy.greylist]
mode = "off"
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A started system that accepts connections.  A context manager; leaving it ends the system."""

    name: str
    port: int
    group: Group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.group.stop()


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts systems that forward to one sink, each in a directory of its own below `directory`.

    mxgate: the command to measure, as one would type it; empty: the one beside this Python.
    """

    directory: Path
    sink_port: int
    cpus: Collection[int] = ()
    mxgate: str = ""

    def start(self, name: str, instance: str = "") -> Running:
        """Raises CannotRun when it does not answer with a banner in time."""
        unique = name + instance
        directory = self.directory / unique
        directory.mkdir()
        port = free_port()
        command = self._command(name, directory, port)
        log_path = self.directory / f"{unique}.log"
        try:
            with log_path.open("wb") as log:
                group = Group(unique, command, log=log, cpus=self.cpus)
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotRun(f"it does not start as {shlex.join(command)}: {error}") from error
        try:
            wait_for_banner(port, group)
        except CannotRun as error:
            group.stop()
            said = " / ".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise CannotRun(f"{error}; it was started as {shlex.join(command)} and said: {said}") from error
        except BaseException:
            group.stop()
            raise
        return Running(name, port, group)

    def _command(self, name: str, directory: Path, port: int) -> Sequence[str]:
        match name:
            case "mxgate":
                (directory / "spool").mkdir()
                config = directory / "mxgate.toml"
                config.write_text(
                    MXGATE_CONFIG.format(
                        port=port, sink_port=self.sink_port, admin_port=free_port(), spool=directory / "spool"
                    )
                )
                program = shlex.split(self.mxgate) or [str(Path(sys.executable).with_name("mxgate"))]
                return [*program, "serve", "--config", str(config)]
            case "aiosmtpd":
                return [sys.executable, str(AIOSMTPD_FORWARDER), str(port), str(self.sink_port)]
            case "postfix-proxy":
                return postfix_proxy.write_instance(directory, port, self.sink_port)
            case _:
                raise CannotRun(f"no system is called {name}: there are {', '.join(SYSTEMS)}")


def wait_for_banner(port: int, group: Group, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return when a new connection is greeted with 220; raises CannotRun when that does not happen."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not group.is_running():
            raise CannotRun(f"it ended with {group.process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as probe:
                if probe.recv(4) == b"220 ":
                    probe.sendall(b"QUIT\r\n")
                    return
        except OSError:
            pass
        time.sleep(0.01)
    raise CannotRun(f"no banner within {timeout_s:.0f} s")
