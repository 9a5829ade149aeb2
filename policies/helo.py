"""helo: what a client says in EHLO or HELO, and whether that can be (RFC 5321 4.1.1.1, 4.1.3, 4.1.4).

What is found has an action of its own; by default only who says that he is us is refused. RFC 5321 4.1.4 forbids to
refuse mail only because a name does not lead to the client, and honest clients say what they like: observe before you
refuse.

The strictest action of what is found counts. The refusal is 550 5.7.1 (450 4.7.1), which the engine holds until RCPT.
Trouble of DNS is no finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from gateway.api import (
    AddressError,
    AddressLiteral,
    AddressSource,
    Domain,
    Lookup,
    Policy,
    Question,
    Reply,
    RRType,
    Services,
    Session,
    Trust,
    Verdict,
    defer,
    proceed,
    reject,
)


class OnFinding(StrEnum):
    """What follows from a finding."""

    CONTINUE = "continue"
    DEFER = "defer"
    REJECT = "reject"


_ORDER = tuple(OnFinding)


@dataclass(frozen=True, slots=True)
class HeloSettings:
    """[policy.helo.settings]."""

    our_names: tuple[str, ...] = field(
        default=(), metadata={"doc": "our own names, domains and addresses; `.example.org`: names below it"}
    )
    on_our_name: OnFinding = field(
        default=OnFinding.REJECT, metadata={"doc": "a stranger says one of `our_names`"}
    )
    on_malformed: OnFinding = field(
        default=OnFinding.CONTINUE,
        metadata={"doc": "neither a domain nor an address literal, such as an address without brackets"},
    )
    on_not_fqdn: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "a name of one label, such as `localhost`"}
    )
    on_other_address: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "an address literal that is not the client's address"}
    )
    on_unresolvable: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "a name that has neither an address nor a mail server"}
    )
    on_elsewhere: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "a name that has addresses, none of them the client's"}
    )

    def __post_init__(self) -> None:
        for name in self.our_names:
            try:
                _parsed(name.removeprefix("."))
            except AddressError as exc:
                raise ValueError(f"our_names: {exc}") from exc


_TEXTS = {
    "our_name": "You are not who you say in EHLO",
    "malformed": "EHLO needs a domain name or an address literal",
    "not_fqdn": "EHLO needs a fully qualified domain name",
    "other_address": "The address in EHLO is not yours",
    "unresolvable": "The name in EHLO does not exist",
    "elsewhere": "The name in EHLO does not lead to your address",
}


class Helo(Policy[HeloSettings]):
    """Judges each EHLO and HELO; asks DNS only where something would follow from it."""

    name = "helo"
    Settings = HeloSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    def __init__(self, settings: HeloSettings, services: Services) -> None:
        super().__init__(settings, services)
        names = [each.removeprefix(".") for each in settings.our_names]
        self._ours = frozenset(
            f"{'.' * each.startswith('.')}{_parsed(name)}"
            for each, name in zip(settings.our_names, names, strict=True)
        )
        found = services.metrics.counters("findings_total", "What was wrong with EHLO", ("finding",))
        self._found = {finding: found.labels(finding) for finding in _TEXTS}

    async def on_ehlo(self, session: Session) -> Verdict:
        """Everything that is found, and the strictest action of it."""
        findings = await self._findings(session)
        if not findings:
            return proceed()
        for each in findings:
            self._found[each].inc()
        worst = max(findings, key=lambda each: _ORDER.index(self._action(each)))
        evidence = _Evidence(session.helo, findings)
        match self._action(worst):
            case OnFinding.CONTINUE:
                return proceed(reason=f"helo_{worst}", evidence=evidence)
            case OnFinding.DEFER:
                return defer(f"helo_{worst}", Reply(450, "4.7.1", _TEXTS[worst]), evidence=evidence)
            case OnFinding.REJECT:
                return reject(f"helo_{worst}", Reply(550, "5.7.1", _TEXTS[worst]), evidence=evidence)

    def _action(self, finding: str) -> OnFinding:
        action: OnFinding = getattr(self.settings, f"on_{finding}")
        return action

    async def _findings(self, session: Session) -> Sequence[str]:
        client = None if session.address_source is AddressSource.HIDDEN else session.client
        try:
            said = _parsed(session.helo)
        except AddressError:
            return ("malformed",)
        findings = ["our_name"] if self._is_ours(str(said)) else []
        if isinstance(said, AddressLiteral):
            if client is not None and said.address != client:
                findings.append("other_address")
        elif "." not in said:
            findings.append("not_fqdn")
        elif self.settings.on_unresolvable is not OnFinding.CONTINUE or (
            client is not None and self.settings.on_elsewhere is not OnFinding.CONTINUE
        ):
            finding = await self.services.dns.run(leads(said, client))
            findings += [finding] if finding else []
        return findings

    def _is_ours(self, said: str) -> bool:
        parents = [said[at:] for at, each in enumerate(said) if each == "."]
        return not self._ours.isdisjoint((said, *parents))


def leads(name: str, client: IPv4Address | IPv6Address | None) -> Lookup[str]:
    """Where a name leads: "" to the client or nobody can say, "elsewhere", or "unresolvable"."""
    answers = yield [Question(name, RRType.A), Question(name, RRType.AAAA)]
    found = [each for answer in answers for each in answer.addresses]
    if client in found or any(answer.is_temporary for answer in answers):
        return ""
    if found:
        return "elsewhere" if client is not None else ""
    # a domain that only has mail servers exists all the same
    (answer,) = yield [Question(name, RRType.MX)]
    # RFC 7505 4.2: a domain with a null MX sends none either
    has_mail = any(each.host for each in answer.exchanges)
    return "" if answer.is_temporary or has_mail else "unresolvable"


def _parsed(said: str) -> str | AddressLiteral:
    """RFC 5321 4.1.1.1. Raises AddressError. Underscores, and a dot at the end, are common and harmless."""
    if said.startswith("["):
        return AddressLiteral(_unmapped(AddressLiteral.parse(said).address))
    name = said.removesuffix(".")
    checked = Domain.parse(name.replace("_", "x"))
    return name.lower() if "_" in name else checked


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """RFC 4291 2.5.5.2: how a client with a socket for both families calls its IPv4 address."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What was said, and what is wrong with it."""

    helo: str
    findings: Sequence[str]

    def lines(self) -> Sequence[str]:
        return [f"{self.helo[:255]}: {_TEXTS[each]}" for each in self.findings]
