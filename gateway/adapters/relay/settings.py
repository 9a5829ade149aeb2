"""What the relay needs to know; app.py makes it from the configuration, sections [relay] and [[relay.routes]].

A route has a tuple of hosts so that failover is an extension; for now the configuration gives it exactly one, and
the identity passed downstream is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.errors import GatewayError


class RelaySettingsError(GatewayError):
    """The relay cannot be built from these settings; the message says what to change."""


class TlsMode(StrEnum):
    """How a downstream's STARTTLS is used (RFC 3207)."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"  # when offered; the certificate is not checked
    ENCRYPT = "encrypt"  # no mail without it; the certificate is not checked
    VERIFY = "verify"  # no mail without it and without a certificate that is valid for `tls_name`


@dataclass(frozen=True, slots=True)
class HostSettings:
    """One downstream MTA: a name or an address (IPv6 without brackets), and how TLS is used there.

    `tls_name` is what its certificate must name; empty: `host`. `tls_ca_file` empty: the system's authorities.
    """

    host: str
    port: int
    tls: TlsMode = TlsMode.NONE
    tls_name: str = ""
    tls_ca_file: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """One route. `name` is a metric label; `domains` as "example.org", ".example.org" (subdomains), "*" (the rest)."""

    name: str
    domains: tuple[str, ...]
    hosts: tuple[HostSettings, ...]
    verify_recipients: bool = True


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """The relay as a whole; `hostname` is said in EHLO."""

    hostname: str
    routes: tuple[RouteSettings, ...]
    connect_timeout_s: float = 10.0
    # one reply before the dot, and how long a downstream may take none of the content's bytes
    reply_timeout_s: float = 60.0
    final_timeout_s: float = 300.0
    # DESIGN.md section 8: everything up to the dot, with waiting for a connection
    deliver_timeout_s: float = 60.0
    # The same for content that keeps moving; with 25 s of policies and final_timeout_s below the 10 minutes after
    # which senders give up (RFC 5321 4.5.3.2.6).
    deliver_moving_timeout_s: float = 240.0
    # DESIGN.md section 8: the RCPT stage has 20 s in all
    verify_timeout_s: float = 20.0
    # close() waits so long for replies to dots that were sent
    drain_timeout_s: float = 300.0
    max_connections_per_host: int = 50
    idle_timeout_s: float = 30.0
    recipient_cache_s: float = 300.0
    recipient_cache_negative_s: float = 60.0
    # about 0.3 KiB each
    recipient_cache_entries: int = 32768
    # until a downstream has answered for the first time: between two attempts
    probe_min_s: float = 1.0
    probe_max_s: float = 30.0
