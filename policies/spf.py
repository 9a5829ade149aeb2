"""spf: whether the client may send for the domain of the reverse-path, and for the one it greets with (RFC 7208).

At MAIL the MAIL FROM identity is checked; for the null reverse-path that is postmaster at the HELO domain (2.4).
Beside any other reverse-path the HELO identity is checked too (2.3): second, so that its questions take no time from
the first; its record is asked for at the same time. Both results are reported; dmarc judges by that of the MAIL FROM
identity.

A fail is reported and mail goes on: mail that was forwarded fails, and dmarc knows from its signatures whether it is
genuine (RFC 9989). `on_fail = "reject"` refuses it with 550 5.7.23; the engine holds the refusal until RCPT.

While clients are hidden behind a balancer's address the result is temperror: nobody is asked, nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.api import (
    AddField,
    AddressSource,
    AuthResult,
    HeaderEdit,
    OnError,
    Policy,
    Question,
    Reply,
    Result,
    RRType,
    Services,
    Transaction,
    Trust,
    Verdict,
    ask,
    defer,
    proceed,
    reject,
)
from policies.verify.handling import EarlyHandling
from policies.verify.spf import (
    SpfLimits,
    SpfResult,
    a_labels,
    check_host,
    identity,
    is_checkable,
    received_spf,
)

_HELO_TIMEOUT_S = 5.0
# RFC 5321 4.5.3.1.5 gives a reply line 512 octets with its codes; the explanation gets what our words leave
_MAX_REPLY_TEXT = 450
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class SpfSettings:
    """[policy.spf.settings]; the MAIL FROM identity where nothing else is said."""

    on_fail: EarlyHandling = field(
        default=EarlyHandling.CONTINUE,
        metadata={"doc": "a client that the domain does not permit; by default dmarc decides"},
    )
    on_softfail: EarlyHandling = field(
        default=EarlyHandling.CONTINUE, metadata={"doc": "a client that it probably does not permit"}
    )
    on_permerror: EarlyHandling = field(
        default=EarlyHandling.CONTINUE, metadata={"doc": "an SPF record that cannot be evaluated"}
    )
    on_temperror: OnError = field(
        default=OnError.CONTINUE, metadata={"doc": "a check that DNS trouble left undecided"}
    )
    helo_check: bool = field(
        default=True, metadata={"doc": "check the HELO identity too, where HELO gives a domain"}
    )
    on_helo_fail: EarlyHandling = field(
        default=EarlyHandling.CONTINUE,
        metadata={"doc": "a client that the domain of its HELO does not permit"},
    )
    max_void_lookups: int = field(
        default=2, metadata={"doc": "terms of one check that may find nothing in DNS (RFC 7208 4.6.4)"}
    )
    use_explanation: bool = field(
        default=True,
        metadata={"doc": "add to a refusal what the domain explains in its own words, named as its words"},
    )
    received_spf: bool = field(
        default=False, metadata={"doc": "write a Received-SPF field for each identity as well"}
    )
    receiver: str = field(
        default="",
        metadata={"doc": "the name of this host in Received-SPF and in explanations; empty: none is given"},
    )

    def __post_init__(self) -> None:
        if self.max_void_lookups < 0:
            raise ValueError("max_void_lookups is negative")


class Spf(Policy[SpfSettings]):
    """Checks both identities at MAIL."""

    name = "spf"
    Settings = SpfSettings
    method = "spf"
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)
    # RFC 7208 4.6.4: at least 20 seconds
    timeout_s = 20.0

    def __init__(self, settings: SpfSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._limits = SpfLimits(voids=settings.max_void_lookups)
        self._actions = {
            Result.FAIL: settings.on_fail,
            Result.SOFTFAIL: settings.on_softfail,
            Result.PERMERROR: settings.on_permerror,
            Result.TEMPERROR: EarlyHandling(settings.on_temperror.value),
        }

    async def on_mail(self, tx: Transaction) -> Verdict:
        """The MAIL FROM identity, then that of HELO; one verdict with what was found."""
        mailbox, helo = tx.envelope.mail_from, tx.session.helo
        mail_from = "" if mailbox is None else mailbox.text
        if tx.session.address_source is AddressSource.HIDDEN:
            why = "the client's address is hidden by a balancer"
            hidden = AuthResult("spf", Result.TEMPERROR, why, (_property(mail_from, helo),))
            return proceed(reason="spf_client_hidden", results=(hidden,))
        domain, sender = identity(mail_from, helo)
        with_helo = bool(mail_from) and self.settings.helo_check and is_checkable(a_labels(helo))
        if with_helo:
            # on its way while the other identity is checked
            self.services.dns.prefetch(ask(Question(a_labels(helo), RRType.TXT)), tx)
        explain = self.settings.use_explanation and self.settings.on_fail is not EarlyHandling.CONTINUE
        found = await self._check(tx, domain, sender, explain=explain)
        report = _Report([_result(found, mail_from, helo)], [found], [])
        self._note(report, found, mail_from, helo, is_helo=not mail_from)
        action = self._actions.get(found.result, EarlyHandling.CONTINUE)
        if action is not EarlyHandling.CONTINUE:
            return report.verdict(
                f"spf_{found.result}", action, _reply_text(found, "MAIL FROM" if mail_from else "HELO")
            )
        if with_helo:
            return await self._with_helo(tx, report, mail_from, helo)
        return report.verdict(f"spf_{found.result}")

    async def _with_helo(self, tx: Transaction, report: _Report, mail_from: str, helo: str) -> Verdict:
        """RFC 7208 2.3: the HELO identity beside the other."""
        on_fail = self.settings.on_helo_fail
        explain = self.settings.use_explanation and on_fail is not EarlyHandling.CONTINUE
        found = await self._check(tx, *identity("", helo), explain=explain, timeout_s=_HELO_TIMEOUT_S)
        report.results.append(_result(found, "", helo))
        report.found.append(found)
        self._note(report, found, mail_from, helo, is_helo=True)
        if found.result is Result.FAIL and on_fail is not EarlyHandling.CONTINUE:
            return report.verdict("spf_helo_fail", on_fail, _reply_text(found, "HELO"))
        return report.verdict(f"spf_{report.found[0].result}")

    async def _check(
        self, tx: Transaction, domain: str, sender: str, *, explain: bool, timeout_s: float | None = None
    ) -> SpfResult:
        session = tx.session
        lookup = check_host(
            session.client,
            domain,
            sender,
            session.helo,
            self._limits,
            receiver=self.settings.receiver,
            now=self.services.clock.now(),
            explain=explain,
        )
        return await self.services.dns.run(lookup, tx, timeout_s=timeout_s)

    def _note(self, report: _Report, found: SpfResult, mail_from: str, helo: str, *, is_helo: bool) -> None:
        if self.settings.received_spf:
            receiver = self.settings.receiver
            value = received_spf(found, mail_from=mail_from, helo=helo, is_helo=is_helo, receiver=receiver)
            report.edits.append(AddField("Received-SPF", value))


@dataclass(frozen=True, slots=True)
class _Report:
    """What was found of the identities so far; the evidence of the verdict."""

    results: list[AuthResult]
    found: list[SpfResult]
    edits: list[HeaderEdit]

    def lines(self) -> Sequence[str]:
        return [line for each in self.found for line in each.lines()]

    def verdict(self, reason: str, action: EarlyHandling = EarlyHandling.CONTINUE, text: str = "") -> Verdict:
        """RFC 7372 3.1: 23 is for what failed, 24 for what could not be evaluated."""
        if action is EarlyHandling.CONTINUE:
            return proceed(reason=reason, results=self.results, edits=self.edits, evidence=self)
        detail = 24 if reason in ("spf_permerror", "spf_temperror") else 23
        if action is EarlyHandling.DEFER:
            return defer(reason, Reply(451, f"4.7.{detail}", text), results=self.results, evidence=self)
        return reject(reason, Reply(550, f"5.7.{detail}", text), results=self.results, evidence=self)


_REASONS = {
    Result.FAIL: "the client is not permitted",
    Result.SOFTFAIL: "the client is probably not permitted",
    Result.NEUTRAL: "the domain says nothing about the client",
}


def _result(found: SpfResult, mail_from: str, helo: str) -> AuthResult:
    reason = found.problem or _REASONS.get(found.result, "")
    return AuthResult("spf", found.result, reason, (_property(mail_from, helo),))


def _property(mail_from: str, helo: str) -> tuple[str, str]:
    """RFC 8601 2.7.2; RFC 7208 2.4: of the null reverse-path it is HELO that was checked."""
    return ("smtp.mailfrom", mail_from) if mail_from else ("smtp.helo", helo)


def _reply_text(found: SpfResult, identity_name: str) -> str:
    """What the client is told. Text of strangers is printable ASCII, short, and named as theirs (RFC 7208 6.2, 8.4)."""
    match found.result:
        case Result.FAIL | Result.SOFTFAIL:
            text = f"SPF: {found.client} is not permitted to send for {found.domain} ({identity_name})"
        case Result.PERMERROR:
            text = f"SPF: the record of {found.domain} cannot be evaluated: {found.problem}"
        case _:
            text = f"SPF: {found.domain} could not be checked now, try again later"
    if found.explanation:
        text = f"{text}; {found.decided_by} explained: {found.explanation}"
    return _UNPRINTABLE.sub("?", text)[:_MAX_REPLY_TEXT]
