"""Forward-confirmed reverse DNS: the name of an address that leads back to it (RFC 8601 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from gateway.api import Lookup, Question, Result, RRType

# RFC 8601 3 warns of addresses with very many names; this is what SPF takes of them (RFC 7208 4.6.4)
_MAX_NAMES = 10


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What was found of an address; the evidence of a verdict. `name` is the one that leads back, "" when none does."""

    client: IPv4Address | IPv6Address
    result: Result
    names: tuple[str, ...] = ()
    name: str = ""
    why: str = ""

    def lines(self) -> Sequence[str]:
        names = ", ".join(self.names) or "no name"
        return (f"{self.client} has {names}", f"{self.name or 'none of them'} leads back to it")


def confirm(client: IPv4Address | IPv6Address) -> Lookup[Confirmed]:
    """RFC 8601 3: the names of an address, and which of them has that address."""
    (answer,) = yield [Question(client.reverse_pointer, RRType.PTR)]
    if answer.is_temporary:
        return Confirmed(client, Result.TEMPERROR, why=f"its name could not be looked up: {answer.why}")
    names = answer.names[:_MAX_NAMES]
    if not names:
        # RFC 8601 2.7.3: no PTR data are published
        return Confirmed(client, Result.PERMERROR, why="the address has no name")
    rrtype = RRType.A if client.version == 4 else RRType.AAAA
    answers = yield [Question(name, rrtype) for name in names]
    for name, found in zip(names, answers, strict=True):
        if client in found.addresses:
            return Confirmed(client, Result.PASS, names, name)
    if any(found.is_temporary for found in answers):
        return Confirmed(client, Result.TEMPERROR, names, why="a name of it could not be looked up")
    return Confirmed(client, Result.FAIL, names, why="no name of the address leads back to it")
