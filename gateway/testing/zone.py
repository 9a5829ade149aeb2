"""Zone: a world of DNS in memory that answers Lookups at once; a name that it does not have does not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tokenizer
import dns.zonefile

from gateway.lookup import (
    NO_DATA,
    NO_SUCH_NAME,
    Answer,
    Asked,
    Found,
    Lookup,
    Mx,
    Question,
    Record,
    RRType,
)
from gateway.session import client_address

T = TypeVar("T")

_MAX_CNAMES = 8
_TTL_S = 300  # of records that say none; nobody here looks at it

Node = Mapping[RRType | str, Sequence[Record] | str]
"""The records of a name by type. A text in the place of records is a temporary failure ("timeout", "servfail"),
`"CNAME"` a sequence of one name, `"*"` what every type is that the node does not have."""


class ZoneError(ValueError):
    """The text is no zone; the message says where."""


class Zone:
    """Answers from `nodes`, by name (lower case, no final dot); `trail` keeps what was asked, in order."""

    def __init__(self, nodes: Mapping[str, Node] | None = None) -> None:
        self.nodes: dict[str, Node] = {
            name.lower().removesuffix("."): node for name, node in (nodes or {}).items()
        }
        self.trail: list[Asked] = []

    @classmethod
    def parse(cls, text: str) -> Zone:
        """The zone of a master file (RFC 1035 5); names without an $ORIGIN are absolute. Raises ZoneError."""
        records = _Records()
        tokens = dns.tokenizer.Tokenizer(text.removeprefix("\ufeff"), "zone")
        try:
            dns.zonefile.Reader(tokens, dns.rdataclass.IN, records, default_ttl=_TTL_S).read()
        except (dns.exception.DNSException, ValueError) as exc:
            raise ZoneError(f"no zone: {exc}") from exc
        nodes: dict[str, dict[RRType | str, list[Record]]] = {}
        for name, rdata in records.found:
            at = nodes.setdefault(_text(name), {})
            kind = dns.rdatatype.to_text(rdata.rdtype)
            if kind == "CNAME":
                at.setdefault(kind, []).append(_text(rdata.target))  # type: ignore[attr-defined]  # by number
            elif kind in RRType.__members__:
                at.setdefault(RRType(kind), []).append(_record(RRType(kind), rdata))
        for below in tuple(nodes):
            # RFC 8020 2: what is above a name exists too
            above = below
            while above := above.partition(".")[2]:
                nodes.setdefault(above, {})
        return cls(nodes)

    def answer(self, question: Question) -> Answer:
        """What a name server with this zone and nothing else says."""
        name = question.name.lower().removesuffix(".")
        try:
            octets = name.encode()
        except UnicodeEncodeError:  # lone surrogates
            return NO_SUCH_NAME
        if len(octets) > 253 or not all(0 < len(label) <= 63 for label in octets.split(b".")):
            return NO_SUCH_NAME
        for _ in range(_MAX_CNAMES + 1):
            node = self._node(name)
            if node is None:
                return NO_SUCH_NAME
            records = node.get(question.rrtype)
            if records is None and "CNAME" in node:
                name = str(node["CNAME"][0]).lower().removesuffix(".")
                continue
            if records is None:
                records = node.get("*", ())
            if isinstance(records, str):
                return Answer(Found.TEMPORARY_FAILURE, why=records.lower())
            return Answer(Found.RECORDS, tuple(records)) if records else NO_DATA
        return NO_DATA

    def _node(self, name: str) -> Node | None:
        """The name's own node, or that of the wildcard below its closest ancestor (RFC 4592 3.3.1)."""
        node, above = self.nodes.get(name), name
        while node is None and above:
            above = above.partition(".")[2]
            node = self.nodes.get(f"*.{above}" if above else "*")
            if above in self.nodes:
                break
        return node

    def run(self, lookup: Lookup[T], policy: str = "") -> T:
        """Drive a Lookup to its end."""
        try:
            questions = next(lookup)
            while True:
                answers = [self.answer(question) for question in questions]
                self.trail += [Asked(policy, *pair) for pair in zip(questions, answers, strict=True)]
                questions = lookup.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result


class _Records(dns.zonefile.RRsetsReaderTransaction):
    """What dns.zonefile writes into: each record once, of one zone or of several, in linear time."""

    def __init__(self) -> None:
        manager = dns.zonefile.RRSetsReaderManager(dns.name.root, relativize=False)
        super().__init__(manager, True, False)  # type: ignore[no-untyped-call]
        self.found: dict[tuple[dns.name.Name, dns.rdata.Rdata], None] = {}

    def add(self, *args: Any) -> None:
        name, _, rdata = args
        self.found[name, rdata] = None


def _text(name: dns.name.Name) -> str:
    return "" if name == dns.name.root else name.to_text(omit_final_dot=True).lower()


def _record(kind: RRType, rdata: object) -> Record:
    match kind:
        case RRType.A | RRType.AAAA:
            return client_address(rdata.address)  # type: ignore[attr-defined]  # dnspython types by number
        case RRType.MX:
            host = _text(rdata.exchange)  # type: ignore[attr-defined]
            return Mx(rdata.preference, host)  # type: ignore[attr-defined]
        case RRType.TXT:
            return b"".join(rdata.strings)  # type: ignore[attr-defined]
        case RRType.NS | RRType.PTR:
            return _text(rdata.target)  # type: ignore[attr-defined]
