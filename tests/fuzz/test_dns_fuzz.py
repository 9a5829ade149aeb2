"""Packets of strangers: whatever a name server or somebody else sends is an answer, a failure, or ignored."""

from __future__ import annotations

import contextlib

import dns.message
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.dns.reply import NoReplyError, read
from gateway.adapters.dns.wire import _answer_to, _reply
from gateway.lookup import RRType
from tests.adapters.fake_nameserver import reply_to

QUERY = dns.message.make_query("a.example.org", "TXT", use_edns=0)
WIRE = reply_to(
    QUERY,
    "a.example.org. 60 IN CNAME b.example.org.",
    'b.example.org. 60 IN TXT "v=spf1" " -all"',
    "a.example.org. 60 IN MX 10 b.example.org.",
    "a.example.org. 60 IN AAAA ::ffff:192.0.2.1",
    "a.example.org. 60 IN NS a.b.c.",
).to_wire()


def judge(wire: bytes) -> None:
    message = _answer_to(QUERY, wire)
    if message is not None:
        with contextlib.suppress(NoReplyError):
            for rrtype in RRType:
                read(_reply(message), "a.example.org", rrtype, set())


@given(st.binary(max_size=200))
def test_any_packet_is_judged(tail: bytes) -> None:
    judge(tail)
    judge(QUERY.id.to_bytes(2) + tail)
    judge(WIRE[:31] + tail)


@given(st.lists(st.tuples(st.integers(2, len(WIRE) - 1), st.integers(0, 255)), max_size=6))
def test_any_change_of_a_good_packet_is_judged(changes: list[tuple[int, int]]) -> None:
    wire = bytearray(WIRE)
    for place, octet in changes:
        wire[place] = octet
    judge(bytes(wire))


def test_the_good_packet_is_good() -> None:
    message = _answer_to(QUERY, WIRE)
    assert message is not None
    (answer, _, _) = read(_reply(message), "a.example.org", RRType.TXT, set())
    assert answer is not None
    assert answer.texts == (b"v=spf1 -all",)
