"""helo: what is wrong with EHLO is found, and what follows is the operator's choice."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from gateway.api import AddressSource, Stage
from gateway.testing import Client, Harness, PolicyContract
from policies.helo import Helo, HeloSettings, OnFinding

ALL = {each.name: OnFinding.REJECT for each in fields(HeloSettings) if each.name.startswith("on_")}
STRICT = HeloSettings(our_names=("mx.example.org", ".our.example", "[192.0.2.250]"), **ALL)
ZONE = """
client.example. 60 IN A 192.0.2.1
client.example. 60 IN AAAA 2001:db8::1
other.example.  60 IN A 198.51.100.1
mail.example.   60 IN MX 10 mx.mail.example.
null.example.   60 IN MX 0 .
"""


class TestContract(PolicyContract):
    policy = Helo
    settings = STRICT


@pytest.mark.parametrize(
    ("helo", "finding"),
    [
        ("client.example", ""),
        ("CLIENT.example.", ""),
        ("[192.0.2.1]", ""),
        ("[IPv6:::ffff:192.0.2.1]", ""),
        ("mail.example", ""),
        ("mx.example.org", "our_name"),
        ("MX.Example.ORG", "our_name"),
        ("a.our.example", "our_name"),
        ("a.b.our.example", "our_name"),
        ("[192.0.2.250]", "our_name"),
        ("[IPv6:::ffff:192.0.2.250]", "our_name"),
        ("our.example", "unresolvable"),
        ("notour.example", "unresolvable"),
        ("192.0.2.1", "malformed"),
        ("", "malformed"),
        ("a..b", "malformed"),
        ("-a.example", "malformed"),
        ("[192.0.2.1", "malformed"),
        ("[2001:db8::1]", "malformed"),
        ("a b.example", "malformed"),
        ("localhost", "not_fqdn"),
        ("WIN-123", "not_fqdn"),
        ("[192.0.2.9]", "other_address"),
        ("[IPv6:2001:db8::1]", "other_address"),
        ("none.example", "unresolvable"),
        ("null.example", "unresolvable"),
        ("a_b.example", "unresolvable"),
        ("other.example", "elsewhere"),
    ],
)
def test_what_is_found(helo: str, finding: str) -> None:
    with Harness(Helo, STRICT, zone=ZONE) as harness:
        played = harness.deliver(helo=helo)
        assert played.reply.code == (550 if finding else 250)
        verdict = played.verdict(Stage.EHLO)
        assert verdict.reason == (f"helo_{finding}" if finding else "")
        if finding:
            assert verdict.evidence is not None
            assert verdict.evidence.lines()
            assert harness.metrics["mxgate_helo_findings_total", finding] == 1


def test_a_literal_of_the_other_version_of_ip() -> None:
    with Harness(Helo, STRICT) as harness:
        client = Client("2001:db8::1", "[IPv6:2001:DB8:0::1]")
        assert harness.deliver(client=client).reply.code == 250


@pytest.mark.parametrize(("action", "code"), [("continue", 250), ("defer", 450), ("reject", 550)])
def test_each_finding_has_its_action(action: str, code: int) -> None:
    settings: dict[str, Any] = {"on_not_fqdn": OnFinding(action)}
    with Harness(Helo, HeloSettings(**settings)) as harness:
        played = harness.deliver(helo="localhost")
        assert played.reply.code == code
        assert played.verdict(Stage.EHLO).reason == "helo_not_fqdn"


def test_the_strictest_of_several_counts() -> None:
    settings = HeloSettings(("localhost",), on_our_name=OnFinding.DEFER, on_not_fqdn=OnFinding.REJECT)
    with Harness(Helo, settings) as harness:
        played = harness.deliver(helo="localhost")
        assert str(played.reply) == "550 5.7.1 EHLO needs a fully qualified domain name"
        evidence = played.verdict(Stage.EHLO).evidence
        assert evidence is not None
        assert len(evidence.lines()) == 2


def test_by_default_nobody_but_our_own_name_is_refused_and_dns_is_not_asked() -> None:
    with Harness(Helo, HeloSettings(("mx.example.org",)), zone=ZONE) as harness:
        for helo in ("localhost", "[192.0.2.9]", "none.example", "192.0.2.1", "other.example"):
            assert harness.deliver(helo=helo).reply.code == 250
        assert harness.deliver(helo="mx.example.org").reply.code == 550
        assert not harness.zone.trail


@pytest.mark.parametrize("failing", ["other.example", "none.example"])
def test_trouble_of_dns_is_no_finding(failing: str) -> None:
    with Harness(Helo, STRICT, zone=ZONE) as harness:
        harness.zone.nodes[failing] = {"*": "timeout"}
        assert harness.deliver(helo=failing).reply.code == 250


def test_a_hidden_client_has_no_address_to_compare_with() -> None:
    with Harness(Helo, STRICT, zone=ZONE) as harness:
        for helo in ("other.example", "[192.0.2.77]"):
            client = Client(helo=helo, source=AddressSource.HIDDEN)
            assert harness.deliver(client=client).reply.code == 250


def test_a_name_of_ours_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="our_names"):
        HeloSettings(("a..b",))
