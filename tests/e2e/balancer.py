"""A private HAProxy in front of a gateway, which tells it the clients' addresses in each way that HAProxy knows.

It connects to the gateway from an address of its own, `SOURCE`. Any user may run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.e2e.haproxy import HAProxyProcess
from tests.e2e.net import LOOPBACK, Address, free_port

SOURCE = "127.0.0.9"
"""From where HAProxy connects to the gateway."""
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


class Balancer(HAProxyProcess):
    """In front of gateways, from construction to `close`.

    `servers` are proxies by name: the gateway's address and the options of HAProxy's `server`. `smtp_checks` are the
    names of those whose health check is SMTP, and not only a connection.
    """

    def __init__(
        self, servers: Mapping[str, tuple[Address, str]], directory: Path, smtp_checks: tuple[str, ...] = ()
    ) -> None:
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
        super().__init__(_HEAD + "".join(proxies), directory, self.addresses.values())
