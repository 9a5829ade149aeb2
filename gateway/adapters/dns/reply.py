"""Reply: what a name server said, and how it is read (RFC 1034 5.2.2, RFC 2308)."""

from __future__ import annotations

from typing import NamedTuple

from gateway.lookup import NO_DATA, NO_SUCH_NAME, Answer, Found, Record, RRType

MAX_RECORDS = 1000
"""Records of one reply; of A more than 4000 would fit into a message, which costs more than anybody's mail is worth."""

POSITIVE_S = 3600
"""Longest time that records are remembered."""

NEGATIVE_S = 300
"""The same for "no such name" and "no data" (RFC 2308 5 allows hours)."""

FAILURES = ("timeout", "servfail", "refused", "formerr", "notimp", "network", "too_large", "closed", "failed")
"""Why there is no answer: `Answer.why` of temporary failures that are not a budget's."""

CNAME = "CNAME"


class Resource(NamedTuple):
    """One record of the answer section, of class IN; `value` of a CNAME is its target."""

    owner: str
    rrtype: RRType | str
    ttl_s: int
    value: Record


class Reply(NamedTuple):
    """NOERROR or NXDOMAIN. `negative_ttl_s` is that of the SOA in the authority section, None without one."""

    is_no_such_name: bool = False
    resources: tuple[Resource, ...] = ()
    negative_ttl_s: int | None = None


class Reading(NamedTuple):
    """An answer and for how many seconds it may be remembered; or, without one, the name to ask for next."""

    answer: Answer | None
    ttl_s: int
    target: str = ""


def read(reply: Reply, name: str, rrtype: RRType, seen: set[str]) -> Reading:
    """The records of `name`, aliases in the reply followed; `seen` are the names that led here, and grows.

    Records of other names are ignored: they say nothing about this one.
    """
    direct = [each for each in reply.resources if each.owner == name and each.rrtype == rrtype]
    if direct:  # as nearly always
        left_s = min(POSITIVE_S, *[each.ttl_s for each in direct])
        return Reading(Answer(Found.RECORDS, tuple([each.value for each in direct])), left_s)
    found: dict[str, list[Record]] = {}
    aliases: dict[str, str] = {}
    ttls: dict[str, int] = {}
    for owner, kind, ttl_s, value in reply.resources:
        if kind == rrtype:
            found.setdefault(owner, []).append(value)
        elif kind == CNAME and isinstance(value, str):
            aliases[owner] = value
        else:
            continue
        ttls[owner] = min(ttls.get(owner, POSITIVE_S), ttl_s)
    at, left_s = name, POSITIVE_S
    seen.add(at)
    while at not in found and at in aliases:
        left_s = min(left_s, ttls[at])
        at = aliases[at]
        if at in seen:  # a loop
            return Reading(NO_DATA, min(left_s, NEGATIVE_S))
        seen.add(at)
    if at in found:
        return Reading(Answer(Found.RECORDS, tuple(found[at])), min(left_s, ttls[at]))
    # RFC 2308 5: without an SOA it is not remembered
    left_s = min(left_s, reply.negative_ttl_s or 0, NEGATIVE_S)
    # RFC 6604 3: the code is about the last name of the chain
    if reply.is_no_such_name:
        return Reading(NO_SUCH_NAME, left_s)
    # RFC 2308 2.2: with an SOA, the last name has no such records; without one, the server did not go there
    if at == name or reply.negative_ttl_s is not None:
        return Reading(NO_DATA, left_s)
    return Reading(None, left_s, at)
