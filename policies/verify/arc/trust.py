"""Whose word counts: a claim of an earlier hop that an operator believes (RFC 8617 7.2.1, local policy).

The rule, for a chain that passes: go back from the newest set while both signatures of each set are by domains that the
operator lists, and stop at the first AAR that says that the author domain was authenticated when the message came to
that sealer. Every hop behind that sealer is listed too, and says by its seal (cv=pass) that the chain was whole when it
took the message over; so the sets before it need no trust. Where a sealer that is not listed comes first, nothing is
believed: it had the message in its hands, and what older AARs say was of the message before that.

What the newest AMS leaves unsigned proves nothing: with From not in its h=, or with a field above the signed one of its
name that a message has once (a second Subject), nobody is believed, though the chain passes.

An AAR is believed as little as can be: it is all of one mind about DMARC, or says nothing of DMARC and has a pass for
the very author domain. Which other domains align nobody can tell without asking their DNS.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from gateway.api import AddressError, Domain, Header, ReadResult, parse_results
from policies.verify.arc.chain import Judged, SignedMessage
from policies.verify.domain_list import DomainList
from policies.verify.signed import added_field

# Of what is not read to its end, the end may deny what its beginning claims.
_MAX_BYTES = 16_384
_MAX_RESULTS = 50


class Standing(StrEnum):
    """What was made of a set on the way back from the newest one."""

    BELIEVED = "believed"
    NO_CLAIM = "no_claim"  # trusted, but its AAR does not say that the author was authenticated
    NOT_LISTED = "not_listed"
    NOT_AS_SEALED = "not_as_sealed"  # the newest AMS leaves unsigned what a reader is shown


class Trust(NamedTuple):
    """The sealer whose claim is believed, None when there is none; what was made of each set, from the newest on."""

    sealer: Domain | None = None
    standings: tuple[Standing, ...] = ()


def trusted_claim(sets: Sequence[Judged], header: Header, author: Domain, sealers: DomainList) -> Trust:
    """Whose claim that `author` was authenticated is to be believed; `sets` of a chain that passed, newest first."""
    if not _is_as_sealed(sets[0], header):
        return Trust(None, (Standing.NOT_AS_SEALED,))
    standings: list[Standing] = []
    for judged in sets:
        if not _is_listed(judged, sealers):
            return Trust(None, (*standings, Standing.NOT_LISTED))
        if claims(judged.link.arc_set.results, author):
            return Trust(judged.link.sealer.domain, (*standings, Standing.BELIEVED))
        standings.append(Standing.NO_CLAIM)
    return Trust(None, tuple(standings))


def claims(results: bytes, author: Domain) -> bool:
    """Whether an authres-payload says that a message of this author domain was authenticated as such."""
    if len(results) > _MAX_BYTES or results.count(b";") > _MAX_RESULTS:
        return False
    found = parse_results(results).results
    dmarc = [each for each in found if each.method == "dmarc"]
    if dmarc:
        return all(
            each.result == "pass" and all(_domain(text) == author for text in _values(each, "header.from"))
            for each in dmarc
        )
    return any(each.result == "pass" and author in _authenticated(each) for each in found)


def _is_as_sealed(newest: Judged, header: Header) -> bool:
    """Whether readers are shown the author that the newest AMS signs, and no field in place of one that it signs."""
    message = newest.link.message
    if not isinstance(message, SignedMessage) or b"from" not in message.coverage.names:
        return False
    return not added_field(header, message.coverage.names)


def _is_listed(judged: Judged, sealers: DomainList) -> bool:
    message = judged.link.message
    return (
        judged.link.sealer.domain in sealers
        and isinstance(message, SignedMessage)
        and message.signer.domain in sealers
    )


# RFC 8601 2.7: the identity that a method authenticates. Of DKIM that is d=; many give i= only, which is d= or below.
_IDENTITIES = {"dkim": ("header.d", "header.i"), "spf": ("smtp.mailfrom",)}


def _authenticated(result: ReadResult) -> Sequence[Domain | None]:
    """The domain that a pass of DKIM or SPF is about; several when it contradicts itself is none."""
    for name in _IDENTITIES.get(result.method, ()):
        if values := _values(result, name):
            return [_domain(values[0])] if len(values) == 1 else []
    return []


def _values(result: ReadResult, name: str) -> Sequence[str]:
    return [value for each, value in result.properties if each == name]


def _domain(value: str) -> Domain | None:
    """The domain of a property, which may be that of a mailbox."""
    try:
        return Domain.parse(value.rpartition("@")[2])
    except AddressError:
        return None
