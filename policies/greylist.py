"""greylist: a stranger's first message waits once, and nobody else's does (RFC 6647).

Who sent a message is its authenticated organisational domain, by the public suffix list: of the reverse-path where SPF
passes, at `stage = "eom"` also of DMARC and of DKIM signatures. Without one it is the client's network, IPv4 /24 or
IPv6 /64. That origin, the reverse-path without what changes from one attempt to the next, and the recipient make the
triplet that waits. A retry of a pool gives the same triplet from whatever address, and a forged sender never gives
that of the true one.

What passes at once: an origin that came back in time before, or that the operator allowed; a triplet that passed
before; recipients that are never delayed; what settings say of TLS and of a DNS list. The store says who is known: see
policies.verify.greylist.ledger. While it is out of reach, `[state] on_outage` decides.

At `stage = "eom"` one answer is for all recipients: mail waits as long as the one that has to wait longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from gateway.api import (
    AddressError,
    AddressSource,
    Domain,
    Mailbox,
    OnError,
    Policy,
    Question,
    Recipient,
    Reply,
    Result,
    RRType,
    Services,
    Slot,
    Stage,
    StoreDownError,
    Transaction,
    Trust,
    Verdict,
    ask,
    defer,
    proceed,
)
from policies.verify.dmarc.judge import identifiers
from policies.verify.domain_list import DomainList
from policies.verify.greylist.key import client_network, rcpt_key, sender_key, triplet_key
from policies.verify.greylist.ledger import Ledger, Standings
from policies.verify.greylist.state import DAY_S, RECENT_S, Decision, Standing, Timing
from policies.verify.org_domain import public_suffixes, registrable

_MAX_DELAY_S = 86_400.0
_MAX_LIFETIME_S = 366.0 * DAY_S
# Of a message with many signatures these count: a signer more is no reason to ask more.
_MAX_DOMAINS = 4
_DNSWL_TIMEOUT_S = 2.0
# Of some that were known within RECENT_S; beyond it all are asked for again
_MAX_KNOWN = 4096
# of 1 minute to 2 days; the delay itself lies among the first
_BUCKETS = (60, 300, 330, 420, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400, 172_800)
STORE_DOWN = Reply(451, "4.3.0", "Temporary trouble, please try again later")


class When(StrEnum):
    """The stage at which mail is deferred."""

    RCPT = "rcpt"
    EOM = "eom"


class Per(StrEnum):
    """What of a recipient stands in the triplet."""

    MAILBOX = "mailbox"
    DOMAIN = "domain"


@dataclass(frozen=True, slots=True)
class GreylistSettings:
    """The table [policy.greylist.settings]."""

    delay_s: float = field(
        default=300.0, metadata={"doc": "how long a stranger waits; 0: recorded, never deferred"}
    )
    retry_window_s: float = field(
        default=2.0 * DAY_S, metadata={"doc": "until when after the first attempt a retry counts"}
    )
    lifetime_s: float = field(
        default=35.0 * DAY_S, metadata={"doc": "how long who passed stays known behind the last mail"}
    )
    client_known_after: int = field(
        default=5, metadata={"doc": "retries in time after which a network is known; 0: never"}
    )
    known_good_after: int = field(
        default=1, metadata={"doc": "retries in time after which an authenticated domain is known; 0: never"}
    )
    stage: When = field(
        default=When.RCPT,
        metadata={"doc": "`rcpt`, or `eom`: behind the content, when DKIM and DMARC are known too"},
    )
    recipient: Per = field(
        default=Per.MAILBOX, metadata={"doc": "what of a recipient counts: the `mailbox` or its `domain`"}
    )
    allow: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "sender domains that never wait where they are authenticated; `.example.org`: those below it"
        },
    )
    exempt_recipients: tuple[str, ...] = field(
        default=("postmaster", "abuse"),
        metadata={"doc": "recipients whose mail never waits: a local part of every domain, or a mailbox"},
    )
    pass_tls: bool = field(default=False, metadata={"doc": "mail that comes by TLS never waits"})
    dnswl: str = field(
        default="",
        metadata={"doc": "a DNS list of good clients, e.g. `list.dnswl.org`: who is on it never waits"},
    )
    max_new_per_hour: int = field(
        default=1000,
        metadata={"doc": "new triplets from one network; more are deferred and not recorded; 0: no limit"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.delay_s <= _MAX_DELAY_S:
            raise ValueError("delay_s is not from 0 to 86400")
        if not self.delay_s < self.retry_window_s <= _MAX_LIFETIME_S:
            raise ValueError("retry_window_s is not longer than delay_s, or longer than 366 days")
        if not 60 <= self.lifetime_s <= _MAX_LIFETIME_S:
            raise ValueError("lifetime_s is not from 60 to 366 days")
        if min(self.client_known_after, self.known_good_after, self.max_new_per_hour) < 0:
            raise ValueError("client_known_after, known_good_after or max_new_per_hour is negative")
        try:
            DomainList([*self.allow, *([self.dnswl] if self.dnswl else [])])
        except AddressError as exc:
            raise ValueError(f"allow or dnswl: {exc}") from exc


class Greylist(Policy[GreylistSettings]):
    """Defers strangers, at RCPT or at the end of the message."""

    name = "greylist"
    Settings = GreylistSettings
    after = ("spf", "dkim", "arc", "dmarc", "recipient")
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)
    needs_store = True

    def __init__(self, settings: GreylistSettings, services: Services) -> None:
        super().__init__(settings, services)
        timing = Timing(settings.delay_s, settings.retry_window_s, settings.lifetime_s)
        self._ledger = Ledger(services.store, timing)
        self._metrics = _Metrics(services)
        self._allow = DomainList(settings.allow)
        self._exempt_rcpts = frozenset(each.lower() for each in settings.exempt_recipients)
        self._dnswl = settings.dnswl and Domain.parse(settings.dnswl)
        self._known: dict[str, tuple[float, Skip]] = {}

    @classmethod
    def stages(cls, settings: GreylistSettings | None = None) -> frozenset[Stage]:
        """That of the settings."""
        return super().stages() if settings is None else frozenset({Stage(settings.stage.value)})

    async def start(self) -> None:
        """Read the public suffix list."""
        public_suffixes()

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """One recipient, for whom its triplet decides."""
        return await self._judge(tx, [rcpt.mailbox])

    async def on_eom(self, tx: Transaction) -> Verdict:
        """All recipients at once."""
        return await self._judge(tx, [rcpt.mailbox for rcpt in tx.envelope.rcpts])

    async def _judge(self, tx: Transaction, rcpts: Sequence[Mailbox]) -> Verdict:
        rcpts = [each for each in rcpts if not self._is_exempt(each)]
        if not rcpts:
            return self._skipped(Skip.RECIPIENT)
        if self.settings.pass_tls and tx.session.tls is not None:
            return self._skipped(Skip.TLS)
        domains = authenticated_domains(tx)
        if any(each in self._allow for each in domains):
            return self._skipped(Skip.ALLOWED)
        origins = _origins(tx, domains)
        if not origins:
            return self._skipped(Skip.HIDDEN)
        try:
            return await self._asked(tx, origins, rcpts)
        except StoreDownError as exc:
            skipped = self._skipped(Skip.STORE_DOWN)
            return defer(skipped.reason, STORE_DOWN) if exc.on_outage is OnError.DEFER else skipped

    async def _asked(self, tx: Transaction, origins: Sequence[str], rcpts: Sequence[Mailbox]) -> Verdict:
        recent = self._recent(origins)
        if recent is not None:
            return self._skipped(recent)
        ledger, now_s = self._ledger, self.services.clock.now()
        asked = _STANDINGS.get(tx)
        if asked is None:
            begun = self.services.clock.monotonic()
            asked = begun, await ledger.standings(origins)
            _STANDINGS.put(tx, asked)
        asked_at, noted = asked
        for origin, credit, value in noted.credits:
            is_network = "/" in origin
            known_after = self.settings.client_known_after if is_network else self.settings.known_good_after
            if credit.is_known(known_after):
                await ledger.renew(origin, credit, value, now_s)
                known = Skip.KNOWN_CLIENT if is_network else Skip.KNOWN_DOMAIN
                return self._skipped(
                    self._note(origin, Skip.ALLOWED if credit.is_allowed else known, asked_at)
                )
        if self._dnswl and await self._is_listed(tx, self._dnswl):
            return self._skipped(Skip.DNSWL)
        self._metrics.never_came_back.inc(await ledger.close_days(now_s))
        sender, is_domain = sender_key(tx.envelope.mail_from), self.settings.recipient is Per.DOMAIN
        keys = dict.fromkeys(
            triplet_key(origins[0], sender, rcpt_key(rcpt, is_domain=is_domain)) for rcpt in rcpts
        )
        if 0 < self.settings.max_new_per_hour <= noted.new:
            decisions = await ledger.waiting([*keys], now_s)
            if any(each.standing is Standing.NEW for each in decisions):
                self._metrics.deferred["over_limit"].inc()
                return _greylisted("greylist_over_limit", self.settings.delay_s, [])
        decisions = await ledger.attempts(noted, [*keys], now_s)
        if self.settings.delay_s == 0 or any(each.standing is Standing.IN_TIME for each in decisions):
            # the origin has more credit now
            _STANDINGS.put(tx, None)
        return self._decided([*keys], decisions)

    def _recent(self, origins: Sequence[str]) -> Skip | None:
        """Why one of them need not wait, of whom the store was asked within RECENT_S."""
        now = self.services.clock.monotonic()
        for origin in origins:
            said = self._known.get(origin)
            if said is not None and now < said[0]:
                return said[1]
        return None

    def _note(self, origin: str, why: Skip, asked_at: float) -> Skip:
        """Remember what the store, asked at that time of the monotonic clock, has said of who need not wait."""
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[origin] = asked_at + RECENT_S, why
        return why

    def _decided(self, keys: Sequence[str], decisions: Sequence[Decision]) -> Verdict:
        evidence = _Evidence(keys, decisions)
        for each in decisions:
            if each.standing is Standing.IN_TIME:
                self._metrics.delay.observe(each.waited_s)
        longest = max(decisions, key=lambda each: each.wait_s)
        if longest.wait_s:
            attempt = "first" if longest.standing is Standing.NEW else "early"
            self._metrics.deferred[attempt].inc()
            return _greylisted(f"greylist_{attempt}", longest.wait_s, [evidence])
        if all(each.standing is Standing.KNOWN for each in decisions):
            return self._skipped(Skip.KNOWN_TRIPLET, evidence)
        return proceed(reason="greylist_passed", evidence=evidence)

    def _skipped(self, why: Skip, evidence: _Evidence | None = None) -> Verdict:
        self._metrics.skipped[why].inc()
        return proceed(reason=f"greylist_{why}", evidence=evidence)

    def _is_exempt(self, rcpt: Mailbox) -> bool:
        local = rcpt.local_value.lower()
        return local in self._exempt_rcpts or f"{local}@{rcpt.domain}" in self._exempt_rcpts

    async def _is_listed(self, tx: Transaction, zone: str) -> bool:
        """RFC 5782 2.1, 2.4: an address of 127/8 says that the client is listed; one ending in 255 is a refusal."""
        if tx.session.address_source is AddressSource.HIDDEN:
            return False
        question = Question(f"{_reversed(tx.session.client)}.{zone}", RRType.A)
        (answer,) = await self.services.dns.run(ask(question), tx, timeout_s=_DNSWL_TIMEOUT_S)
        return any(each.is_loopback and int(each) & 0xFF != 0xFF for each in answer.addresses)


class Skip(StrEnum):
    """Why mail did not wait although nobody waited for it: the label `reason`, and the end of the verdict's."""

    RECIPIENT = "exempt_recipient"
    TLS = "tls"
    DNSWL = "dnswl"
    ALLOWED = "allowed"
    KNOWN_CLIENT = "known_client"
    KNOWN_DOMAIN = "known_domain"
    KNOWN_TRIPLET = "known_triplet"
    HIDDEN = "client_hidden"
    STORE_DOWN = "store_down"


_STANDINGS = Slot[tuple[float, Standings] | None]("greylist_standings")
"""What is known of the origins, and when that was asked: once for a transaction, and again behind new credit."""


class _Metrics:
    """What is counted, observed policies included."""

    def __init__(self, services: Services) -> None:
        metrics = services.metrics
        deferred = metrics.counters(
            "mxgate_greylist_deferred_total", "Attempts of strangers that were deferred", ("attempt",)
        )
        self.deferred = {each: deferred.labels(each) for each in ("first", "early", "over_limit")}
        skipped = metrics.counters(
            "mxgate_greylist_skipped_total", "Attempts that had not to wait, by why", ("reason",)
        )
        self.skipped = {each: skipped.labels(each) for each in Skip}
        self.delay = metrics.histograms(
            "mxgate_greylist_delay_seconds",
            "Seconds from the first attempt of a stranger to the one that passed",
            (),
            _BUCKETS,
        ).labels()
        self.never_came_back = metrics.counters(
            "mxgate_greylist_never_came_back_total",
            "Triplets without a retry in time, counted once the retry window of their day is over",
        ).labels()


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The triplets, and where each stands."""

    keys: Sequence[str]
    decisions: Sequence[Decision]

    def lines(self) -> Sequence[str]:
        return [
            f"{key.removeprefix('t ')}: {each.standing}, waited {each.waited_s:.0f} s, has to wait {each.wait_s} s"
            for key, each in zip(self.keys, self.decisions, strict=True)
        ]


def authenticated_domains(tx: Transaction) -> list[Domain]:
    """The domains that are proved to have sent a message, the author's first; those of the reverse-path before signers.

    SPF is of the reverse-path's own domain, of the null one of HELO (RFC 7208 2.4).
    """
    found = []
    for each in tx.results:
        if each.method == "dmarc" and each.result is Result.PASS:
            try:
                found.append(Domain.parse(dict(each.properties).get("header.from", "")))
            except AddressError:
                continue
    passed = [
        each
        for each in identifiers(tx.results, has_reverse_path=tx.envelope.mail_from is not None)
        if each.result is Result.PASS
    ]
    for method in ("spf", "dkim"):
        found += [Domain.parse(each.domain) for each in passed if each.method == method]
    return list(dict.fromkeys(found))[:_MAX_DOMAINS]


def _origins(tx: Transaction, domains: Sequence[Domain]) -> list[str]:
    """Who may be known: the organisational domains and the network; the first of them is in the triplet."""
    origins = [org for each in domains if (org := registrable(each)) is not None]
    if tx.session.address_source is not AddressSource.HIDDEN:
        origins.append(client_network(tx.session.client))
    return list(dict.fromkeys(origins))


def _greylisted(reason: str, wait_s: float, evidence: Sequence[_Evidence]) -> Verdict:
    text = f"Greylisted: a first message waits, please try again in {wait_s:.0f} seconds"
    return defer(reason, Reply(451, "4.7.1", text), evidence=next(iter(evidence), None))


def _reversed(client: IPv4Address | IPv6Address) -> str:
    """RFC 5782 2.1, 2.4: the address as it is asked for."""
    return client.reverse_pointer.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa")
