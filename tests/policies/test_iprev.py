"""iprev: names that lead back to the client's address, and what follows where none does."""

from __future__ import annotations

import pytest

from gateway.api import AddressSource, Result, Stage
from gateway.testing import Client, Harness, PolicyContract
from policies.iprev import NOT_CONFIRMED, NOT_CONFIRMED_NOW, Iprev, IprevSettings, OnFinding, OnTrouble

STRICT = IprevSettings(OnFinding.REJECT, OnFinding.REJECT, OnTrouble.DEFER)
GOOD = """
1.2.0.192.in-addr.arpa. 60 IN PTR other.example.
1.2.0.192.in-addr.arpa. 60 IN PTR mail.example.
mail.example. 60 IN A 192.0.2.9
mail.example. 60 IN A 192.0.2.1
"""
ELSEWHERE = "1.2.0.192.in-addr.arpa. 60 IN PTR mail.example.\nmail.example. 60 IN A 192.0.2.9"
V6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa."


class TestContract(PolicyContract):
    policy = Iprev
    settings = STRICT
    zone = GOOD


@pytest.mark.parametrize(
    ("zone", "result", "code"),
    [(GOOD, Result.PASS, 250), (ELSEWHERE, Result.FAIL, 550), ("", Result.PERMERROR, 550)],
)
def test_the_result_is_that_of_rfc_8601(zone: str, result: Result, code: int) -> None:
    with Harness(Iprev, STRICT, zone=zone) as harness:
        played = harness.deliver()
        assert harness.deliver(client=Client(source=AddressSource.HIDDEN)).results == ()
    (found,) = played.results
    assert (found.method, found.result, found.properties) == (
        "iprev",
        result,
        (("policy.iprev", "192.0.2.1"),),
    )
    assert played.reply.code == code
    if code == 550:
        assert played.reply == NOT_CONFIRMED


@pytest.mark.parametrize("zone", [GOOD, ELSEWHERE, ""])
def test_nothing_follows_unless_the_operator_says_so(zone: str) -> None:
    with Harness(Iprev, zone=zone) as harness:
        played = harness.deliver()
    assert played.message is not None
    assert b"iprev=" in played.message


@pytest.mark.parametrize("name", ["1.2.0.192.in-addr.arpa", "mail.example"])
def test_trouble_of_dns_is_temperror_and_never_a_refusal_for_good(name: str) -> None:
    with Harness(Iprev, STRICT, zone=ELSEWHERE) as harness:
        harness.zone.nodes[name] = {"*": "timeout"} if name == "mail.example" else {"PTR": "servfail"}
        played = harness.deliver()
    assert played.results[0].result is Result.TEMPERROR
    assert played.reply == NOT_CONFIRMED_NOW


def test_an_address_of_ipv6_is_looked_up_by_its_nibbles() -> None:
    zone = f"{V6} 60 IN PTR mail.example.\nmail.example. 60 IN AAAA 2001:db8::1"
    with Harness(Iprev, STRICT, zone=zone) as harness:
        assert harness.deliver(client="2001:db8::1").results[0].result is Result.PASS


def test_of_very_many_names_ten_are_looked_up() -> None:
    names = "".join(f"1.2.0.192.in-addr.arpa. 60 IN PTR h{n}.example.\n" for n in range(40))
    with Harness(Iprev, zone=names) as harness:
        harness.deliver()
        assert len(harness.zone.trail) == 11


def test_the_evidence_names_the_name() -> None:
    with Harness(Iprev, zone=GOOD) as harness:
        evidence = harness.deliver().verdict(Stage.CONNECT).evidence
    assert evidence is not None
    assert evidence.lines()[1] == "mail.example leads back to it"
