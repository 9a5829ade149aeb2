"""arc: the status is reported, a listed sealer is named, and nothing else happens unless the operator says so."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest

from gateway.lookup import RRType
from gateway.session import AddressSource, Envelope, Session, Transaction
from gateway.smtp.address import AddressError
from gateway.verdict import Action, AuthResult, Result, Stage, Verdict
from policies.arc import FAILED, FAILED_NOW, Arc, ArcSettings
from policies.verify.handling import Handling
from tests.fakes import FakeDns, FakeServices
from tests.mailkit import SealOptions, arrive, compose, message_of, rsa_key, seal, zone_of

LIST = rsa_key("list.example")
FORWARDER = rsa_key("forwarder.example", number=1)
STRANGER = rsa_key("stranger.example", number=2)
YES = "mx; dmarc=pass header.from=author.example"
NO = "mx; dmarc=fail header.from=author.example; arc=pass"
LISTED = ArcSettings(trusted_sealers=("list.example", "forwarder.example"))
CLIENT = ("smtp.remote-ip", "192.0.2.1")


def services() -> FakeServices:
    return FakeServices(dns=FakeDns(zone_of(LIST, FORWARDER, STRANGER)))


async def judge(
    octets: bytes,
    settings: ArcSettings | None = None,
    *,
    source: AddressSource = AddressSource.SOCKET,
    at: FakeServices | None = None,
) -> Verdict:
    policy = Arc(settings or ArcSettings(), at or services())
    session = Session("S", ip_address("192.0.2.1"), 1234, address_source=source)
    tx = Transaction("S-1", session, Envelope(None), message_of(octets))
    assert tx.message is not None
    policy.on_header(tx)
    arrive(tx.message)
    return await policy.on_eom(tx)


def lines(verdict: Verdict) -> list[str]:
    assert verdict.evidence is not None
    return list(verdict.evidence.lines())


def test_it_is_planned_at_eom_only() -> None:
    assert Arc.stages() == {Stage.EOM}
    assert Arc.method == "arc"


async def test_a_message_without_a_chain_is_none() -> None:
    verdict = await judge(compose())

    assert verdict.action is Action.CONTINUE
    assert verdict.results == (AuthResult("arc", Result.NONE),)
    assert lines(verdict) == ["no ARC set"]


async def test_a_chain_that_passes_is_reported_with_the_client_and_the_oldest_pass() -> None:
    octets = seal(seal(compose(), LIST, YES).replace(b"Hello", b"[l] Hello"), FORWARDER, NO)
    verdict = await judge(octets)

    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "")
    assert verdict.results == (AuthResult("arc", Result.PASS, "", (("header.oldest-pass", "2"), CLIENT)),)


async def test_a_hidden_client_is_not_named() -> None:
    verdict = await judge(seal(compose(), LIST, YES), source=AddressSource.HIDDEN)

    assert verdict.results[0].properties == (("header.oldest-pass", "0"),)


async def test_keys_are_asked_for_at_the_header_and_not_again() -> None:
    at = services()
    await judge(seal(seal(compose(), LIST, YES), FORWARDER, NO), at=at)

    assert {question.name for question in at.dns.prefetched} == {FORWARDER.name, LIST.name}
    assert {asked.question for asked in at.dns.zone.trail} == set(at.dns.prefetched)


async def test_a_broken_chain_goes_on_unless_the_operator_says_otherwise() -> None:
    octets = seal(compose(), LIST, YES).replace(b"Hello Bob", b"Hello Eve")
    failed = AuthResult("arc", Result.FAIL, "ARC-Message-Signature 1: body hash did not verify", (CLIENT,))

    verdict = await judge(octets)
    assert (verdict.action, verdict.reason, verdict.results) == (Action.CONTINUE, "arc_fail", (failed,))
    for on_fail, action, reply in (
        (Handling.QUARANTINE, Action.QUARANTINE, None),
        (Handling.DEFER, Action.DEFER, FAILED_NOW),
        (Handling.REJECT, Action.REJECT, FAILED),
    ):
        verdict = await judge(octets, ArcSettings(on_fail=on_fail))
        assert (verdict.action, verdict.reply, verdict.results) == (action, reply, (failed,))
    assert str(FAILED.enhanced) == "5.7.29"


async def test_trouble_with_dns_is_never_a_failure_of_the_chain() -> None:
    at = services()
    at.dns.zone.nodes[LIST.name] = {RRType.TXT: "timeout"}
    verdict = await judge(seal(compose(), LIST, YES), ArcSettings(on_fail=Handling.REJECT), at=at)

    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "arc_temperror")
    assert verdict.results[0].result is Result.TEMPERROR


async def test_a_listed_sealer_who_vouches_for_the_author_is_named() -> None:
    octets = seal(seal(seal(compose(), STRANGER, NO), LIST, YES), FORWARDER, NO)
    verdict = await judge(octets, LISTED)

    assert verdict.action is Action.CONTINUE
    assert verdict.results[0].properties == (
        ("header.oldest-pass", "0"),
        CLIENT,
        ("policy.trusted-sealer", "list.example"),
    )
    assert "author.example was authenticated, says list.example" in lines(verdict)


NOT_BELIEVED: dict[str, Callable[[], bytes]] = {
    "not listed": lambda: seal(compose(), STRANGER, YES),
    "no claim": lambda: seal(compose(), LIST, NO),
    "claim before a listed one": lambda: seal(seal(compose(), STRANGER, YES), LIST, NO),
    "not listed, behind": lambda: seal(seal(compose(), LIST, YES), STRANGER, NO),
    "broken": lambda: seal(compose(), LIST, YES).replace(b"Bob.", b"Eve."),
    "two authors": lambda: seal(compose("a@author.example, b@other.example"), LIST, YES),
    "From added": lambda: b"From: eve@other.example\r\n" + seal(compose(), LIST, YES),
    "another author": lambda: seal(compose("eve@other.example"), LIST, YES),
    "From not signed": lambda: seal(compose(), LIST, YES, SealOptions(headers=("to",))),
}


@pytest.mark.parametrize("case", NOT_BELIEVED)
async def test_nobody_is_named_where_nobody_is_to_be_believed(case: str) -> None:
    verdict = await judge(NOT_BELIEVED[case](), LISTED)

    assert "policy.trusted-sealer" not in dict(verdict.results[0].properties)


async def test_who_would_be_believed_is_named_while_its_key_cannot_be_had() -> None:
    at = services()
    at.dns.zone.nodes[LIST.name] = {RRType.TXT: "servfail"}
    verdict = await judge(seal(compose(), LIST, YES), LISTED, at=at)

    assert verdict.results[0].result is Result.TEMPERROR
    assert ("policy.trusted-sealer", "list.example") in verdict.results[0].properties


async def test_evidence_says_what_was_found_at_each_set() -> None:
    from_only = SealOptions(headers=("from",))
    octets = seal(seal(compose(), STRANGER, NO, from_only), LIST, YES, from_only)

    assert (
        "\n".join(lines(await judge(octets, LISTED)))
        == """\
chain: pass
set 2, sealed by list.example
  ARC-Seal: pass; rsa-sha256, key at s1._domainkey.list.example
  ARC-Message-Signature: pass; rsa-sha256, key at s1._domainkey.list.example, signed fields: from
  list.example is listed, and its word that the author was authenticated is taken
set 1, sealed by stranger.example
  ARC-Seal: pass; rsa-sha256, key at s1._domainkey.stranger.example
  ARC-Message-Signature: pass; rsa-sha256, key at s1._domainkey.stranger.example, signed fields: from
author.example was authenticated, says list.example"""
    )
    broken = lines(await judge(octets.replace(b"Bob.", b"Eve.")))
    assert broken[0] == "chain: fail, ARC-Message-Signature 2: body hash did not verify"
    assert broken[2].startswith("  ARC-Seal: not looked at; ")
    (no_chain,) = lines(await judge(b"ARC-Seal: i=1\r\n" + octets))
    assert no_chain == "chain: fail, set 1 has a field twice"


@pytest.mark.parametrize(
    "field",
    [
        b"ARC-Authentication-Results: i=1; mx.example.org; dmarc=pass header.from=bank.example\r\n",
        b"ARC-Seal: i=;;;=\r\nARC-Message-Signature: \xff\x00\r\nARC-Authentication-Results: i=99999\r\n",
        b"ARC-Seal: i=0\r\n",
        b"ARC-Seal: i=1025; cv=none\r\n",
        b"arc-seal :\r\n",
    ],
)
async def test_forged_fields_fail_without_a_question(field: bytes) -> None:
    at = services()
    verdict = await judge(field + compose(), LISTED, at=at)

    assert verdict.results[0].result is Result.FAIL
    assert not at.dns.zone.trail


@pytest.mark.parametrize("entry", ["", "*", "a b", "list.example."])
def test_a_sealer_that_is_no_domain_is_refused(entry: str) -> None:
    with pytest.raises(AddressError):
        ArcSettings(trusted_sealers=(entry,))


def test_sealers_may_be_all_below_a_domain() -> None:
    ArcSettings(trusted_sealers=(".list.example", "xn--bcher-kva.example", "bücher.example"))
