"""The DKIM-Signature fields of a message, parsed (RFC 6376 3.5, 6.1.1; RFC 8616 5 for internationalized headers).

What can be refused without a key is refused here, so that a malformed signature costs no question of DNS.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.api import AddressError, Domain, Field, Header, Result
from policies.verify.signed import (
    PASS,
    Coverage,
    Finding,
    SignatureError,
    Signer,
    Step,
    judge_time,
    parse_coverage,
    parse_signer,
)
from policies.verify.tags import TagError, Tags, colon_list, parse_tags, without_space

NAME = b"dkim-signature"
# RFC 6376 2.11, dkim-quoted-printable; RFC 8616 5 adds what is beyond ASCII
_QUOTED_PRINTABLE = rb"(?:[!-:<>?A-~\x80-\xff \t\r\n%s]|=[0-9A-F]{2})*"
# RFC 5321 4.1.2: an "@" is in quoted local parts only
_LOCAL_PART = re.compile(rb"%s|\"%s\"" % (_QUOTED_PRINTABLE % b"", _QUOTED_PRINTABLE % b"@"))


class Signature(NamedTuple):
    """A signature that only its key can judge. `identity` is i= as it stands, "" when it is not given."""

    field: Field
    signer: Signer
    coverage: Coverage
    identity: str
    is_own_domain: bool  # the domain of i= is that of d=, not one below it
    copied: bytes  # z=: header fields as they were when it was signed, b"" when not given


class Refused(NamedTuple):
    """A signature that nothing can make valid, and why. `tags` are as they stand, none where it is no tag list."""

    field: Field
    finding: Finding
    tags: Tags


def parse_signatures(
    header: Header, *, now: float, most: int, is_internationalized: bool = False
) -> tuple[Signature | Refused, ...]:
    """The first signatures from the top, `most` at most. `now`: seconds since the epoch.

    `is_internationalized`: the header may hold UTF-8 (the transaction has SMTPUTF8).
    """
    return tuple([_parse(field, now, utf8=is_internationalized) for field in header.all(NAME)[:most]])


def _parse(field: Field, now: float, *, utf8: bool) -> Signature | Refused:
    tags: Tags = {}
    try:
        tags = parse_tags(field.value, utf8=utf8)
        _check_version(tags)
        signer = parse_signer(tags)
        coverage = parse_coverage(tags)
        _check_author_is_signed(coverage)
        identity, is_own_domain = _identity(tags, signer.domain)
    except TagError as exc:
        return Refused(field, Finding(Result.PERMERROR, Step.SIGNATURE, str(exc)), tags)
    except SignatureError as exc:
        return Refused(field, Finding(exc.result, Step.SIGNATURE, exc.reason), tags)
    finding = judge_time(coverage, now)
    if finding is not PASS:
        return Refused(field, finding, tags)
    return Signature(field, signer, coverage, identity, is_own_domain, tags.get("z", b""))


def _check_version(tags: Tags) -> None:
    # RFC 6376 3.5: v= MUST be there and is "1"
    if tags.get("v") != b"1":
        raise SignatureError("v= is not 1")
    # RFC 6376 3.5: q= lists ways to the key; dns/txt is the one there is
    if "q" in tags and b"dns/txt" not in colon_list(tags["q"]):
        raise SignatureError("q= names no known way to the key")


def _check_author_is_signed(coverage: Coverage) -> None:
    # RFC 6376 5.4: From MUST be signed
    if b"from" not in coverage.names:
        raise SignatureError("From is not signed")


def _identity(tags: Tags, domain: Domain) -> tuple[str, bool]:
    """i=, and whether its domain is d= itself."""
    value = tags.get("i")
    if value is None:
        return "", True
    # RFC 6376 3.5: [Local-part] "@" domain-name, where the domain is d= or below it
    local, at, host = value.rpartition(b"@")
    if not at or not _LOCAL_PART.fullmatch(local):
        raise SignatureError("i= is no identity")
    try:
        identity_domain = Domain(host.decode("utf-8"))
    except AddressError as exc:
        raise SignatureError("i= has no domain") from exc
    is_own_domain = identity_domain == domain
    if not is_own_domain and not identity_domain.is_subdomain_of(domain):
        raise SignatureError("the domain of i= is not d= nor below it")
    return without_space(value).decode("utf-8"), is_own_domain
