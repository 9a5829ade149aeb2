"""A private HAProxy that wants the PROXY header in front of a downstream, and passes the client on to it in one more.

It logs the client's address of each connection as it has read it from the header. Any user may run it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until

_PROGRAM = "haproxy"
_CONFIGURATION = """\
global
    log stdout format raw local0
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend smtp
    bind {address}:{port} accept-proxy
    log global
    # logged when the client's address is known, not at the end of the connection
    option logasap
    log-format client=%ci
    default_backend downstream
backend downstream
    server downstream {downstream} send-proxy-v2
"""


class HAProxyProcess:
    """An HAProxy with this configuration from construction to `close`; the test is skipped where there is none.

    `addresses` are those on which it has to listen before it counts as started.
    """

    def __init__(self, configuration: str, directory: Path, addresses: Iterable[Address]) -> None:
        require(program=_PROGRAM)
        file = directory / "haproxy.cfg"
        file.write_text(configuration, encoding="utf-8")
        self._log_file = directory / "haproxy.log"
        self._log = self._log_file.open("wb")
        self._process = subprocess.Popen(
            # -db: in the foreground
            [_PROGRAM, "-db", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            for address in addresses:
                wait_until(partial(is_listening, address), within_s=10, what="HAProxy listens")
        except AssertionError as exc:
            self.close()
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def close(self) -> None:
        """Stop it, with its connections."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._log.close()

    def log(self) -> str:
        """What it wrote so far: servers that went down or up among it."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")


class HAProxy(HAProxyProcess):
    """Wants the PROXY header; `downstream` has to read one, too."""

    def __init__(self, downstream: Address, directory: Path) -> None:
        self.address: Address = (LOOPBACK, free_port())
        host, port = self.address
        configuration = _CONFIGURATION.format(
            address=host, port=port, downstream=f"{downstream[0]}:{downstream[1]}"
        )
        super().__init__(configuration, directory, [self.address])

    def clients(self) -> set[str]:
        """The clients' addresses of the connections so far, as the PROXY headers said."""
        return {
            line.removeprefix("client=") for line in self.log().splitlines() if line.startswith("client=")
        }
