"""pyspf's word on one identity, and the differences from ours that a rule of RFC 7208 explains.

A rule is a function of what was checked and of what pyspf asked. It either predicts the result that pyspf gives, or
changes the records to what pyspf takes them for; then our result on those has to be pyspf's.

pyspf's one hook for DNS belongs to the whole process; here only the method that calls it is another one, so that any
number of these run at once and nobody else who uses pyspf notices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import spf  # type: ignore[import-untyped]  # it has no types

from gateway.api import Answer, Asked, Found, Lookup, Question, RRType
from policies.verify.second_opinion.answers import Answers, UnaskedError, drive
from policies.verify.spf import check_host, identity
from policies.verify.spf.macro import expand_domain
from policies.verify.spf.record import Mechanism, Record, RecordError, is_record, parse_record


@dataclass(frozen=True, slots=True)
class Checked:
    """One identity: that of HELO where `mail_from` is ""."""

    client: str
    mail_from: str
    helo: str


@dataclass(frozen=True, slots=True)
class Opinion:
    """What pyspf says, and what it asked; `explanation` is the domain's own for a fail, where it was asked for."""

    word: str
    asked: tuple[Asked, ...]
    explanation: str = ""


def opinion(checked: Checked, answers: Answers, *, explain: bool = False) -> Opinion:
    """What pyspf says. Raises UnaskedError, and anything that pyspf raises."""
    query = _Query(checked, answers, explain=explain)
    word, _, explanation = query.check()
    if query.unasked is not None:
        raise query.unasked
    own = "" if explanation == spf.EXPLANATIONS["fail"] else explanation
    return Opinion(word, tuple(query.asked), own)


class _Query(spf.query):  # type: ignore[misc]  # its base is untyped
    """A check that asks nobody."""

    def __init__(self, checked: Checked, answers: Answers, *, explain: bool) -> None:
        super().__init__(checked.client, checked.mail_from, checked.helo)
        self.asked: list[Asked] = []
        self.unasked: UnaskedError | None = None
        self._answers = answers
        self._explain = explain

    def dns(self, name: str, qtype: str, cnames: object = None, ignore_void: bool = False) -> list[Any]:  # noqa: FBT001, FBT002  # pyspf's signature
        """What pyspf's own does, but for the network and for CNAMEs, which our answers have followed."""
        name = str(name).removesuffix(".").lower()
        if not all(0 < len(label) < 64 for label in name.split(".")):
            return []
        if not (values := self.cache.get((name, qtype), [])):
            values = self._values(name, qtype)
            self.cache[name, qtype] = values
        if not values and not ignore_void:
            self.void_lookups += 1
            if self.void_lookups > spf.MAX_VOID_LOOKUPS:
                raise spf.PermError("void lookups")
        return list(values)

    def _values(self, name: str, qtype: str) -> list[Any]:
        question = Question(name, RRType(qtype))
        try:
            answer = self._answers(question)
        except UnaskedError as exc:
            self.unasked = self.unasked or exc
            raise spf.TempError("DNS") from exc
        self.asked.append(Asked("pyspf", question, answer))
        if answer.is_temporary:
            raise spf.TempError("DNS")
        match question.rrtype:
            case RRType.TXT:
                return [[text] for text in answer.texts]
            case RRType.MX:
                return [(mx.preference, mx.host) for mx in answer.exchanges]
            case _:
                return [str(record) for record in answer.records]

    def get_explanation(self, spec: str) -> str | None:
        explanation: str | None = super().get_explanation(spec) if self._explain else None
        return explanation


def known_difference(checked: Checked, theirs: Opinion, answers: Answers) -> str:
    """The name of the rule that tells why pyspf does not say what we say, "" when there is none."""
    for rule in RULES:
        if rule(checked, theirs) == theirs.word:
            return rule.__name__
    texts = [text for asked in theirs.asked for text in asked.answer.texts]
    if all(as_pyspf_reads_macros(text) == text for text in texts):
        return ""
    loose = _as_pyspf_reads_macros(answers)
    try:
        same = opinion(checked, loose)
        if theirs.word == same.word and (
            _our_word(checked, loose) == same.word or any(r(checked, same) == same.word for r in RULES)
        ):
            return "macros_are_read_loosely"
    except UnaskedError:
        pass  # read that way, other questions would have been asked
    return ""


def records_of(theirs: Opinion) -> Iterator[tuple[str, Record]]:
    """The records that pyspf read, where they are right."""
    for asked in theirs.asked:
        texts = [text for text in asked.answer.texts if is_record(text)]
        if asked.question.rrtype is RRType.TXT and len(texts) == 1:
            try:
                yield asked.question.name, parse_record(texts[0])
            except RecordError:
                continue


def void_looks_are_counted_by_question(_checked: Checked, theirs: Opinion) -> str | None:
    """RFC 7208 4.6.4 limits the terms for which questions are void.

    pyspf counts the questions: those for each host of an mx and each name of the client, whether or not one matches.
    """
    void = (Found.NO_DATA, Found.NO_SUCH_NAME)
    count = sum(a.answer.found in void for a in theirs.asked if a.question.rrtype is not RRType.TXT)
    return "permerror" if count > 2 else None


def hosts_in_trouble_end_the_check(_checked: Checked, theirs: Opinion) -> str | None:
    """Trouble with one host does not keep another from matching, nor a ptr (RFC 7208 5.5) the terms behind it.

    pyspf gives up at once, also for a %{p} that is of no account: it expands all terms first, and exp= without a fail.
    """
    if not theirs.asked:
        return None
    last = theirs.asked[-1]
    hosts = {mx.host for a in theirs.asked for mx in a.answer.exchanges}
    names = {name for a in theirs.asked if a.question.rrtype is RRType.PTR for name in a.answer.names}
    is_host = last.question.name.lower() in {each.lower() for each in hosts | names}
    is_name = last.question.rrtype is RRType.PTR
    return "temperror" if last.answer.is_temporary and (is_host or is_name) else None


def a_literal_percent_at_the_end_is_an_error(_checked: Checked, theirs: Opinion) -> str | None:
    """RFC 7208 7.1: "%%" is a macro-expand, and a domain-spec or a macro-string may end with one."""
    terms = [term for _, record in records_of(theirs) for term in record.text.split()]
    return "permerror" if any(re.search("%%(/[0-9/]*)?$", term) for term in terms) else None


def unknown_modifiers_are_taken_once(_checked: Checked, theirs: Opinion) -> str | None:
    """RFC 7208 6: only redirect= and exp= MUST NOT appear twice."""
    for _, record in records_of(theirs):
        names = [term.partition("=")[0] for term in record.text.split() if re.match(r"[a-z][\w.-]*=", term)]
        if len(names) != len(set(names)):
            return "permerror"
    return None


def an_include_of_itself_is_a_syntax_error(checked: Checked, theirs: Opinion) -> str | None:
    """It is an error by RFC 7208 4.6.4 when it is evaluated (the limit ends it), not where a term before it matches."""
    client = _client(checked)
    is_ip6 = isinstance(client, IPv6Address)
    nibbles = ".".join(f"{int(client):032X}") if is_ip6 else str(client)
    local, _, sender_domain = checked.mail_from.rpartition("@")
    local = local or "postmaster"
    values = {
        "s": f"{local}@{sender_domain}",
        "l": local,
        "o": sender_domain,
        "i": nibbles,
        "v": "ip6" if is_ip6 else "in-addr",
        "h": checked.helo,
        "p": sender_domain,
    }
    for domain, record in records_of(theirs):
        for directive in record.directives:
            if directive.mechanism is Mechanism.INCLUDE and directive.target is not None:
                target = expand_domain(directive.target, {**values, "d": domain})
                if target.lower() == domain.lower():
                    return "permerror"
    return None


RULES: tuple[Callable[[Checked, Opinion], str | None], ...] = (
    void_looks_are_counted_by_question,
    hosts_in_trouble_end_the_check,
    a_literal_percent_at_the_end_is_an_error,
    unknown_modifiers_are_taken_once,
    an_include_of_itself_is_a_syntax_error,
)


def as_pyspf_reads_macros(text: bytes) -> bytes:
    """RFC 7208 7.1 has a grammar for macros; pyspf takes nearly anything between braces, and uses what it knows of it.

    A brace that is not closed is text, "%{d0}" is the value without its first label, "%{dR}" is not reversed.
    """
    readable = text.decode("latin-1").replace("%{d0}", "..")
    readable = re.sub(r"%\{(?![^} ]*\})", "%%{", readable)
    readable = re.sub(r"%\{([A-Za-z])(?:;|d|-r|R)\}", r"%{\1}", readable)
    return readable.encode("latin-1")


def _as_pyspf_reads_macros(answers: Answers) -> Answers:
    def loose(question: Question) -> Answer:
        answer = answers(question)
        records = (as_pyspf_reads_macros(r) if isinstance(r, bytes) else r for r in answer.records)
        return answer._replace(records=tuple(records))

    return loose


def _our_word(checked: Checked, answers: Answers) -> str:
    def word() -> Lookup[str]:
        domain, sender = identity(checked.mail_from, checked.helo)
        found = yield from check_host(_client(checked), domain, sender, checked.helo)
        return str(found.result)

    return drive(word(), answers)


def _client(checked: Checked) -> IPv4Address | IPv6Address:
    client = ip_address(checked.client)
    mapped = client.ipv4_mapped if isinstance(client, IPv6Address) else None
    return mapped or client
