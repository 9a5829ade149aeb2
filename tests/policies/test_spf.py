"""spf: what the policy reports of both identities, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.lookup import RRType
from gateway.policy import OnError
from gateway.session import AddressSource, Envelope, Session, Transaction, Trust
from gateway.smtp.address import parse_reverse_path
from gateway.testing import Zone
from gateway.testing.zone import Node
from gateway.verdict import Action, AddField, AuthResult, Result, Verdict, forbidden
from policies.spf import Spf, SpfSettings
from policies.verify.handling import EarlyHandling
from tests.fakes import FakeDns, FakeServices

ZONE: Mapping[str, str] = {
    "pass.example": "v=spf1 ip4:192.0.2.0/24 -all",
    "fail.example": "v=spf1 exp=why.example -all",
    "soft.example": "v=spf1 ~all",
    "neutral.example": "v=spf1 ?all",
    "wrong.example": "v=spf1 moo",
    "slow.example": "timeout",
    "why.example": "Ask http://example.org/\x07 %{i}",
    "said.example": "Ask http://example.org/ %{i}",
    "explained.example": "v=spf1 exp=said.example -all",
    "void.example": "v=spf1 a:a.example a:b.example a:c.example ?all",
}


class Case:
    """A policy with a zone; `mail` gives the verdict at MAIL."""

    def __init__(self, settings: SpfSettings | None = None) -> None:
        nodes: dict[str, Node] = {
            name: {RRType.TXT: text if text == "timeout" else [text.encode()]} for name, text in ZONE.items()
        }
        self.zone = Zone(nodes)
        self.policy = Spf(settings or SpfSettings(), FakeServices(dns=FakeDns(self.zone)))

    async def mail(
        self, mail_from: str, helo: str = "mx.nowhere.example", source: AddressSource = AddressSource.SOCKET
    ) -> Verdict:
        session = Session("S", ip_address("192.0.2.1"), 25, helo=helo, address_source=source)
        envelope = Envelope(parse_reverse_path(f"<{mail_from}>", smtputf8=True))
        return await self.policy.on_mail(Transaction("S-1", session, envelope))


def spf(result: Result, name: str, value: str, reason: str = "") -> AuthResult:
    return AuthResult("spf", result, reason, ((name, value),))


@pytest.mark.parametrize(
    ("domain", "result", "reason"),
    [
        ("pass.example", Result.PASS, ""),
        ("fail.example", Result.FAIL, "the client is not permitted"),
        ("soft.example", Result.SOFTFAIL, "the client is probably not permitted"),
        ("neutral.example", Result.NEUTRAL, "the domain says nothing about the client"),
        ("none.example", Result.NONE, ""),
        ("wrong.example", Result.PERMERROR, "unknown mechanism"),
        ("slow.example", Result.TEMPERROR, "no answer for the SPF record: timeout"),
    ],
)
async def test_every_result_is_reported_and_mail_goes_on(domain: str, result: Result, reason: str) -> None:
    verdict = await Case().mail(f"user@{domain}", helo="[192.0.2.1]")
    assert verdict.action is Action.CONTINUE
    assert verdict.reason == f"spf_{result}"
    assert verdict.results == (spf(result, "smtp.mailfrom", f"user@{domain}", reason),)
    assert verdict.edits == ()
    assert verdict.evidence is not None
    assert verdict.evidence.lines()[0] == f"SPF of {domain} for 192.0.2.1"


async def test_helo_is_checked_beside_the_reverse_path() -> None:
    verdict = await Case().mail("user@pass.example", helo="fail.example")
    assert verdict.results == (
        spf(Result.PASS, "smtp.mailfrom", "user@pass.example"),
        spf(Result.FAIL, "smtp.helo", "fail.example", "the client is not permitted"),
    )
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "spf_pass")


@pytest.mark.parametrize("helo", ["[192.0.2.1]", "localhost", "", "a..b"])
async def test_helo_that_is_no_domain_is_left_out(helo: str) -> None:
    assert len((await Case().mail("user@pass.example", helo=helo)).results) == 1


async def test_helo_check_can_be_left_out() -> None:
    case = Case(SpfSettings(helo_check=False))
    assert len((await case.mail("user@pass.example", helo="fail.example")).results) == 1


async def test_the_null_reverse_path_is_that_of_helo() -> None:
    """RFC 7208 2.4."""
    assert (await Case().mail("", helo="pass.example")).results == (
        spf(Result.PASS, "smtp.helo", "pass.example"),
    )
    assert (await Case().mail("", helo="[192.0.2.1]")).results == (
        spf(Result.NONE, "smtp.helo", "[192.0.2.1]"),
    )


async def test_an_address_literal_is_none_and_nobody_is_asked() -> None:
    case = Case(SpfSettings(helo_check=False))
    verdict = await case.mail("user@[192.0.2.1]")
    assert verdict.results == (spf(Result.NONE, "smtp.mailfrom", "user@[192.0.2.1]"),)
    assert case.zone.trail == []


REFUSALS = SpfSettings(
    on_fail=EarlyHandling.REJECT,
    on_softfail=EarlyHandling.DEFER,
    on_permerror=EarlyHandling.REJECT,
    on_temperror=OnError.DEFER,
    on_helo_fail=EarlyHandling.REJECT,
)


@pytest.mark.parametrize(
    ("mail_from", "helo", "reply"),
    [
        (
            "user@fail.example",
            "pass.example",
            "550 5.7.23 SPF: 192.0.2.1 is not permitted to send for fail.example (MAIL FROM)",
        ),
        ("", "fail.example", "550 5.7.23 SPF: 192.0.2.1 is not permitted to send for fail.example (HELO)"),
        (
            "user@soft.example",
            "pass.example",
            "451 4.7.23 SPF: 192.0.2.1 is not permitted to send for soft.example (MAIL FROM)",
        ),
        (
            "user@wrong.example",
            "pass.example",
            "550 5.7.24 SPF: the record of wrong.example cannot be evaluated: unknown mechanism",
        ),
        (
            "user@slow.example",
            "pass.example",
            "451 4.7.24 SPF: slow.example could not be checked now, try again later",
        ),
        (
            "user@pass.example",
            "fail.example",
            "550 5.7.23 SPF: 192.0.2.1 is not permitted to send for fail.example (HELO)",
        ),
        (
            "user@explained.example",
            "pass.example",
            (
                "550 5.7.23 SPF: 192.0.2.1 is not permitted to send for explained.example (MAIL FROM);"
                " explained.example explained: Ask http://example.org/ 192.0.2.1"
            ),
        ),
    ],
)
async def test_findings_are_refused_where_the_operator_says_so(mail_from: str, helo: str, reply: str) -> None:
    verdict = await Case(REFUSALS).mail(mail_from, helo)
    assert str(verdict.reply) == reply
    assert verdict.results


async def test_an_explanation_is_left_out_when_it_is_not_wanted() -> None:
    case = Case(SpfSettings(on_fail=EarlyHandling.REJECT, use_explanation=False))
    assert "explained:" not in str((await case.mail("user@explained.example")).reply)
    assert "said.example" not in {asked.question.name for asked in case.zone.trail}


async def test_an_explanation_is_not_asked_for_where_nobody_reads_it() -> None:
    case = Case()
    await case.mail("user@explained.example")
    assert "said.example" not in {asked.question.name for asked in case.zone.trail}


async def test_a_hidden_client_is_temperror_and_nobody_is_asked_or_refused() -> None:
    case = Case(REFUSALS)
    verdict = await case.mail("user@fail.example", source=AddressSource.HIDDEN)
    reason = "the client's address is hidden by a balancer"
    assert verdict.results == (spf(Result.TEMPERROR, "smtp.mailfrom", "user@fail.example", reason),)
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "spf_client_hidden")
    assert case.zone.trail == []


async def test_received_spf_is_written_for_each_identity() -> None:
    case = Case(SpfSettings(received_spf=True, receiver="mx.example.org"))
    verdict = await case.mail('"a\\"b; c"@pass.example', helo="fail.example")
    values = [edit.value for edit in verdict.edits if isinstance(edit, AddField)]
    assert [forbidden(edit) for edit in verdict.edits] == ["", ""]
    assert values == [
        (
            "pass (the domain permits the client)\r\n\tclient-ip=192.0.2.1;\r\n\t"
            'envelope-from="\\"a\\\\\\"b; c\\"@pass.example";\r\n\t'
            "helo=fail.example;\r\n\treceiver=mx.example.org;\r\n\t"
            'identity=mailfrom;\r\n\tmechanism="ip4:192.0.2.0/24"'
        ),
        (
            "fail (the domain does not permit the client)\r\n\tclient-ip=192.0.2.1;\r\n\t"
            'envelope-from="\\"a\\\\\\"b; c\\"@pass.example";\r\n\t'
            "helo=fail.example;\r\n\treceiver=mx.example.org;\r\n\t"
            "identity=helo;\r\n\tmechanism=-all"
        ),
    ]


async def test_received_spf_tells_the_problem() -> None:
    verdict = await Case(SpfSettings(received_spf=True)).mail("", helo="wrong.example")
    (edit,) = verdict.edits
    assert isinstance(edit, AddField)
    assert edit.value.endswith('identity=helo;\r\n\tproblem="unknown mechanism (wrong.example)"')
    assert "envelope-from" not in edit.value


async def test_the_limit_of_void_look_ups_is_the_operators() -> None:
    assert (await Case().mail("user@void.example")).reason == "spf_permerror"
    assert (await Case(SpfSettings(max_void_lookups=3)).mail("user@void.example")).reason == "spf_neutral"


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_void_lookups"):
        SpfSettings(max_void_lookups=-1)


def test_trusted_and_authenticated_clients_are_exempt() -> None:
    assert set(Spf.exempt) == {Trust.TRUSTED, Trust.AUTHENTICATED}
    assert (Spf.method, Spf.timeout_s) == ("spf", 20.0)


def test_settings_take_the_words_that_fit() -> None:
    settings = TypeAdapter(SpfSettings)
    given = {"on_fail": "reject", "on_temperror": "defer", "on_helo_fail": "defer"}
    assert settings.validate_python(given).on_fail is EarlyHandling.REJECT
    # there is no quarantine at MAIL, and temporary trouble is never refused for good
    for key, value in (("on_fail", "quarantine"), ("on_temperror", "reject"), ("max_void_lookups", -1)):
        with pytest.raises(ValidationError):
            settings.validate_python({key: value})
