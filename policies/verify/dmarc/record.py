"""DMARC Policy Records: the text at _dmarc.DOMAIN (RFC 9989 4.7, 4.8).

Of a record only that is kept which a receiver acts on; where reports go is not. What breaks the syntax behind the
version is ignored as the RFC asks, so any text is a record or none, and parsing raises nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

# Ours: policies stand in the first of a few hundred octets, and what is behind this is not read. So is what a name
# costs bounded, and what is remembered.
_MAX_BYTES = 4096
_CACHED_RECORDS = 512


class DmarcPolicy(StrEnum):
    """RFC 9989 4.7: what a domain owner prefers for mail that fails, from weak to strong."""

    NONE = "none"
    QUARANTINE = "quarantine"
    REJECT = "reject"

    @property
    def lowered(self) -> DmarcPolicy:
        """RFC 9989 4.7, t=y: one level below."""
        return DmarcPolicy.QUARANTINE if self is DmarcPolicy.REJECT else DmarcPolicy.NONE


class Psd(StrEnum):
    """RFC 9989 4.7: whether the record's domain is a public suffix."""

    YES = "y"
    NO = "n"
    UNSAID = "u"


class DmarcRecord(NamedTuple):
    """A record with its defaults filled in.

    `p`, `sp` and `np` are for the domain itself, its subdomains, and those of them that do not exist. `is_applicable`
    is false where the record asks for nothing that can be told: it ends the search and DMARC does not apply.
    """

    p: DmarcPolicy = DmarcPolicy.NONE
    sp: DmarcPolicy = DmarcPolicy.NONE
    np: DmarcPolicy = DmarcPolicy.NONE
    is_dkim_strict: bool = False
    is_spf_strict: bool = False
    psd: Psd = Psd.UNSAID
    is_test: bool = False
    is_applicable: bool = True

    def __str__(self) -> str:
        """What counts of it, in the form of a record."""
        modes = f"adkim={_MODES[self.is_dkim_strict]} aspf={_MODES[self.is_spf_strict]}"
        test = " t=y" if self.is_test else ""
        return f"p={self.p} sp={self.sp} np={self.np} {modes} psd={self.psd}{test}"


_MODES = {False: "r", True: "s"}
# RFC 9989 4.8: dmarc-version comes first and is case-sensitive; names of tags and other values are not (RFC 5234 2.3)
_VERSION = re.compile(rb"[vV][ \t]*=[ \t]*DMARC1[ \t]*(?:;|\Z)")
# possessive: blanks are tried in one way, and the time is linear
_TAG = re.compile(rb"[ \t]*+([A-Za-z]++)[ \t]*+=[ \t]*+([ -:<-~\t]*+)\Z")
# RFC 3986 3: a scheme and something behind it, without what RFC 9989 4.8 has encoded; "!10m" is obsolete there
_URI = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:[^\s!,\"<>\\^`{|}]+(?:![0-9]+[kmgtKMGT]?)?")


def only_record(texts: Iterable[bytes]) -> DmarcRecord | None:
    """The record among the TXT records of one name. RFC 9989 4.10: where there are several, there is none."""
    records = [record for record in map(parse_record, texts) if record]
    return records[0] if len(records) == 1 else None


def parse_record(text: bytes) -> DmarcRecord | None:
    """A record, None for a text that is no DMARC record. Of one over 4096 octets the first tags count."""
    # most texts at a wildcard name are other things
    if not _VERSION.match(text):
        return None
    return _parsed(text if len(text) <= _MAX_BYTES else text[:_MAX_BYTES].rpartition(b";")[0])


@lru_cache(maxsize=_CACHED_RECORDS)
def _parsed(text: bytes) -> DmarcRecord:
    tags: dict[bytes, bytes] = {}
    for piece in text.split(b";")[1:]:
        tag = _TAG.match(piece)
        # RFC 9989 4.8: what is no tag is ignored; so is a second one of a name
        if tag is not None:
            tags.setdefault(tag[1].lower(), tag[2].rstrip(b" \t").lower())
    p, sp, np = (_policy(tags.get(name)) for name in (b"p", b"sp", b"np"))
    is_applicable = True
    # RFC 9989 4.10.1: without a valid p, or with an invalid sp or np, a record that asks for reports means p=none
    if p is None or (sp is None and b"sp" in tags) or (np is None and b"np" in tags):
        p, sp, np = DmarcPolicy.NONE, None, None
        is_applicable = any(_URI.fullmatch(uri.strip(b" \t")) for uri in tags.get(b"rua", b"").split(b","))
    sp = sp or p
    psd = tags.get(b"psd", b"")
    return DmarcRecord(
        p,
        sp,
        np or sp,
        is_dkim_strict=tags.get(b"adkim") == b"s",
        is_spf_strict=tags.get(b"aspf") == b"s",
        psd=Psd.YES if psd == b"y" else Psd.NO if psd == b"n" else Psd.UNSAID,
        is_test=tags.get(b"t") == b"y",
        is_applicable=is_applicable,
    )


def _policy(value: bytes | None) -> DmarcPolicy | None:
    return _POLICIES.get(value) if value else None


_POLICIES = {policy.value.encode(): policy for policy in DmarcPolicy}
