"""dkim: one result for each signature, asked ahead; it acts on what it found only where the settings say so."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gateway.lookup import Question, RRType
from gateway.policy import OnError
from gateway.session import Envelope, Session, Transaction
from gateway.testing import Zone
from gateway.verdict import Action, AuthResult, Result, Verdict
from policies.dkim import Dkim, DkimSettings, PartialBody
from policies.verify.handling import Handling
from tests.dkimkit import bare_rsa, sign
from tests.fakes import FakeDns, FakeServices
from tests.mailkit import arrive, compose, message_of, rsa_key, zone_of

KEY, OTHER = rsa_key("author.example"), rsa_key("list.example", number=1)
MAIL = compose()
SIGNED = sign(MAIL, KEY)
BROKEN = SIGNED.replace(b"Subject: Hello", b"Subject: Bye")
TIMEOUT = Zone({KEY.name: {RRType.TXT: "TIMEOUT"}})
TESTING = Zone({KEY.name: {RRType.TXT: [KEY.record.replace("k=rsa", "t=y").encode()]}})
WEAK = Zone({KEY.name: {RRType.TXT: [f"p={bare_rsa((1 << 767) | 1, 3)}".encode()]}})
STRICT = DkimSettings(on_none=Handling.REJECT, on_fail=Handling.REJECT, on_temperror=OnError.DEFER)


async def judge(octets: bytes, zone: Zone | None = None, settings: DkimSettings | None = None) -> Verdict:
    verdict, _ = await judged_with(octets, zone, settings)
    return verdict


async def judged_with(
    octets: bytes, zone: Zone | None = None, settings: DkimSettings | None = None, *, smtputf8: bool = False
) -> tuple[Verdict, FakeDns]:
    services = FakeServices(dns=FakeDns(zone or zone_of(KEY, OTHER)))
    policy = Dkim(settings or DkimSettings(), services)
    message = message_of(octets)
    session = Session("S", ip_address("192.0.2.1"), 1234)
    tx = Transaction("S-1", session, Envelope(None, smtputf8=smtputf8), message)
    policy.on_header(tx)
    arrive(message)
    return await policy.on_eom(tx), services.dns


def words(verdict: Verdict) -> list[Result]:
    return [each.result for each in verdict.results]


async def test_message_without_a_signature_is_none() -> None:
    verdict, dns = await judged_with(MAIL)
    assert verdict.action is Action.CONTINUE
    assert verdict.results == (AuthResult("dkim", Result.NONE),)
    assert verdict.evidence is not None
    assert verdict.evidence.lines() == ["no signature"]
    assert not dns.zone.trail


async def test_each_signature_has_its_result_and_keys_are_asked_ahead() -> None:
    verdict, dns = await judged_with(sign(BROKEN, OTHER))
    assert verdict.action is Action.CONTINUE
    assert verdict.reason == ""
    assert words(verdict) == [Result.PASS, Result.FAIL]
    assert [dict(each.properties)["header.d"] for each in verdict.results] == [
        "list.example",
        "author.example",
    ]
    assert dns.prefetched == [Question(OTHER.name, RRType.TXT), Question(KEY.name, RRType.TXT)]


async def test_only_the_first_signatures_are_looked_at() -> None:
    octets = MAIL
    for _ in range(4):
        octets = sign(octets, KEY)
    verdict = await judge(octets, settings=DkimSettings(max_signatures=3))
    assert words(verdict) == [Result.PASS] * 3
    assert verdict.evidence is not None
    assert verdict.evidence.lines()[-1] == "1 more signatures were not looked at"


@pytest.mark.parametrize(
    ("octets", "zone", "reason"),
    [
        (MAIL, None, "dkim_none"),
        (BROKEN, None, "dkim_fail"),
        (SIGNED, Zone(), "dkim_fail"),
        (SIGNED, WEAK, "dkim_policy"),
        (SIGNED, TIMEOUT, "dkim_temperror"),
    ],
)
async def test_by_default_mail_goes_on(octets: bytes, zone: Zone | None, reason: str) -> None:
    verdict = await judge(octets, zone)
    assert verdict.action is Action.CONTINUE
    assert (verdict.reason or "dkim_none") == reason


@pytest.mark.parametrize(
    ("octets", "zone", "code", "enhanced"),
    [
        (MAIL, None, 550, "5.7.20"),
        (BROKEN, None, 550, "5.7.20"),
        (SIGNED, WEAK, 550, "5.7.21"),
        (sign(MAIL, KEY, {"l": "1"}), None, 550, "5.7.21"),
        (SIGNED, TIMEOUT, 451, "4.7.20"),
        (BROKEN, TESTING, 550, "5.7.20"),
    ],
)
async def test_settings_refuse_with_the_codes_of_rfc_7372(
    octets: bytes, zone: Zone | None, code: int, enhanced: str
) -> None:
    verdict = await judge(octets, zone, STRICT)
    assert verdict.reply is not None
    assert (verdict.reply.code, verdict.reply.enhanced) == (code, enhanced)


async def test_one_valid_signature_is_enough() -> None:
    assert (await judge(sign(BROKEN, OTHER), settings=STRICT)).action is Action.CONTINUE


async def test_failure_of_a_testing_domain_counts_as_no_signature() -> None:
    settings = replace(STRICT, on_none=Handling.CONTINUE)
    verdict = await judge(BROKEN, TESTING, settings)
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "dkim_none")
    assert words(verdict) == [Result.FAIL]


@pytest.mark.parametrize(
    ("handling", "action"),
    [
        (Handling.CONTINUE, Action.CONTINUE),
        (Handling.QUARANTINE, Action.QUARANTINE),
        (Handling.DEFER, Action.DEFER),
        (Handling.REJECT, Action.REJECT),
    ],
)
async def test_handling_is_the_action(handling: Handling, action: Action) -> None:
    assert (await judge(BROKEN, settings=DkimSettings(on_fail=handling))).action is action


async def test_length_limit_passes_where_the_operator_says_so() -> None:
    octets = sign(MAIL, KEY, {"l": "1"})
    assert words(await judge(octets)) == [Result.POLICY]
    assert words(await judge(octets, settings=DkimSettings(body_length_limit=PartialBody.PASS))) == [
        Result.PASS
    ]


async def test_least_key_length_may_be_raised() -> None:
    assert words(await judge(SIGNED, settings=DkimSettings(min_rsa_bits=4096))) == [Result.POLICY]


@pytest.mark.parametrize(
    "wrong", [{"min_rsa_bits": 1023}, {"min_rsa_bits": 8193}, {"max_signatures": 0}, {"max_signatures": 101}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not in"):
        DkimSettings(**wrong)  # type: ignore[arg-type]  # the integers among its fields


async def test_u_labels_need_smtputf8() -> None:
    key = rsa_key("xn--bcher-kva.example")
    octets = sign(MAIL, key, {"d": "bücher.example"})
    for smtputf8, result in ((False, Result.PERMERROR), (True, Result.PASS)):
        verdict, _ = await judged_with(octets, zone_of(key), smtputf8=smtputf8)
        assert words(verdict) == [result]
