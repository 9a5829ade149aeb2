"""The system's name servers (resolv.conf(5)), and nothing else of its settings: search lists are never used."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from gateway.adapters.dns.stub import Nameserver

RESOLV_CONF = Path("/etc/resolv.conf")

_LOCAL = (Nameserver("127.0.0.1"),)


def system_nameservers(file: Path = RESOLV_CONF) -> tuple[Nameserver, ...]:
    """Those of the file in their order; this machine where it names none or cannot be read, as resolv.conf(5) says."""
    try:
        text = file.read_text("utf-8", errors="replace")
    except OSError:
        return _LOCAL
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(Nameserver(str(ip_address(words[1]))))
            except ValueError:
                continue
    return tuple(dict.fromkeys(found)) or _LOCAL
