"""Organizational domains: by the DNS Tree Walk (RFC 9989 4.10), or by the Public Suffix List (RFC 7489 3.2).

The list is the one that the package publicsuffixlist carries; nothing is fetched. It is read once, when it is first
asked for, which takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import NamedTuple

from publicsuffixlist import PublicSuffixList

from gateway.api import Answer, Lookup, Question, RRType
from policies.verify.dmarc.record import DmarcRecord, Psd, only_record

# RFC 9989 4.10, step 4: names of eight labels and more are cut to seven
_MAX_LABELS_ABOVE = 7
# most mail of an hour is of few domains, and a look into the list takes as long as a policy
_CACHED_DOMAINS = 4096


@cache
def public_suffixes() -> PublicSuffixList:
    """The list, read when it is first asked for."""
    return PublicSuffixList()


@lru_cache(maxsize=_CACHED_DOMAINS)
def registrable(domain: str) -> str | None:
    """The registrable domain of a name in A-labels, in lower case: one label more than its public suffix.

    None for a name that is itself a public suffix, or no domain. A suffix that the list does not know has one label.
    """
    # one that begins with a dot, or is longer than a name can be, is none
    found = public_suffixes().privatesuffix(domain) if domain and len(domain) <= 253 else None
    return found if isinstance(found, str) else None


class DmarcRecords:
    """The records at _dmarc names; each name is asked for once, so that walks of one message share what they learn."""

    def __init__(self) -> None:
        self._seen: dict[str, DmarcRecord | Answer | None] = {}

    def at(self, domain: str) -> Lookup[DmarcRecord | Answer | None]:
        """The record of a domain, None when it has none, the answer when that is a temporary failure."""
        if domain not in self._seen:
            (answer,) = yield [Question(f"_dmarc.{domain}", RRType.TXT)]
            self._seen[domain] = answer if answer.is_temporary else only_record(answer.texts)
        return self._seen[domain]


class Walk(NamedTuple):
    """What a search for an organizational domain came to.

    `records` are those that it found, by domain, the longest name first. `failed_at` is the domain whose record had a
    temporary failure, `failure` that answer: there the search ended, and `org_domain` is not known ("").
    """

    org_domain: str
    records: dict[str, DmarcRecord]
    failed_at: str = ""
    failure: Answer | None = None


def tree_walk(domain: str, records: DmarcRecords) -> Lookup[Walk]:
    """RFC 9989 4.10: the walk from a domain (lower-case A-labels) to the root, with at most eight questions."""
    found: dict[str, DmarcRecord] = {}
    for name in _targets(domain):
        record = yield from records.at(name)
        if isinstance(record, Answer):
            return Walk("", found, name, record)
        if record is not None:
            found[name] = record
            if record.psd is not Psd.UNSAID:
                break
    return Walk(_org_domain(domain, found), found)


def list_search(domain: str, records: DmarcRecords) -> Lookup[Walk]:
    """RFC 7489 3.2, 6.6.3: the same by the Public Suffix List, with one question for the organizational domain."""
    org_domain = registrable(domain) or domain
    record = yield from records.at(org_domain)
    if isinstance(record, Answer):
        return Walk("", {}, org_domain, record)
    return Walk(org_domain, {} if record is None else {org_domain: record})


def _targets(domain: str) -> Iterator[str]:
    yield domain
    labels = domain.split(".")
    for count in range(min(len(labels) - 1, _MAX_LABELS_ABOVE), 0, -1):
        yield ".".join(labels[-count:])


def _org_domain(start: str, found: dict[str, DmarcRecord]) -> str:
    """RFC 9989 4.10.2, from the longest name to the shortest."""
    name = start
    for name, record in found.items():
        if record.psd is Psd.NO:
            return name
        # A top-level domain that forgets to say psd=y is a public suffix nevertheless: else all domains below it
        # would be one organization, and each could send as any other one.
        if name != start and (record.psd is Psd.YES or "." not in name):
            return ".".join(start.split(".")[-name.count(".") - 2 :])
    return name
