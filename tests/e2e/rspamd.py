"""A real rspamd from Debian on a free port, in a private directory: no map, no list and no DNS outside of it."""

from __future__ import annotations

import urllib.request

from tests.e2e.daemon import Daemon
from tests.e2e.net import LOOPBACK
from tests.e2e.nowhere import nowhere

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


class RspamdServer(Daemon):
    """One rspamd. The test string GTUBE is spam to it."""

    def __init__(self) -> None:
        super().__init__("rspamd")
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
        self.start(["-f", "-i", "-c", str(config), *given])

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def log(self) -> str:
        """What it wrote so far."""
        return (self.directory / "rspamd.log").read_text("utf-8", "replace")

    def answers(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/ping", timeout=5) as response:
            return bool(response.read().strip() == b"pong")
