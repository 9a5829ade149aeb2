"""The world of DNS that tests and `mxgate explain --zone` ask."""

from __future__ import annotations

import pytest

from gateway.lookup import NO_DATA, NO_SUCH_NAME, Answer, Found, Question, RRType
from gateway.testing import Zone
from gateway.testing.zone import ZoneError

ZONE = """
*.example.org. 300 IN TXT "any"
a.b.example.org. 300 IN TXT "own"
c.example.org. 300 IN MX 10 mx.example.org.
"""


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("x.example.org", Answer(Found.RECORDS, (b"any",))),
        ("x.y.example.org", Answer(Found.RECORDS, (b"any",))),
        ("a.b.example.org", Answer(Found.RECORDS, (b"own",))),
        ("c.example.org", NO_DATA),
        ("b.example.org", NO_DATA),
        ("x.b.example.org", NO_SUCH_NAME),
        ("x.c.example.org", NO_SUCH_NAME),
        ("x.example.net", NO_SUCH_NAME),
    ],
)
def test_a_wildcard_is_for_names_whose_closest_ancestor_it_stands_below(name: str, answer: Answer) -> None:
    assert Zone.parse(ZONE).answer(Question(name, RRType.TXT)) == answer


@pytest.mark.parametrize("name", ["\ud800.example.org", "a..example.org", "", f"{'a' * 64}.example.org"])
def test_what_no_name_can_be_does_not_exist(name: str) -> None:
    assert Zone.parse(ZONE).answer(Question(name, RRType.TXT)) == NO_SUCH_NAME


def test_the_file_of_a_name_server_is_a_zone() -> None:
    zone = Zone.parse(
        """\ufeff$ORIGIN example.org.
@   IN SOA ns hostmaster ( 1 3600 600
        86400 300 )
@   TXT "v=spf1 mx -all"
@   TXT "v=spf1 mx -all"
www CNAME @
$ORIGIN example.net.
@   SOA ns.example.org. hostmaster.example.org. 1 3600 600 86400 300
"""
    )
    record = Answer(Found.RECORDS, (b"v=spf1 mx -all",))
    assert zone.answer(Question("example.org", RRType.TXT)) == record
    assert zone.answer(Question("www.example.org", RRType.TXT)) == record
    assert zone.answer(Question("example.net", RRType.TXT)) == NO_DATA
    assert zone.answer(Question("sub.example.net", RRType.TXT)) == NO_SUCH_NAME


def test_what_is_no_zone_is_told_with_its_line() -> None:
    with pytest.raises(ZoneError, match=r"zone:\d"):
        Zone.parse('a.example. 300 IN A 192.0.2.1\nb.example. 300 IN TXT "never ends\n')
