"""dnsbl: lists are weighed together, and one that is broken counts for nothing."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from gateway.api import Action, AddressSource, Stage, Verdict
from gateway.testing import Client, Harness, PolicyContract
from policies.dnsbl import Dnsbl, DnsblSettings, DnsList, OnListed

TEST = "2.0.0.127.{0}. 60 IN A 127.0.0.2\n"


def zone(*names: str, **listed: str) -> str:
    """Lists that pass their test, and what they say of 192.0.2.1: `bl="127.0.0.4 127.0.0.5"`."""
    lines = [TEST.format(name) for name in names]
    for name, codes in listed.items():
        lines.append(TEST.format(f"{name}.example"))
        lines += [f"1.2.0.192.{name}.example. 60 IN A {code}\n" for code in codes.split()]
    return "".join(lines)


def lists(**weights: float) -> DnsblSettings:
    return DnsblSettings(tuple(DnsList(f"{name}.example", weight) for name, weight in weights.items()))


class TestContract(PolicyContract):
    policy = Dnsbl
    settings = lists(bl=1, wl=-2)
    zone = zone(bl="127.0.0.2")


def said(settings: DnsblSettings, text: str) -> Verdict:
    with Harness(Dnsbl, settings, zone=text) as harness:
        return harness.deliver().verdict(Stage.CONNECT)


@pytest.mark.parametrize(
    ("settings", "text", "is_refused"),
    [
        (lists(bl=1), zone(bl="127.0.0.2"), True),
        (lists(bl=1), zone("bl.example"), False),
        (lists(bl=0.5), zone(bl="127.0.0.2"), False),
        (lists(bl=0.5, nl=0.5), zone(bl="127.0.0.2", nl="127.0.0.9"), True),
        (lists(bl=1, wl=-1), zone(bl="127.0.0.2", wl="127.0.0.2"), False),
        (lists(bl=1), zone(bl="127.255.255.254"), False),
        (lists(bl=1), zone(bl="192.0.2.80"), False),
    ],
)
def test_the_weights_of_all_lists_make_a_client_listed(
    settings: DnsblSettings, text: str, is_refused: bool
) -> None:
    assert (said(settings, text).action is Action.REJECT) == is_refused


def test_the_reply_names_the_client_and_the_heaviest_list() -> None:
    text = zone(a="127.0.0.2", b="127.0.0.2")
    verdict = said(lists(a=1, b=2), text)
    assert str(verdict.reply) == "550 5.7.1 192.0.2.1 is listed by b.example"
    assert verdict.evidence is not None
    assert [*verdict.evidence.lines()] == [
        "a.example: 127.0.0.2, weight 1",
        "b.example: 127.0.0.2, weight 2",
        "192.0.2.1 weighs 3",
    ]


@pytest.mark.parametrize(
    ("codes", "weight"),
    [("127.0.0.10", 0.25), ("127.0.0.11", 3), ("127.0.0.4", 1), ("127.0.0.4 127.0.0.11", 3)],
)
def test_a_return_code_may_weigh_otherwise_by_its_narrowest_network(codes: str, weight: float) -> None:
    by_code = {IPv4Network("127.0.0.10/31"): 0.25, IPv4Network("127.0.0.11/32"): 3.0}
    verdict = said(DnsblSettings((DnsList("bl.example", 1, by_code),)), zone(bl=codes))
    assert verdict.evidence is not None
    assert verdict.evidence.lines()[-1] == f"192.0.2.1 weighs {weight:g}"


@pytest.mark.parametrize(
    ("on_listed", "code"), [(OnListed.CONTINUE, 250), (OnListed.DEFER, 450), (OnListed.REJECT, 550)]
)
def test_what_follows_is_the_operators_choice(on_listed: OnListed, code: int) -> None:
    settings = DnsblSettings((DnsList("bl.example"),), on_listed=on_listed)
    with Harness(Dnsbl, settings, zone=zone(bl="127.0.0.2")) as harness:
        assert harness.deliver().reply.code == code
        assert harness.deliver(client=Client(source=AddressSource.HIDDEN)).reply.code == 250


def test_trouble_of_dns_is_no_listing() -> None:
    with Harness(Dnsbl, lists(bl=1), zone=zone(bl="127.0.0.2")) as harness:
        harness.zone.nodes["1.2.0.192.bl.example"] = {"*": "timeout"}
        assert harness.deliver().reply.code == 250


def test_an_address_of_ipv6_is_asked_for_by_its_nibbles() -> None:
    name = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.bl.example."
    with Harness(Dnsbl, lists(bl=1), zone=zone("bl.example") + f"{name} 60 IN A 127.0.0.2") as harness:
        assert harness.deliver(client="2001:db8::1").reply.code == 550


BROKEN = {
    "it lists 127.0.0.1, and so everybody": TEST.format("bl.example")
    + "1.0.0.127.bl.example. 60 IN A 127.0.0.2\n",
    "it does not list 127.0.0.2": "",
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_list_that_fails_its_test_is_suspended_until_it_passes(why: str) -> None:
    listed = "1.2.0.192.bl.example. 60 IN A 127.0.0.2\n"
    with Harness(Dnsbl, lists(bl=1), zone=BROKEN[why] + listed) as harness:
        assert harness.deliver().reply.code == 250
        assert harness.deliver().reply.code == 250
        (line,) = [line for line in harness.log.of("warning") if line.event == "list.suspended"]
        assert line.keys == {"policy": "dnsbl", "zone": "bl.example", "error": why}
        assert harness.metrics["mxgate_dnsbl_suspended_lists"] == 1
        harness.zone.nodes.pop("1.0.0.127.bl.example", None)
        harness.zone.nodes["2.0.0.127.bl.example"] = harness.zone.nodes["1.2.0.192.bl.example"]
        assert harness.deliver().reply.code == 250
        harness.clock.advance(301)
        assert harness.deliver().reply.code == 550
        assert harness.metrics["mxgate_dnsbl_suspended_lists"] == 0


def test_a_list_of_ipv6_addresses_has_test_entries_of_its_own() -> None:
    """RFC 5782 5: ::FFFF:7F00:2 and ::FFFF:7F00:1."""
    digits = ".".join("f7ffff" + "0" * 20)
    must, must_not = (f"{n}.0.0.0.0.0.{digits}.bl.example. 60 IN A 127.0.0.2\n" for n in (2, 1))
    listed = "1.2.0.192.bl.example. 60 IN A 127.0.0.2\n"
    for text, code in ((must, 550), (must + must_not, 250)):
        with Harness(Dnsbl, lists(bl=1), zone=text + listed) as harness:
            assert harness.deliver().reply.code == code


def test_a_test_without_an_answer_changes_nothing() -> None:
    with Harness(Dnsbl, lists(bl=1), zone=zone(bl="127.0.0.2")) as harness:
        harness.zone.nodes["2.0.0.127.bl.example"] = {"*": "servfail"}
        assert harness.deliver().reply.code == 550


def test_lists_are_tested_once_an_hour_and_only_where_they_can_be() -> None:
    settings = DnsblSettings((DnsList("bl.example"), DnsList("nl.example", self_test=False)))
    with Harness(Dnsbl, settings, zone=zone("bl.example")) as harness:
        asked = []
        for seconds in (0, 10, 3601):
            harness.clock.advance(seconds)
            before = len(harness.zone.trail)
            harness.deliver()
            asked.append(len(harness.zone.trail) - before)
    assert asked == [6, 2, 6]


def test_a_list_that_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="finite"):
        DnsList("bl.example", float("nan"))
    for threshold in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold"):
            DnsblSettings(threshold=threshold)
    with pytest.raises(ValueError, match="twice"):
        DnsblSettings((DnsList("bl.example"), DnsList("BL.example")))
