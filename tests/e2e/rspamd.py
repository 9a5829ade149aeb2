"""A real rspamd from Debian on a free port, in a private directory: no map, no list and no DNS outside of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, free_port, wait_until
from tests.e2e.nowhere import nowhere

_START_S = 100
# Modules that ask the world, or want a Redis.
_OFF = (
    *("asn", "rbl", "hfilter", "surbl", "fuzzy_check", "greylist", "phishing", "mid", "rspamd_update"),
    *("bayes_expiry", "neural", "url_redirector", "elastic", "clickhouse", "history_redis", "ratelimit"),
    *("replies", "dcc", "dmarc", "mx_check", "once_received", "reputation", "antivirus"),
)
_CONFIG = """
.include "/etc/rspamd/common.conf"
options {{
    pidfile = "{directory}/rspamd.pid";
    .include "/etc/rspamd/options.inc"
    dns {{ nameserver = ["{dns_host}:{dns_port}"]; timeout = 0.1s; retransmits = 1; }}
}}
logging {{ type = "file"; filename = "{directory}/rspamd.log"; level = "info"; }}
worker "normal" {{ bind_socket = "{host}:{port}"; bind_socket = "{socket} mode=0666"; count = 1; }}
"""


class RspamdServer:
    """One rspamd from construction to `close`. The test string GTUBE is spam to it."""

    def __init__(self) -> None:
        require(program="rspamd")
        self.directory = Path(tempfile.mkdtemp(prefix="mxgate-rspamd-"))
        self.port = free_port()
        self.socket = self.directory / "s"
        overrides = self.directory / "local" / "override.d"
        overrides.mkdir(parents=True)
        for module in _OFF:
            (overrides / f"{module}.conf").write_text("enabled = false;\n")
        dns_host, dns_port = nowhere()
        config = self.directory / "rspamd.conf"
        config.write_text(
            _CONFIG.format(
                directory=self.directory,
                host=LOOPBACK,
                port=self.port,
                socket=self.socket,
                dns_host=dns_host,
                dns_port=dns_port,
            )
        )
        variables = {"LOCAL_CONFDIR": self.directory / "local"}
        variables |= dict.fromkeys(("DBDIR", "RUNDIR", "LOGDIR"), self.directory)
        given = [f"--var={name}={value}" for name, value in variables.items()]
        with (self.directory / "out").open("wb") as out:
            self._process = subprocess.Popen(
                ["rspamd", "-f", "-i", "-c", str(config), *given],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, within_s=_START_S, what="rspamd answers")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def log(self) -> str:
        """What it wrote so far."""
        return (self.directory / "rspamd.log").read_text("utf-8", "replace")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.directory / "out").read_text("utf-8", "replace")
        try:
            with urllib.request.urlopen(f"{self.url}/ping", timeout=5) as response:
                return bool(response.read().strip() == b"pong")
        except OSError:
            return False
