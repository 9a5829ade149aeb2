"""What the relay needs to know; app.py makes it from the configuration, sections [relay] and [[relay.routes]]."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.errors import GatewayError


class RelaySettingsError(GatewayError):
    """The relay cannot be built from these settings; the message says what to change."""


class TlsMode(StrEnum):
    """How TLS is used towards a downstream (RFC 3207, or from the first byte)."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"  # when offered; the certificate is not checked
    ENCRYPT = "encrypt"  # no mail without it; the certificate is not checked
    VERIFY = "verify"  # no mail without it and without a certificate that is valid for `tls_name`


class Protocol(StrEnum):
    """What a route's downstreams speak."""

    SMTP = "smtp"
    LMTP = "lmtp"  # RFC 2033; one recipient in a transaction, since it answers for each after the dot


class Identity(StrEnum):
    """How a route's downstreams learn who the client is."""

    NONE = "none"
    XFORWARD = "xforward"  # for their log; where it is not offered the mail goes on without
    XCLIENT = "xclient"  # as if the client had connected itself; never without
    PROXY_V2 = (
        "proxy-v2"  # the same, by a header in front of everything (HAProxy's PROXY protocol, version 2)
    )


@dataclass(frozen=True, slots=True)
class HostSettings:
    """One downstream MTA: a name or an address (IPv6 without brackets), and how TLS is used there.

    `tls_name` is what its certificate must name; empty: `host`. `tls_ca_file` empty: the system's authorities.
    `tls_implicit`: TLS from the first byte instead of STARTTLS; only with `tls` encrypt or verify.
    """

    host: str
    port: int
    tls: TlsMode = TlsMode.NONE
    tls_name: str = ""
    tls_ca_file: str = ""
    tls_implicit: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """One route. `name` is a metric label; `domains` as "example.org", ".example.org" (subdomains), "*" (the rest).

    The hosts of a group share the work; `groups` stand in order of preference.
    """

    name: str
    domains: tuple[str, ...]
    groups: tuple[tuple[HostSettings, ...], ...]
    verify_recipients: bool = True
    protocol: Protocol = Protocol.SMTP
    identity: Identity = Identity.NONE


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """The relay as a whole; `hostname` is said in EHLO."""

    hostname: str
    routes: tuple[RouteSettings, ...]
    # for a host's TCP connection; then as long again for TLS, banner and EHLO; and for the first reply of a connection
    # that has been idle
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
    # until a downstream has answered for the first time, and while it is down: between two attempts
    probe_min_s: float = 1.0
    probe_max_s: float = 30.0
