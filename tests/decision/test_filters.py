"""filters: a query is understood or refused in one harmless line, and finds what it says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import ACTIONS, FilterError, Judged, parse_query
from gateway.decision.filters import NAMES, OTHER_NAMES
from gateway.verdict import Stage, proceed, reject
from tests.decision.records import DENIED, decision, plain

WOULD = Judged("dmarc", Stage.EOM, "observe", proceed(), reject("dmarc_fail", DENIED), 0.1, "")
FAILED = Judged("greylist", Stage.RCPT, "enforce", proceed(), None, 0.1, "timeout")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, True),
        ({"tx": "1m80vxzckjnp001-1"}, True),
        ({"tx": "1M80VXZCKJNP001"}, True),
        ({"tx": "1m80vxzckjnp001-2"}, False),
        ({"tx": "1m80"}, False),
        ({"rcpt": "Ann@Example.org"}, True),
        ({"rcpt": "<bob@example.com>"}, True),
        ({"rcpt": "nn@example.org"}, False),
        ({"rcpt": "example.org"}, True),
        ({"rcpt": "@example.org"}, True),
        ({"rcpt": "ample.org"}, False),
        ({"sender": "you@example.net"}, True),
        ({"sender": "<you@example.net>"}, True),
        ({"sender": "example.net"}, True),
        ({"sender": "<>"}, False),
        ({"sender": "example.org"}, False),
        ({"client": "192.0.2.7"}, True),
        ({"client": "192.0.2.0/24"}, True),
        ({"client": "::ffff:192.0.2.7"}, True),
        ({"client": "192.0.2.8"}, False),
        ({"client": "2001:db8::/32"}, False),
        ({"action": "rejected"}, True),
        ({"action": "REJECTED"}, True),
        ({"action": "accepted"}, False),
        ({"policy": "relay_guard"}, True),
        ({"policy": "dmarc"}, True),
        ({"policy": "greylist"}, True),
        ({"policy": "spf"}, False),  # it just went on
        ({"id": "1m80vxzckjnp001-1"}, True),
        ({"from": "example.net"}, True),
        ({"network": "192.0.2.0/24"}, True),
        ({"network": "198.51.100.0/24"}, False),
        ({"domain": "example.net"}, True),
        ({"domain": "Example.COM"}, True),
        ({"domain": "net"}, True),
        ({"domain": "ample.net"}, False),
        ({"domain": "mail1.example.net"}, False),  # HELO is nobody's domain
        ({"reason": "dmarc_fail"}, True),
        ({"reason": "Downstream"}, True),  # of each recipient
        ({"reason": "spf_fail"}, False),
        ({"since": "2001-09-09T01:46:41Z"}, True),
        ({"since": "2001-09-09T01:46:41.000"}, True),
        ({"since": "2001-09-09T01:46:41.001Z"}, False),
        ({"since": "2001-09-09T03:46:41+02:00"}, True),
        ({"since": "10m"}, True),
        ({"since": "9s"}, False),
        ({"policy": "dmarc", "action": "rejected", "rcpt": "example.com", "limit": "3"}, True),
        ({"policy": "dmarc", "action": "accepted"}, False),
    ],
)
def test_finds_what_it_says(query: dict[str, str], expected: bool) -> None:
    record = decision(
        1,
        rcpts=("ann@example.org", "bob@example.com"),
        action="rejected",
        judged=[plain(policy="spf"), WOULD, FAILED],
        answer=DENIED,
        policy="relay_guard",
    )
    # ten seconds later
    filters, _ = parse_query(query, lambda: record.time + 10)
    assert filters.matches(record) is expected


def test_the_null_reverse_path_is_found_by_its_brackets_only() -> None:
    record = decision(1, mail_from="")
    assert parse_query({"sender": "<>"})[0].matches(record)
    assert not parse_query({"sender": "example.net"})[0].matches(record)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"subject": "x"}, "unknown filter 'subject'; there are tx, rcpt"),
        ({"limit": "0"}, "limit '0' is not in 1..1000"),
        ({"limit": "1001"}, "limit '1001'"),
        ({"limit": "-1"}, "limit '-1'"),
        ({"limit": "9" * 200}, "limit '999"),
        ({"limit": "\u0663"}, r"limit '\\u0663'"),
        ({"action": "lost"}, "action 'lost' is none of accepted,"),
        ({"client": "mail.example.org"}, "client 'mail.example.org' is no address"),
        ({"client": "192.0.2.0/33"}, "is no address and no network"),
        ({"rcpt": "x" * 257}, "rcpt is no text of at most 256 characters"),
        ({"rcpt": ["x"]}, "rcpt is no text"),
        ({"rcpt": None}, "rcpt is no text"),
        ({"domain": "a..b"}, "domain 'a..b' is no domain"),
        ({"since": "yesterday"}, "since 'yesterday' is neither a time"),
        ({"since": "5w"}, "since '5w' is neither"),
        ({"since": "99999-01-01"}, "is neither"),
        ({"id": "a", "tx": "b"}, "id and tx are the same filter"),
        ({"from": "a", "sender": "b"}, "from and sender are the same filter"),
    ],
)
def test_says_what_is_wrong(query: dict[str, object], error: str) -> None:
    with pytest.raises(FilterError, match=error):
        parse_query(query)


def test_twenty_are_shown_unless_a_number_is_given() -> None:
    assert parse_query({})[1] == 20
    assert parse_query({"limit": "1000"})[1] == parse_query({"limit": 1000})[1] == 1000


FILTERS = st.sampled_from([*NAMES, *OTHER_NAMES]) | st.text()
VALUES = st.text() | st.sampled_from(ACTIONS) | st.none() | st.integers() | st.lists(st.text())


@given(st.dictionaries(FILTERS, VALUES))
def test_any_query_finds_or_is_refused_in_printable_ascii(query: dict[str, object]) -> None:
    refusal = ""
    try:
        filters, limit = parse_query(query)
    except FilterError as exc:
        refusal = str(exc)
    else:
        assert 1 <= limit <= 1000
        assert filters.matches(decision()) in (True, False)
    assert re.fullmatch(r"[\x20-\x7e]*", refusal)
