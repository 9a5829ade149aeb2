"""DNS: a caching stub resolver for the policies (RFC 1034 5.3.1). It trusts the name servers that it is given.

    resolver: what policies wait for     cache, memory: what is known already     upstream: which server, how long
    stub: sockets    message: octets    reply: what was said    names: texts and labels

A question obeys `[dns] timeout_s`, a transaction's questions `[dns] total_timeout_s`, and a policy's the time that the
plan leaves it. Answers live as long as their TTL says, at most an hour; "no such name" and "no data" at most five
minutes; failures no longer than the transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.adapters.dns.resolver import CachingResolver, PolicyResolver
from gateway.adapters.dns.stub import Nameserver, Stub
from gateway.adapters.dns.system import system_nameservers
from gateway.adapters.dns.upstream import Upstream
from gateway.errors import GatewayError
from gateway.services import Instruments

__all__ = ["Dns", "DnsSettings", "DnsSettingsError", "Nameserver", "PolicyResolver"]


class DnsSettingsError(GatewayError):
    """The name servers cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class DnsSettings:
    """[dns]: the system's name servers when there are none."""

    nameservers: tuple[Nameserver, ...] = ()
    timeout_s: float = 5.0
    total_timeout_s: float = 20.0


class Dns(CachingResolver):
    """The resolver of one worker. Made in a running loop; raises DnsSettingsError."""

    def __init__(self, settings: DnsSettings, instruments: Instruments) -> None:
        servers = settings.nameservers or system_nameservers()
        try:
            self._stub = Stub(servers)
        except OSError as exc:
            raise DnsSettingsError(
                f"the name servers {', '.join(map(str, servers))} cannot be used: {exc}"
            ) from exc
        self._servers = Upstream(servers, self._stub, instruments, settings.timeout_s)
        super().__init__(
            self._servers,
            instruments,
            total_timeout_s=settings.total_timeout_s,
            question_timeout_s=settings.timeout_s,
        )

    def state(self) -> dict[str, object]:
        """For /readyz: the name servers and how they do."""
        servers = self._servers
        state: dict[str, object] = {
            "nameservers": [str(each) for each in servers.servers],
            "unanswered": servers.unanswered,
        }
        if servers.failing_since is not None:
            state["failing_since"] = servers.failing_since
        return state

    async def close(self) -> None:
        """End all that is under way and close all sockets."""
        await super().close()
        await self._stub.close()
