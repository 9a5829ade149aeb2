"""A private unbound with a closed root: it knows what it is told, and asks nobody on this or any other network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import dns.exception
import dns.message
import dns.query

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

_PROGRAM = "unbound"
_CONFIGURATION = """\
server:
    interface: {host}@{port}
    port: {port}
    do-ip6: no
    chroot: ""
    username: ""
    directory: "{directory}"
    pidfile: ""
    use-syslog: no
    # nothing is asked of anybody: every name that is not here does not exist
    local-zone: "." static
    # and not what unbound itself says of this name
    local-zone: "localhost." always_nxdomain
    local-data: '. 3600 IN SOA ns.invalid. hostmaster.invalid. 1 3600 600 86400 300'
{data}
remote-control:
    control-enable: no
"""


class Unbound:
    """A recursive server with these records from construction to `close`; the test is skipped where there is none.

    `records` is the text of master-file lines with absolute names and no continuation:
    `a.example.org. 300 IN A 192.0.2.1`. It follows no CNAME among them, and leaves that to who asks.
    """

    def __init__(self, records: str, directory: Path) -> None:
        require(program=_PROGRAM)
        self.address: Address = (LOOPBACK, free_port())
        self._records = records
        self._directory = directory
        self._log_file = directory / "unbound.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again after `stop`, at the same address."""
        host, port = self.address
        lines = [line.strip() for line in self._records.splitlines()]
        data = "\n".join(f"    local-data: '{line}'" for line in lines if line)
        file = self._directory / "unbound.conf"
        file.write_text(
            _CONFIGURATION.format(host=host, port=port, directory=self._directory, data=data),
            encoding="utf-8",
        )
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [_PROGRAM, "-d", "-c", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, within_s=10, what="unbound answers")
        except AssertionError as exc:
            self.stop()
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def stop(self) -> None:
        """Stop it; what is asked from now on, nobody answers."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    close = stop

    def log(self) -> str:
        """What it wrote so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def _answers(self) -> bool:
        host, port = self.address
        query = dns.message.make_query(".", "SOA")
        try:
            dns.query.udp(query, host, timeout=0.2, port=port)
        except (OSError, dns.exception.DNSException):
            return False
        return True
