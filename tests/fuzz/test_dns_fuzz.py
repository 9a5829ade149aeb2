"""Packets of strangers: whatever a name server or somebody else sends is an answer, a failure, or ignored.

dnspython is the other opinion: what it reads as the answer to a question, we read so too, record by record.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.adapters.dns.message import Heard, query_for, read_message
from gateway.adapters.dns.names import text_of
from gateway.adapters.dns.reply import CNAME, Reply, Resource, read
from gateway.lookup import Answer, Found, Mx, Record, RRType
from gateway.session import unmapped
from tests.adapters.fake_nameserver import reply_to

NAME = "a.example.org"
WIRE = reply_to(
    dns.message.make_query(NAME, "TXT", use_edns=0),
    "a.example.org. 60 IN CNAME b.example.org.",
    'b.example.org. 60 IN TXT "v=spf1" " -all"',
    "a.example.org. 60 IN MX 10 b.example.org.",
    "a.example.org. 60 IN AAAA ::ffff:192.0.2.1",
    "a.example.org. 60 IN NS a.b.c.",
).to_wire()


def judge(wire: bytes) -> None:
    for rrtype in RRType:
        heard = read_message(query_for(NAME, rrtype), wire)
        if heard is not None and heard.reply is not None:
            read(heard.reply, NAME, rrtype, set())


@given(st.binary(max_size=200))
def test_any_packet_is_judged(tail: bytes) -> None:
    judge(tail)
    judge(WIRE[:12] + tail)
    judge(WIRE[:31] + tail)


@given(st.lists(st.tuples(st.integers(2, len(WIRE) - 1), st.integers(0, 255)), max_size=6))
def test_any_change_of_a_good_packet_is_judged(changes: list[tuple[int, int]]) -> None:
    wire = bytearray(WIRE)
    for place, octet in changes:
        wire[place] = octet
    judge(bytes(wire))


@given(st.lists(st.tuples(st.integers(2, len(WIRE) - 1), st.integers(0, 255)), max_size=3), st.integers(0, 9))
@example([(37, 128)], 0)  # RFC 2181 8: a TTL with its highest bit set
def test_what_dnspython_reads_is_read_alike(changes: list[tuple[int, int]], cut: int) -> None:
    wire = bytearray(WIRE)
    for place, octet in changes:
        wire[place] = octet
    compare(bytes(wire[: len(wire) - cut]), RRType.TXT)


LABELS = st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=3)
NAMES = st.one_of(
    st.just(dns.name.from_text("a.example.org.")),
    st.just(dns.name.root),
    LABELS.map(lambda labels: dns.name.Name([*labels, b""])),
)
TTLS = st.integers(0, 2**31 - 1)


@st.composite
def rrsets(draw: st.DrawFn) -> dns.rrset.RRset:
    kind = draw(st.sampled_from([*map(str, RRType), CNAME, "SOA", "SRV"]))
    name, target = draw(NAMES), draw(NAMES).to_text()
    match kind:
        case "A":
            rdata = str(draw(st.ip_addresses(v=4)))
        case "AAAA":
            rdata = str(draw(st.ip_addresses(v=6)))
        case "MX":
            rdata = f"{draw(st.integers(0, 65535))} {target}"
        case "TXT":
            strings = draw(st.lists(st.binary(max_size=255), min_size=1, max_size=3))
            rdata = " ".join('"' + "".join(f"\\{octet:03d}" for octet in each) + '"' for each in strings)
        case "SOA":
            rdata = f"{target} {target} 1 2 3 4 {draw(TTLS)}"
        case "SRV":
            rdata = f"1 2 3 {target}"
        case _:
            rdata = target
    rdclass = draw(st.sampled_from(["IN", "IN", "CH"])) if kind in {"TXT", "MX", "NS", CNAME} else "IN"
    return dns.rrset.from_text(name, draw(TTLS), rdclass, kind, rdata)


@given(
    st.sampled_from(RRType),
    st.lists(rrsets(), max_size=4),
    st.lists(rrsets(), max_size=2),
    st.sampled_from([dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.SERVFAIL, dns.rcode.BADVERS]),
    st.booleans(),
)
def test_every_message_is_read_as_dnspython_reads_it(
    rrtype: RRType,
    answer: list[dns.rrset.RRset],
    authority: list[dns.rrset.RRset],
    code: dns.rcode.Rcode,
    is_cut: bool,
) -> None:
    message = dns.message.make_response(dns.message.make_query(NAME, rrtype, use_edns=0))
    # such a code comes without an answer
    message.answer, message.authority = [] if code == dns.rcode.BADVERS else answer, authority
    message.set_rcode(code)
    if is_cut:
        message.flags |= dns.flags.TC
    compare(message.to_wire(max_size=65_535), rrtype)


def compare(wire: bytes, rrtype: RRType) -> None:
    """What dnspython takes for an answer to our question is one, and says the same."""
    query = dns.message.make_query(NAME, rrtype, use_edns=0, id=int.from_bytes(wire[:2]))
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError):
        return
    if not query.is_response(message):
        return
    heard = read_message(query_for(NAME, rrtype), wire)
    assert heard is not None
    if message.flags & dns.flags.TC:
        assert heard.is_cut
        return
    resources = expected(message, rrtype)
    has_records = any(each.rrtype == rrtype for each in resources)
    # the upper bits of the code are looked for where nothing else is said
    code = message.rcode() & 15 if has_records else message.rcode()
    if code in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        ttl_s = None if has_records else negative_ttl_s(message)
        reply = Reply(code == dns.rcode.NXDOMAIN, resources, ttl_s)
        # who neither knows nor asks others does not say that there is nothing
        has_asked = reply != Reply() or message.flags & (dns.flags.AA | dns.flags.RA)
        assert heard == (Heard(reply) if has_asked else Heard(why="refused"))
    else:
        assert heard.why


def expected(message: dns.message.Message, rrtype: RRType) -> tuple[Resource, ...]:
    wanted = {dns.rdatatype.from_text(rrtype): rrtype, dns.rdatatype.CNAME: CNAME}
    return tuple(
        Resource(text(rrset.name), wanted[rrset.rdtype], rrset.ttl, value(rrset.rdtype, each))
        for rrset in message.answer
        for each in rrset
        if rrset.rdclass == dns.rdataclass.IN and rrset.rdtype in wanted
    )


def negative_ttl_s(message: dns.message.Message) -> int | None:
    return min(
        (
            min(rrset.ttl, each.minimum)
            for rrset in message.authority
            for each in rrset
            if rrset.rdtype == dns.rdatatype.SOA
        ),
        default=None,
    )


def text(name: dns.name.Name) -> str:
    return text_of(name.labels[:-1])


def value(kind: dns.rdatatype.RdataType, rdata: dns.rdata.Rdata) -> Record:
    fields: Any = rdata
    match kind:
        case dns.rdatatype.A:
            return IPv4Address(fields.address)
        case dns.rdatatype.AAAA:
            return unmapped(IPv6Address(fields.address))
        case dns.rdatatype.MX:
            return Mx(fields.preference, text(fields.exchange))
        case dns.rdatatype.TXT:
            return b"".join(fields.strings)
    return text(fields.target)


def test_the_good_packet_is_good() -> None:
    heard = read_message(query_for(NAME, RRType.TXT), WIRE)
    assert heard is not None
    assert heard.reply is not None
    assert read(heard.reply, NAME, RRType.TXT, set()).answer == Answer(Found.RECORDS, (b"v=spf1 -all",))
