"""dmarc: what becomes of mail whose author domain is not authenticated (RFC 9989; RFC 7489 discovery as a setting).

It judges the results of spf and dkim, so without them in the plan nothing passes. Every message gets a result: none,
pass, fail, temperror (DNS), or permerror (there is no one author domain). What becomes of the mail is a table of
settings; as delivered the domain owner's wish is followed.

The questions about the author domain have a time of their own, which other domains' SPF or keys cannot use up, and
none are asked about domains of others. When that time is used up all the same, mail is deferred: "could not be asked"
is what DNS of the author domain says, not what we had no time for.

mxgate_dmarc_messages_total counts each message by the domain owner's policy and by what became of it here.

Of trusted and authenticated clients the result is reported, and nothing is refused. Nor is it where a balancer hides
its clients' addresses, since SPF cannot be checked there; a From field without one author domain still is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network

from gateway.api import (
    AddressError,
    AddressSource,
    AuthorError,
    AuthResult,
    Domain,
    Lookup,
    OnError,
    Policy,
    Reply,
    Result,
    Services,
    Slot,
    Transaction,
    Trust,
    Verdict,
    author_domain,
    defer,
    proceed,
    quarantine,
    reject,
)
from policies.verify.dmarc.judge import Discovery, DmarcResult, Identifier, Trouble, identifiers, judge
from policies.verify.dmarc.override import Override, Overrides, may_hold_later
from policies.verify.dmarc.record import DmarcPolicy
from policies.verify.domain_list import DomainList
from policies.verify.handling import Handling, TemporaryHandling
from policies.verify.org_domain import DmarcRecords, public_suffixes

# DESIGN.md section 5: the author domain's own time
JUDGE_S = 8.0

_ABSENT = "absent"
TRUSTED = "policy not applied: the client is trusted"
HIDDEN = "policy not applied: the client's address is hidden"
BAD_FROM = Reply(550, "5.6.0", "The message needs one From field with addresses of one domain")


class BadFrom(StrEnum):
    """What becomes of mail without one author domain."""

    REJECT = "reject"
    MARK = "mark"


@dataclass(frozen=True, slots=True)
class DmarcSettings:
    """The table [policy.dmarc.settings]."""

    on_reject: Handling = field(
        default=Handling.REJECT, metadata={"doc": "mail that fails, where the domain owner prefers reject"}
    )
    on_quarantine: Handling = field(
        default=Handling.QUARANTINE,
        metadata={"doc": "mail that fails, where the domain owner prefers quarantine"},
    )
    on_temperror: TemporaryHandling = field(
        default=TemporaryHandling.DEFER,
        metadata={
            "doc": "mail that would have failed under reject or quarantine, but something aligned could not be "
            "checked for now; a forger can bring that about, so `continue` lets forged mail in"
        },
    )
    on_record_temperror: TemporaryHandling = field(
        default=TemporaryHandling.CONTINUE, metadata={"doc": "mail whose author domain's DNS does not answer"}
    )
    on_bad_from: BadFrom = field(
        default=BadFrom.REJECT,
        metadata={"doc": "mail without one author domain: `reject`, or `mark` it as dmarc=permerror"},
    )
    discovery: Discovery = field(
        default=Discovery.TREEWALK,
        metadata={
            "doc": "organizational domains by `treewalk` (RFC 9989) or by `psl`, the Public Suffix List (RFC 7489)"
        },
    )
    trusted_forwarders: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": 'domains whose mail (by SPF or DKIM) may fail; ".example.org" stands for its subdomains'
        },
    )
    trusted_forwarder_networks: tuple[IPv4Network | IPv6Network, ...] = field(
        default=(), metadata={"doc": "clients whose mail may fail"}
    )
    mailing_lists: tuple[str, ...] = field(
        default=(), metadata={"doc": "domains of mailing lists (by SPF or DKIM) whose mail may fail"}
    )
    exceptions: tuple[str, ...] = field(
        default=(), metadata={"doc": "author domains whose policy is reported and not applied"}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what is no domain."""
        try:
            self.overrides()
        except AddressError as exc:
            raise ValueError(str(exc)) from exc

    def overrides(self) -> Overrides:
        """What is listed, ready to be looked into."""
        return Overrides(
            DomainList(self.exceptions),
            self.trusted_forwarder_networks,
            DomainList(self.trusted_forwarders),
            DomainList(self.mailing_lists),
        )


_AUTHOR = Slot[Domain | AuthorError]("author")


class Dmarc(Policy[DmarcSettings]):
    """Applies the policy of the author domain. Fails closed: its own trouble is a 4xx."""

    name = "dmarc"
    Settings = DmarcSettings
    after = ("spf", "dkim", "arc")
    method = "dmarc"
    on_error = OnError.DEFER

    def __init__(self, settings: DmarcSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._overrides = settings.overrides()
        self._counted = services.metrics.counters(
            "messages_total",
            "Messages by the result, by the policy of the author domain (absent: it has none), and by what the policy "
            "dmarc decided",
            ("result", "policy", "disposition"),
        )
        self._count_one: dict[tuple[str, str, str], Callable[[], None]] = {}

    async def start(self) -> None:
        """Reads the Public Suffix List where it is used: it takes too long for a session."""
        if self.settings.discovery is Discovery.PSL:
            public_suffixes()

    def on_header(self, tx: Transaction) -> None:
        """Begin to look for the record, and for what SPF has found, while the body arrives."""
        author = _author(tx)
        if isinstance(author, Domain):
            self.services.dns.prefetch(self._ahead(author, tx), tx, own_budget=True)

    def _ahead(self, author: Domain, tx: Transaction) -> Lookup[DmarcResult]:
        """What `on_eom` will ask, as far as is known now; of a record that the cache has nothing else is looked at."""
        yield from DmarcRecords().at(author)
        return (yield from judge(author, _identifiers(tx), self.settings.discovery))

    async def on_eom(self, tx: Transaction) -> Verdict:
        """One result, and what becomes of the mail."""
        author = _author(tx)
        if isinstance(author, AuthorError):
            verdict = self._bad_from(tx, author)
            self._count(Result.PERMERROR, _ABSENT, verdict)
            return verdict
        found = await self.services.dns.run(
            judge(author, _identifiers(tx), self.settings.discovery),
            tx,
            timeout_s=JUDGE_S,
            own_budget=True,
        )
        verdict = self._judged(tx, author, found)
        is_applicable = found.record is not None and found.record.is_applicable
        self._count(found.result, found.policy if is_applicable else _ABSENT, verdict)
        return verdict

    def _count(self, result: str, policy: str, verdict: Verdict) -> None:
        key = str(result), str(policy), verdict.action.label
        count_one = self._count_one.get(key)
        if count_one is None:
            count_one = self._count_one[key] = self._counted.labels(*key).inc
        count_one()

    def _judged(self, tx: Transaction, author: Domain, found: DmarcResult) -> Verdict:
        handling = self._handling(found)
        if handling is Handling.CONTINUE:
            return _verdict(handling, found)
        if _is_trusted(tx):
            return proceed(results=[_result(found, TRUSTED)], reason="trusted_client", evidence=found)
        if tx.session.address_source is AddressSource.HIDDEN:
            return proceed(results=[_result(found, HIDDEN)], reason="client_hidden", evidence=found)
        override = self._overrides.find(author, tx.session.client, _identifiers(tx), tx.results)
        if override is not None:
            return proceed(
                results=[_result(found, str(override))],
                reason=override.reason,
                evidence=_Overridden(found, override),
            )
        # what a look-up may yet turn into an override is not refused for good
        if handling is Handling.REJECT and may_hold_later(tx.results):
            handling = Handling.DEFER
        return _verdict(handling, found)

    def _bad_from(self, tx: Transaction, fault: AuthorError) -> Verdict:
        results = [AuthResult("dmarc", Result.PERMERROR, str(fault))]
        if self.settings.on_bad_from is BadFrom.MARK or _is_trusted(tx):
            return proceed(reason=fault.fault, results=results)
        return reject(fault.fault, BAD_FROM, results=results)

    def _handling(self, found: DmarcResult) -> Handling:
        match found.result, found.trouble:
            case Result.FAIL, _:
                return self._wished(found.policy)
            case Result.TEMPERROR, Trouble.BUDGET:
                return Handling.DEFER
            case Result.TEMPERROR, Trouble.RECORD:
                return Handling(self.settings.on_record_temperror)
            case Result.TEMPERROR, _ if self._wished(found.policy) is not Handling.CONTINUE:
                return Handling(self.settings.on_temperror)
        return Handling.CONTINUE

    def _wished(self, policy: DmarcPolicy) -> Handling:
        """What the operator makes of the domain owner's wish."""
        if policy is DmarcPolicy.NONE:
            return Handling.CONTINUE
        return self.settings.on_reject if policy is DmarcPolicy.REJECT else self.settings.on_quarantine


@dataclass(frozen=True, slots=True)
class _Overridden:
    """The evidence of a result that was not followed."""

    found: DmarcResult
    override: Override

    def lines(self) -> Sequence[str]:
        return [*self.found.lines(), str(self.override)]


def _author(tx: Transaction) -> Domain | AuthorError:
    """The author domain, looked for once for a message."""
    author = _AUTHOR.get(tx)
    if author is None:
        assert tx.message is not None  # the hooks of a message
        try:
            author = author_domain(tx.message.header)
        except AuthorError as exc:
            author = exc.with_traceback(None)
        _AUTHOR.put(tx, author)
    return author


def _identifiers(tx: Transaction) -> tuple[Identifier, ...]:
    return identifiers(tx.results, has_reverse_path=tx.envelope.mail_from is not None)


def _is_trusted(tx: Transaction) -> bool:
    """Whether only a report is wanted; an address that hides its clients is nobody's."""
    session = tx.session
    if session.trust is Trust.TRUSTED:
        return session.address_source is not AddressSource.HIDDEN
    return session.trust is Trust.AUTHENTICATED


_REASONS = {Result.FAIL: "dmarc_fail", Result.TEMPERROR: "dmarc_temperror"}


def _result(found: DmarcResult, note: str = "") -> AuthResult:
    """RFC 8601 2.7; RFC 9989 9.2: header.from and policy.dmarc."""
    properties = [("header.from", str(found.author))]
    if found.record is not None and found.record.is_applicable:
        properties.append(("policy.dmarc", found.policy.value))
    parts = [found.why] if found.result in _REASONS else []
    if found.result is Result.FAIL and found.record is not None and found.record.is_test:
        parts.append("policy_test_mode")  # RFC 9990 3.1.1.6
    if note:
        parts.append(note)
    return AuthResult("dmarc", found.result, "; ".join(parts), tuple(properties))


def _verdict(handling: Handling, found: DmarcResult) -> Verdict:
    """What a client is told holds nothing but the author domain."""
    reason, results = _REASONS.get(found.result, ""), [_result(found)]
    match handling:
        case Handling.REJECT:
            text = f"Message rejected per DMARC policy for {found.author}"
            return reject(reason, Reply(550, "5.7.1", text), results=results, evidence=found)
        case Handling.DEFER:
            text = f"Message deferred, DMARC of {found.author} did not pass or cannot be checked now"
            return defer(reason, Reply(451, "4.7.1", text), results=results, evidence=found)
        case Handling.QUARANTINE:
            return quarantine(reason, results=results, evidence=found)
        case Handling.CONTINUE:
            return proceed(reason=reason, results=results, evidence=found)
