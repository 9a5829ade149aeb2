"""check_host(): whether a client may send for a domain (RFC 7208 4), as a Lookup.

    result = await services.dns.run(check_host(client, "example.org", "local@example.org", helo), tx)

Terms are evaluated one after the other, since what a term asks counts against limits that decide the result (RFC 7208
4.6.4); the addresses of MX hosts and of PTR names are asked for together. Every input gives a result.

Where the RFC leaves room, or a ruling of this project overrules it:
- An address is matched before trouble counts: an mx or ptr of which one host matches does so whatever DNS says of the
  other hosts.
- Void look-ups are counted by term, as the RFC has it ("terms for which DNS queries return ..."): a term counts at most
  once, when it did not match. Only the family of the client's address is asked for. A name that DNS cannot hold is not
  asked for and not counted.
- RFC 7208 5.5 has a ptr that meets a DNS error not match. Evaluation goes on so; but if a match of it would have given
  another result, the result is temperror: DNS trouble is never a fail. The same holds for a term with `%{p}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.api import Answer, Lookup, Question, Result, RRType
from policies.verify.spf.inquiry import DEFAULT_LIMITS, Arguments, Inquiry, SpfLimits, StopError
from policies.verify.spf.macro import (
    MacroError,
    MacroString,
    expand_text,
    parse_macro_string,
)
from policies.verify.spf.names import a_labels, is_askable, is_checkable
from policies.verify.spf.record import Directive, Mechanism, Record, RecordError, is_record, parse_record
from policies.verify.spf.result import SpfResult, Step

# RFC 7208 6.2 leaves the length to us; an SMTP reply line has room for less
_MAX_EXPLANATION = 512
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
# asked for several times in each check: of the class a member costs ten times as much
_NONE, _PASS, _FAIL, _PERMERROR, _TEMPERROR = (
    Result.NONE,
    Result.PASS,
    Result.FAIL,
    Result.PERMERROR,
    Result.TEMPERROR,
)
_TXT, _ALL, _INCLUDE = RRType.TXT, Mechanism.ALL, Mechanism.INCLUDE


def check_host(
    client: IPv4Address | IPv6Address,
    domain: str,
    mail_from: str,
    helo: str,
    limits: SpfLimits = DEFAULT_LIMITS,
    *,
    receiver: str = "",
    now: float = 0.0,
    explain: bool = True,
) -> Lookup[SpfResult]:
    """RFC 7208 4.1: `client` is <ip>, `mail_from` is <sender>; for a HELO identity that is postmaster@`domain`.

    `receiver` ("" is unknown) and `now` (seconds since the epoch) are for explanations, which are asked for only
    with `explain`, and only on `fail`.
    """
    if isinstance(client, IPv6Address) and client.ipv4_mapped:
        # RFC 7208 5: an IPv4-mapped address is an IPv4 address
        client = client.ipv4_mapped
    name = a_labels(domain.removesuffix("."))
    inquiry = Inquiry(client, limits, Arguments(mail_from, helo, receiver, now))
    check = _Check(inquiry)
    outcome = _Outcome(_NONE)
    problem = problem_domain = explanation = ""
    try:
        outcome = yield from check.evaluate(name, 0)
    except StopError as stop:
        stop = check.in_doubt(stop)
        outcome = _Outcome(stop.result)
        problem, problem_domain = stop.problem, stop.domain
    if explain and outcome.result is _FAIL and outcome.exp is not None:
        explanation = yield from check.explain(outcome.exp, outcome.domain)
    return SpfResult(
        outcome.result,
        client,
        name,
        term=outcome.term,
        decided_by=outcome.domain,
        problem=problem,
        problem_domain=problem_domain,
        explanation=explanation,
        lookups=inquiry.lookups,
        voids=inquiry.voids,
        steps=tuple(check.steps),
    )


def identity(mail_from: str, helo: str) -> tuple[str, str]:
    """<domain> and <sender> of the MAIL FROM identity; RFC 7208 2.4: for the null reverse-path, "", that of HELO."""
    if not mail_from:
        return helo, f"postmaster@{helo}"
    return mail_from.rpartition("@")[2], mail_from


class _Outcome(NamedTuple):
    """What evaluating one domain came to: where it was decided, and what explains a fail."""

    result: Result
    term: str = ""
    domain: str = ""
    exp: MacroString | None = None


class _Tried(NamedTuple):
    """How a term came out; `trouble` is what left it undecided, where it is no match for that reason."""

    is_match: bool
    outcome: str
    trouble: str = ""


_MATCH = _Tried(is_match=True, outcome="match")
_NO_MATCH = _Tried(is_match=False, outcome="no match")
_VOID = _Tried(is_match=False, outcome="no match, void")


def _undecided(trouble: str) -> _Tried:
    return _Tried(is_match=False, outcome=f"undecided, {trouble}", trouble=trouble)


class _Check:
    """The state of one check: what its includes and redirects share."""

    def __init__(self, inquiry: Inquiry) -> None:
        self.inquiry = inquiry
        self.steps: list[Step] = []
        # what each term that DNS trouble left undecided would have made the result, and the trouble
        self._undecided: list[tuple[Result, StopError]] = []

    def evaluate(self, domain: str, depth: int) -> Lookup[_Outcome]:
        """RFC 7208 4.3 to 4.7: the check of one domain, its redirects followed."""
        redirected_by = ""
        before = len(self._undecided)
        while (record := (yield from self._record(domain, depth))) is not None:
            matched = yield from self._first_match(record, domain, depth)
            if matched is not None:
                outcome = _Outcome(matched.result, matched.text, domain, record.exp)
            elif record.redirect is None:
                # RFC 7208 4.7: the default result
                outcome = _Outcome(Result.NEUTRAL, domain=domain)
            else:
                # RFC 7208 6.1: the check of the other domain takes the place of this one, with its exp=
                self.inquiry.count(domain)
                redirected_by = domain
                domain, trouble = yield from self.inquiry.target(record.redirect, domain)
                if trouble:
                    raise StopError(_TEMPERROR, trouble, redirected_by)
                continue
            for would_be, doubt in self._undecided[before:]:
                if would_be is not outcome.result:
                    raise doubt
            del self._undecided[before:]
            return outcome
        if redirected_by:
            raise StopError(_PERMERROR, "redirect to a domain without SPF record", redirected_by)
        return _Outcome(_NONE)

    def in_doubt(self, stop: StopError) -> StopError:
        """What ends the check: a permerror that a term left undecided could have forestalled is none."""
        return self._undecided[0][1] if stop.result is _PERMERROR and self._undecided else stop

    def explain(self, exp: MacroString, domain: str) -> Lookup[str]:
        """RFC 7208 6.2: the explanation of a domain, "" when there is none; errors do not count."""
        try:
            if exp.needs_p:
                yield from self.inquiry.find_validated()
            name = self.inquiry.expand(exp, domain)
            if not is_askable(name):
                return ""
            (answer,) = yield from self.inquiry.ask(Question(name, _TXT))
            # RFC 7208 6.2: exactly one record, US-ASCII, and free of syntax errors
            if len(answer.texts) != 1:
                return ""
            text = parse_macro_string(answer.texts[0].decode("latin-1"), is_explanation=True)
            if text.needs_p:
                yield from self.inquiry.find_validated()
        except (StopError, MacroError):
            return ""
        explanation = expand_text(text, self.inquiry.values_of(domain), _MAX_EXPLANATION)
        return explanation if _PRINTABLE.fullmatch(explanation) else ""

    def _record(self, domain: str, depth: int) -> Lookup[Record | None]:
        """RFC 7208 4.3 to 4.5: the record of a domain, None where there is none."""
        if not is_checkable(domain):
            return None
        (answer,) = yield from self.inquiry.ask(Question(domain, _TXT))
        if answer.is_temporary:
            # RFC 7208 4.4
            raise StopError(_TEMPERROR, f"no answer for the SPF record: {answer.why}", domain)
        records = [text for text in answer.records if isinstance(text, bytes) and is_record(text)]
        if not records:
            return None
        # RFC 7208 4.5
        if len(records) > 1:
            raise StopError(_PERMERROR, "more than one SPF record", domain)
        try:
            record = parse_record(records[0])
        except RecordError as exc:
            self.steps.append(Step(depth, domain, (), f"{exc}: {exc.term}" if exc.term else str(exc)))
            raise StopError(_PERMERROR, str(exc), domain) from None
        self.steps.append(Step(depth, domain, (), record.text))
        return record

    def _first_match(self, record: Record, domain: str, depth: int) -> Lookup[Directive | None]:
        """RFC 7208 4.6.2: the first directive that matches."""
        version, address = self.inquiry.version, self.inquiry.address
        directives = record.directives
        tried = 0  # the first directive that no step tells of
        for at, directive in enumerate(directives):
            # RFC 7208 5.6: a network of the other family does not match
            if directive.version and (
                directive.version != version or address & directive.mask != directive.network
            ):
                continue
            if tried < at:
                self.steps.append(Step(depth, domain, directives[tried:at], "no match"))
            tried = at + 1
            found = _MATCH
            if not directive.version and directive.mechanism is not _ALL:
                found = yield from self._query(directive, domain, depth)
            self.steps.append(Step(depth, domain, (directive,), found.outcome))
            if found.is_match:
                return directive
            if found.trouble:
                doubt = StopError(_TEMPERROR, found.trouble, domain)
                self._undecided.append((directive.result, doubt))
        if tried < len(directives):
            self.steps.append(Step(depth, domain, directives[tried:], "no match"))
        return None

    def _query(self, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """A mechanism that asks DNS."""
        self.inquiry.count(domain)
        target, trouble = domain, ""
        if directive.target is not None:
            target, trouble = yield from self.inquiry.target(directive.target, domain)
        if trouble:
            return _undecided(trouble)
        if not is_askable(target) and directive.mechanism is not _INCLUDE:
            return _Tried(is_match=False, outcome=f"no match, {target!a} is no name")
        return (yield from _QUERIES[directive.mechanism](self, target, directive, domain, depth))

    def include(self, target: str, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """RFC 7208 5.2: only pass matches; errors are those of the whole, and none is a permerror."""
        if not target.isascii():
            return _NO_MATCH
        outcome = yield from self.evaluate(target, depth + 1)
        if outcome.result is _NONE:
            raise StopError(_PERMERROR, "include of a domain without SPF record", domain)
        if outcome.result is _PASS:
            return _MATCH
        return _Tried(is_match=False, outcome=f"no match, {outcome.result}")

    def exists(self, target: str, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """RFC 7208 5.7: the family is that of A whatever the client's address is."""
        answer = yield from self.inquiry.answer(Question(target, RRType.A))
        return _MATCH if answer.records else self._void(domain)

    def a(self, target: str, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """RFC 7208 5.3."""
        answer = yield from self.inquiry.answer(Question(target, self.inquiry.rrtype))
        if not answer.records:
            return self._void(domain)
        return _MATCH if self._is_among(answer, directive) else _NO_MATCH

    def mx(self, target: str, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """RFC 7208 5.4."""
        answer = yield from self.inquiry.answer(Question(target, RRType.MX))
        # RFC 7208 4.6.4: at most ten; however they are ordered
        if len(answer.exchanges) > self.inquiry.limits.names:
            raise StopError(_PERMERROR, f"more than {self.inquiry.limits.names} MX hosts", target)
        if not answer.records:
            return self._void(domain)
        hosts = dict.fromkeys([mx.host for mx in answer.exchanges if is_askable(mx.host)])
        answers = yield from self.inquiry.ask(*[Question(host, self.inquiry.rrtype) for host in hosts])
        if any(self._is_among(each, directive) for each in answers):
            return _MATCH
        for host, each in zip(hosts, answers, strict=True):
            if each.is_temporary:
                raise StopError(_TEMPERROR, f"no answer for an MX host: {each.why}", host)
        return _NO_MATCH if all(each.records for each in answers) else self._void(domain)

    def ptr(self, target: str, directive: Directive, domain: str, depth: int) -> Lookup[_Tried]:
        """RFC 7208 5.5."""
        validated = yield from self.inquiry.find_validated()
        end = f".{target}".lower()
        if any(f".{name}".lower().endswith(end) for name in validated.names):
            return _MATCH
        if validated.trouble:
            return _Tried(
                is_match=False, outcome=f"undecided, {validated.trouble}", trouble=validated.trouble
            )
        return self._void(domain) if validated.is_void else _NO_MATCH

    def _void(self, domain: str) -> _Tried:
        self.inquiry.count_void(domain)
        return _VOID

    def _is_among(self, answer: Answer, directive: Directive) -> bool:
        """Whether the client is one of these addresses, or in their networks."""
        version = self.inquiry.version
        mask = directive.mask4 if version == 4 else directive.mask6
        network = self.inquiry.address & mask
        return any(
            address.version == version and int(address) & mask == network for address in answer.addresses
        )


_QUERIES: dict[Mechanism, Callable[[_Check, str, Directive, str, int], Lookup[_Tried]]] = {
    Mechanism.INCLUDE: _Check.include,
    Mechanism.A: _Check.a,
    Mechanism.MX: _Check.mx,
    Mechanism.PTR: _Check.ptr,
    Mechanism.EXISTS: _Check.exists,
}
