"""Why the policy of a domain owner is not applied to mail that fails: what the operator knows better (RFC 9989 5.4).

An override changes what becomes of the mail, never its result. Whoever is listed is listed by what was proved: the
client's address, or a domain that passed SPF or DKIM; names that anybody may write into a message prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from gateway.api import AuthResult, Result
from policies.verify.dmarc.judge import Identifier
from policies.verify.domain_list import DomainList


class OverrideReason(StrEnum):
    """RFC 9990 3.1.1.6: PolicyOverrideType, the words of ours."""

    LOCAL_POLICY = "local_policy"
    MAILING_LIST = "mailing_list"
    TRUSTED_FORWARDER = "trusted_forwarder"


class Override(NamedTuple):
    """A reason and what it rests on, in plain words."""

    reason: OverrideReason
    why: str

    def __str__(self) -> str:
        return f"policy not applied: {self.reason}, {self.why}"


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the operator lists."""

    author_domains: DomainList
    forwarder_networks: tuple[IPv4Network | IPv6Network, ...]
    forwarder_domains: DomainList
    list_domains: DomainList

    def find(
        self,
        author: str,
        client: IPv4Address | IPv6Address,
        identified: Sequence[Identifier],
        results: Iterable[AuthResult],
    ) -> Override | None:
        """The first that holds; `client` is the client's own address."""
        if author in self.author_domains:
            return Override(OverrideReason.LOCAL_POLICY, f"{author} is an exception")
        sealer = _trusted_sealer(results, Result.PASS)
        if sealer:
            return Override(OverrideReason.LOCAL_POLICY, f"arc=pass of {sealer}")
        if any(client in network for network in self.forwarder_networks):
            return Override(OverrideReason.TRUSTED_FORWARDER, f"client {client}")
        passed = [each for each in identified if each.result is Result.PASS]
        for reason, listed in (
            (OverrideReason.TRUSTED_FORWARDER, self.forwarder_domains),
            (OverrideReason.MAILING_LIST, self.list_domains),
        ):
            for method, domain, _ in passed:
                if domain in listed:
                    return Override(reason, f"{method}=pass of {domain}")
        return None


def may_hold_later(results: Iterable[AuthResult]) -> bool:
    """Whether a listed sealer vouches for the author in a chain of which a key cannot be looked up for now."""
    return bool(_trusted_sealer(results, Result.TEMPERROR))


def _trusted_sealer(results: Iterable[AuthResult], result: Result) -> str:
    arc = [each for each in results if each.method == "arc" and each.result is result]
    return next(
        (value for each in arc for name, value in each.properties if name == "policy.trusted-sealer"), ""
    )
