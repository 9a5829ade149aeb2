"""DMARC of one message: policy discovery, identifier alignment and the result (RFC 9989 4.10, 5.3), as a Lookup.

Asked are names of the author domain's own organization and the suffix above it, nothing of others': an identifier
aligns only where its organizational domain is the author's, so that of one which does not lie at or below that domain
no question is asked. A forger cannot make this slow with names of his own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from gateway.api import (
    AddressError,
    Answer,
    AuthResult,
    Domain,
    Found,
    Lookup,
    Question,
    Result,
    RRType,
)
from policies.verify.dmarc.record import DmarcPolicy, DmarcRecord
from policies.verify.org_domain import DmarcRecords, Walk, list_search, registrable, tree_walk

# What a name server did, or the way to it. Any other word of a temporary failure is for what we did not do, which a
# forger may bring about: so a word that is new counts among those.
_WORDS_OF_DNS = frozenset({"timeout", "servfail", "refused", "formerr", "notimp", "network", "too_large"})
# Ours: as many as there are signatures that are verified, so that questions are bounded
MAX_WALKS = 10


class Discovery(StrEnum):
    """How organizational domains are found."""

    TREEWALK = "treewalk"  # RFC 9989 4.10
    PSL = "psl"  # RFC 7489 3.2


class Identifier(NamedTuple):
    """What SPF or DKIM found of a domain in A-labels; `domain` is "" where the check failed before it came to one."""

    method: str
    domain: str
    result: Result


class Judged(NamedTuple):
    """An identifier, whether it passed in alignment with the author domain (None: nobody can tell now), and why."""

    identifier: Identifier
    is_aligned: bool | None
    why: str


class Trouble(StrEnum):
    """What a temperror comes from."""

    RECORD = "record"  # DNS of the author domain does not answer
    BUDGET = "budget"  # it was we who did not ask: our time or our questions were used up
    EVIDENCE = "evidence"  # an identifier that could have passed could not be checked


class DmarcResult(NamedTuple):
    """The result with its evidence.

    `policy` is what applies to this mail, behind sp, np and t; `record_at` is the domain whose record it is of, ""
    when there is none. `org_domain` is "" where it was not needed or not to be found.
    """

    author: Domain
    result: Result
    why: str = ""
    policy: DmarcPolicy = DmarcPolicy.NONE
    record_at: str = ""
    record: DmarcRecord | None = None
    org_domain: str = ""
    judged: tuple[Judged, ...] = ()
    trouble: Trouble | None = None

    def lines(self) -> Sequence[str]:
        """What was found, a finding a line."""
        lines = [f"author domain {self.author}"]
        if self.record is not None:
            lines.append(f"record at _dmarc.{self.record_at}: {self.record}")
            lines.append(f"policy {self.policy}")
        if self.org_domain:
            lines.append(f"organizational domain {self.org_domain}")
        for (method, domain, result), is_aligned, why in self.judged:
            state = "open" if is_aligned is None else "aligned" if is_aligned else "not aligned"
            lines.append(f"{method}={result} {domain or 'of no domain'}: {state}, {why}")
        return [*lines, f"dmarc={self.result}{f', {self.why}' if self.why else ''}"]


def identifiers(results: Iterable[AuthResult], *, has_reverse_path: bool) -> tuple[Identifier, ...]:
    """The identifiers among authentication results, in their order, without those that are no domains.

    RFC 9989 4.4.2: of SPF the MAIL FROM identity counts, which is postmaster@HELO for the null reverse-path (RFC 7208
    2.4). A temperror that names nothing is of a check that failed as a whole.
    """
    of_spf = "smtp.mailfrom" if has_reverse_path else "smtp.helo"
    found = []
    for each in results:
        method = each.method
        if method == "spf":
            wanted = of_spf
        elif method == "dkim":
            wanted = "header.d"
        else:
            continue
        value = dict(each.properties).get(wanted)
        if value is not None:
            try:
                domain = Domain(value.rpartition("@")[2])
            except AddressError:
                continue
            found.append(Identifier(method, domain, each.result))
        elif not each.properties and each.result is Result.TEMPERROR:
            found.append(Identifier(method, "", each.result))
    return tuple(found)


def judge(
    author: Domain, identified: Sequence[Identifier], discovery: Discovery = Discovery.TREEWALK
) -> Lookup[DmarcResult]:
    """RFC 9989 5.3: the result of a message whose author domain and other authentication results are known."""
    orgs = _Organizations(discovery)
    found = yield from _discover(author, orgs)
    if isinstance(found, Walk):
        return _without_record(author, identified, found)
    record_at, record = found
    # RFC 9989 4.10.1: there is nothing that can be applied
    if not record.is_applicable:
        return DmarcResult(
            author, Result.NONE, "the record has no valid policy", record_at=record_at, record=record
        )
    policy, trouble = (record.p, None) if record_at == author else (yield from _inherited(author, record))
    if record.is_test:
        policy = policy.lowered
    judged: list[Judged] = []
    is_aligned: bool | None = False
    is_open = False
    # those first of which nothing has to be asked
    own = [each for each in identified if each.domain == author]
    others = [each for each in identified if each.domain != author]
    for each in (*own, *others):
        if is_aligned:
            judged.append(Judged(each, None, "not looked at, since another one is aligned"))
            continue
        judged.append((yield from _align(author, record, each, orgs)))
        is_aligned = judged[-1].is_aligned
        is_open = is_open or is_aligned is None
    # RFC 9989 5.3.5: one is enough; 5.3.6: what is missing stands against a fail, not against a pass
    if is_aligned:
        result, why, trouble = Result.PASS, "", None
    elif trouble is not None:
        result, why = Result.TEMPERROR, "whether the author domain exists is not known"
    elif is_open:
        result, why, trouble = Result.TEMPERROR, "what may be aligned could not be checked", Trouble.EVIDENCE
    else:
        result, why = Result.FAIL, "nothing that passed is aligned"
    return DmarcResult(
        author, result, why, policy, record_at, record, orgs.known.get(author, ""), tuple(judged), trouble
    )


class _Organizations:
    """Organizational domains as far as they are `known`, "" where DNS failed; each is searched for once."""

    def __init__(self, discovery: Discovery) -> None:
        self.records = DmarcRecords()
        self.known: dict[str, str] = {}
        self._by_list = discovery is Discovery.PSL

    def search(self, domain: str) -> Lookup[Walk]:
        """The organizational domain with the records on the way there."""
        walk = yield from (list_search if self._by_list else tree_walk)(domain, self.records)
        self.known[domain] = walk.org_domain
        return walk

    def of(self, domain: str) -> Lookup[str]:
        """The organizational domain of a domain."""
        if domain not in self.known:
            if self._by_list:
                self.known[domain] = registrable(domain) or domain
            else:
                yield from self.search(domain)
        return self.known[domain]


def _discover(author: Domain, orgs: _Organizations) -> Lookup[tuple[str, DmarcRecord] | Walk]:
    """RFC 9989 4.10.1: the record to apply with its domain, or the walk that came to none."""
    own = yield from orgs.records.at(author)
    if isinstance(own, Answer):
        return Walk("", {}, author, own)
    if own is not None:
        return author, own
    walk = yield from orgs.search(author)
    if walk.failure is not None or not walk.records:
        return walk
    if walk.org_domain in walk.records:
        return walk.org_domain, walk.records[walk.org_domain]
    # the organization has none: the last one found is that of its public suffix
    return list(walk.records.items())[-1]


def _without_record(author: Domain, identified: Sequence[Identifier], walk: Walk) -> DmarcResult:
    if walk.failure is None:
        return DmarcResult(author, Result.NONE, "there is no record")
    why = f"_dmarc.{walk.failed_at} could not be asked: {walk.failure.why}"
    # Whichever record it would have been: the author domain is aligned with itself
    if any(record.is_applicable for record in walk.records.values()):
        for each in identified:
            if each.domain == author and each.result is Result.PASS:
                return DmarcResult(
                    author, Result.PASS, why, judged=(Judged(each, True, "it is the author domain"),)
                )
    return DmarcResult(author, Result.TEMPERROR, why, trouble=_trouble(walk.failure))


def _trouble(failure: Answer) -> Trouble:
    return Trouble.RECORD if failure.why in _WORDS_OF_DNS else Trouble.BUDGET


def _inherited(author: Domain, record: DmarcRecord) -> Lookup[tuple[DmarcPolicy, Trouble | None]]:
    """RFC 9989 4.10.1: sp where the author domain exists, np where it does not; and what prevents an answer."""
    if record.sp is record.np:
        return record.sp, None
    (answer,) = yield [Question(author, RRType.TXT)]
    match answer.found:
        case Found.NO_SUCH_NAME:
            return record.np, None
        case Found.TEMPORARY_FAILURE:
            # the weaker one of the two applies in any case
            weaker = min(record.sp, record.np, key=list(DmarcPolicy).index)
            trouble = _trouble(answer)
            is_open = trouble is Trouble.BUDGET or weaker is DmarcPolicy.NONE
            return weaker, trouble if is_open else None
        case _:
            # RFC 9989 3.2.13, RFC 8020: a name with records of whatever type exists
            return record.sp, None


def _align(
    author: Domain, record: DmarcRecord, identifier: Identifier, orgs: _Organizations
) -> Lookup[Judged]:
    """RFC 9989 4.10.2: whether an identifier is aligned; None where it could be."""
    method, domain, result = identifier
    is_strict = record.is_spf_strict if method == "spf" else record.is_dkim_strict
    if result not in (Result.PASS, Result.TEMPERROR):
        return Judged(identifier, False, "it did not pass")
    if not domain:
        return Judged(identifier, None, "the check failed as a whole")
    # nobody's own, and above everybody
    if "." not in domain:
        return Judged(identifier, False, "it is a top-level domain")
    could_be = True if result is Result.PASS else None
    if domain == author:
        return Judged(identifier, could_be, "it is the author domain")
    if is_strict:
        return Judged(identifier, False, "it is not the author domain, and alignment is strict")
    if domain.rpartition(".")[2] != author.rpartition(".")[2]:
        return Judged(identifier, False, "it is of another top-level domain")
    org_domain = yield from orgs.of(author)
    if not org_domain:
        return Judged(identifier, None, "the author's organizational domain could not be asked for")
    if domain != org_domain and not domain.endswith(f".{org_domain}"):
        return Judged(identifier, False, f"it is not at or below {org_domain}")
    if could_be is None:
        return Judged(identifier, None, f"it is at or below {org_domain}")
    if domain not in orgs.known and len(orgs.known) > MAX_WALKS:
        return Judged(identifier, False, "too many domains to ask for")
    its = yield from orgs.of(domain)
    if not its:
        return Judged(identifier, None, "its organizational domain could not be asked for")
    return Judged(identifier, its == org_domain, f"its organizational domain is {its}")
