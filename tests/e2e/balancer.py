"""A private HAProxy in front of a gateway, which tells it the clients' addresses in each way that HAProxy knows.

It connects to the gateway from an address of its own, `SOURCE`. Any user may run it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until

SOURCE = "127.0.0.9"
"""From where HAProxy connects to the gateway."""
_PROGRAM = "haproxy"
_HEAD = """\
global
    log stdout format raw local0
defaults
    mode tcp
    log global
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 3s
"""
_PROXY = """\
listen {name}
    bind {address[0]}:{address[1]}
{checks}    source {source}
    server gateway {server[0]}:{server[1]} {options}
"""


class Balancer:
    """Runs from construction to `close`; the test is skipped where there is none.

    `servers` are proxies by name: the gateway's address and the options of HAProxy's `server`. `smtp_checks` are the
    names of those whose health check is SMTP, and not only a connection.
    """

    def __init__(
        self, servers: Mapping[str, tuple[Address, str]], directory: Path, smtp_checks: tuple[str, ...] = ()
    ) -> None:
        require(program=_PROGRAM)
        self.addresses: dict[str, Address] = {name: (LOOPBACK, free_port()) for name in servers}
        proxies = [
            _PROXY.format(
                name=name,
                address=self.addresses[name],
                checks="    option smtpchk EHLO balancer.example.org\n" if name in smtp_checks else "",
                source=SOURCE,
                server=server,
                options=options,
            )
            for name, (server, options) in servers.items()
        ]
        configuration = directory / "haproxy.cfg"
        configuration.write_text(_HEAD + "".join(proxies), encoding="utf-8")
        self._log_file = directory / "haproxy.log"
        self._log = self._log_file.open("wb")
        self._process = subprocess.Popen(
            # -db: in the foreground
            [_PROGRAM, "-db", "-f", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            for address in self.addresses.values():
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
