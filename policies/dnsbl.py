"""dnsbl: lists of addresses in DNS (RFC 5782), weighed together.

    [[policy.dnsbl.settings.lists]]
    zone = "bl.example.net"
    weight = 2
    codes = { "127.0.0.10/31" = 0.5 }     # these answers weigh otherwise
    [[policy.dnsbl.settings.lists]]
    zone = "allow.example.net"
    weight = -3                           # an allow list

A client whose lists weigh `threshold` or more together is refused with 550 5.7.1, at RCPT as the engine holds it. Each
list is asked once for each session. DNS trouble is no listing.

A list that died often lists everybody, so lists are tested as RFC 5782 5 has it: 127.0.0.2 must be listed (of a list
of IPv6 addresses ::ffff:127.0.0.2), and 127.0.0.1 must not, nor ::ffff:127.0.0.1. One that fails counts for nothing
until a later test finds it well. That is logged (`list.suspended`, `list.restored`), and mxgate_dnsbl_suspended_lists
counts such lists. An answer from 127.255.255.0/24 (how lists say that they refuse to answer) or from outside of
127.0.0.0/8 is never a listing, and fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from math import inf, isfinite
from typing import NamedTuple

from gateway.api import (
    AddressSource,
    Answer,
    Domain,
    Found,
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

# A list is tested together with the first client behind these seconds.
_TEST_EVERY_S = 3600.0
_TEST_SUSPENDED_EVERY_S = 300.0
# RFC 5782 5
_MUST_BE_LISTED = (ip_address("127.0.0.2"), ip_address("::ffff:127.0.0.2"))
_MUST_NOT_BE_LISTED = (ip_address("127.0.0.1"), ip_address("::ffff:127.0.0.1"))
_TESTS = (*_MUST_BE_LISTED, *_MUST_NOT_BE_LISTED)
_LISTED = IPv4Network("127.0.0.0/8")
_REFUSED = IPv4Network("127.255.255.0/24")


class OnListed(StrEnum):
    """What becomes of mail from a client that is listed."""

    CONTINUE = "continue"
    DEFER = "defer"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class DnsList:
    """One list. Raises ValueError for a zone that is no domain, and for weights that cannot be added up."""

    zone: str = field(metadata={"doc": "the domain that the list's entries are below"})
    weight: float = field(default=1.0, metadata={"doc": "of being listed; negative for an allow list"})
    codes: Mapping[IPv4Network, float] = field(
        default_factory=dict,
        metadata={
            "doc": "weights of answers that differ, by address or network; 0: this answer means nothing"
        },
    )
    self_test: bool = field(
        default=True, metadata={"doc": "the list has the test entries of RFC 5782 5, and is tested by them"}
    )

    def __post_init__(self) -> None:
        Domain(self.zone)
        if not all(map(isfinite, (self.weight, *self.codes.values()))):
            raise ValueError(f"a weight of {self.zone} is not finite")

    def weight_of(self, code: IPv4Address) -> float:
        """The weight of one answer: that of the narrowest network in `codes`."""
        fitting = [network for network in self.codes if code in network]
        return self.codes[max(fitting, key=lambda each: each.prefixlen)] if fitting else self.weight


@dataclass(frozen=True, slots=True)
class DnsblSettings:
    """[policy.dnsbl.settings]."""

    lists: tuple[DnsList, ...] = field(default=(), metadata={"doc": "the lists that are asked"})
    threshold: float = field(
        default=1.0, metadata={"doc": "the lists' weights together that make a client listed"}
    )
    on_listed: OnListed = field(
        default=OnListed.REJECT, metadata={"doc": "what becomes of mail from a client that is listed"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold < inf:
            raise ValueError("threshold is not above 0: whoever is on no list would be listed")
        zones = [Domain(each.zone) for each in self.lists]
        if len({*zones}) != len(zones):
            raise ValueError("a zone stands in lists twice")


class Listing(NamedTuple):
    """What one list says of a client; `weight` 0 where it says nothing, or nothing that counts."""

    zone: str
    codes: tuple[IPv4Address, ...]
    weight: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Listings:
    """What all lists say; the evidence of a verdict."""

    client: IPv4Address | IPv6Address
    found: tuple[Listing, ...]

    @property
    def weight(self) -> float:
        """The sum."""
        return sum(each.weight for each in self.found)

    def lines(self) -> Sequence[str]:
        said = [
            f"{zone}: {', '.join(map(str, codes)) or why or 'not listed'}, weight {weight:g}"
            for zone, codes, weight, why in self.found
        ]
        return (*said, f"{self.client} weighs {self.weight:g}")


class Dnsbl(Policy[DnsblSettings]):
    """Asks all lists at once, at CONNECT."""

    name = "dnsbl"
    Settings = DnsblSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    def __init__(self, settings: DnsblSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._health = {each.zone: _Health() for each in settings.lists}
        self._suspended = services.metrics.gauges(
            "suspended_lists", "Lists that count for nothing because they failed their test"
        ).labels()

    async def on_connect(self, session: Session) -> Verdict:
        """The weights of all lists that have this client."""
        if not self.settings.lists or session.address_source is AddressSource.HIDDEN:
            return proceed()
        found = await self.services.dns.run(self._ask(session.client))
        if found.weight < self.settings.threshold:
            return proceed(reason="not_listed", evidence=found)
        heaviest = max(found.found, key=lambda each: each.weight)
        text = f"{session.client} is listed by {heaviest.zone}"
        match self.settings.on_listed:
            case OnListed.CONTINUE:
                return proceed(reason="listed", evidence=found)
            case OnListed.DEFER:
                return defer("listed", Reply(450, "4.7.1", text), evidence=found)
            case OnListed.REJECT:
                return reject("listed", Reply(550, "5.7.1", text), evidence=found)

    def _ask(self, client: IPv4Address | IPv6Address) -> Lookup[Listings]:
        """Everything in one go: the client's entries, and the test entries of the lists whose test is due."""
        lists, now = self.settings.lists, self.services.clock.monotonic()
        due = [each for each in lists if each.self_test and now >= self._health[each.zone].test_at]
        for each in due:
            # not once more for the next client, while this one waits
            self._health[each.zone].test_at = now + _TEST_EVERY_S
        answers = yield [
            *(entry(client, each.zone) for each in lists),
            *(entry(address, each.zone) for each in due for address in _TESTS),
        ]
        at = len(lists)
        for each in due:
            tests = answers[at : at + len(_TESTS)]
            self._take_test(
                each.zone, _what_is_wrong(tests[: len(_MUST_BE_LISTED)], tests[len(_MUST_BE_LISTED) :])
            )
            at += len(_TESTS)
        return Listings(client, tuple(map(self._said, lists, answers[: len(lists)])))

    def _take_test(self, zone: str, wrong: str | None) -> None:
        """What a test has shown; None: there was no answer, and all stays as it was."""
        health = self._health[zone]
        if wrong and not health.wrong:
            self.services.log.warning("list.suspended", zone=zone, error=wrong)
            self._suspended.inc()
        elif wrong == "" and health.wrong:
            self.services.log.info("list.restored", zone=zone)
            self._suspended.dec()
        health.wrong = health.wrong if wrong is None else wrong
        if health.wrong:
            health.test_at = self.services.clock.monotonic() + _TEST_SUSPENDED_EVERY_S

    def _said(self, dns_list: DnsList, answer: Answer) -> Listing:
        """What a list's answer weighs."""
        zone = dns_list.zone
        if answer.is_temporary:
            return Listing(zone, (), 0.0, answer.why)
        codes = tuple(each for each in answer.addresses if isinstance(each, IPv4Address))
        if wrong := self._health[zone].wrong or _what_is_odd(codes):
            return Listing(zone, (), 0.0, f"suspended: {wrong}")
        # several answers are several reasons: the one that says most counts
        weight = max((dns_list.weight_of(code) for code in codes), key=abs, default=0.0)
        return Listing(zone, codes, weight)


@dataclass(slots=True)
class _Health:
    """What is wrong with a list, "" for nothing, and when it is tested next, by the clock."""

    wrong: str = ""
    test_at: float = 0.0


def entry(client: IPv4Address | IPv6Address, zone: str) -> Question:
    """RFC 5782 2.1, 2.4: the octets, or for IPv6 the nibbles, in reverse order."""
    reverse = client.reverse_pointer.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa")
    return Question(f"{reverse}.{zone}", RRType.A)


def _what_is_odd(codes: Sequence[IPv4Address]) -> str:
    """Why answers are no listing."""
    return next(_oddities(codes), "")


def _oddities(codes: Sequence[IPv4Address]) -> Iterator[str]:
    for code in codes:
        if code in _REFUSED:
            yield f"it refuses to answer ({code})"
        elif code not in _LISTED:
            yield f"it answers {code}, which is not in {_LISTED}"


def _what_is_wrong(must_be_listed: Sequence[Answer], must_not_be: Sequence[Answer]) -> str | None:
    """What a test has shown: "" when all is well, None when there is no saying."""
    codes = tuple(
        each
        for answer in (*must_be_listed, *must_not_be)
        for each in answer.addresses
        if isinstance(each, IPv4Address)
    )
    if odd := _what_is_odd(codes):
        return odd
    if any(each.found is Found.RECORDS for each in must_not_be):
        return "it lists 127.0.0.1, and so everybody"
    if any(each.is_temporary for each in must_not_be):
        return None
    # a list has addresses of one version, or of both
    if any(each.found is Found.RECORDS for each in must_be_listed):
        return ""
    return None if any(each.is_temporary for each in must_be_listed) else "it does not list 127.0.0.2"
