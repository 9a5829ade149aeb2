"""dmarc: every message gets a result, the domain owner's wish is followed, and time cannot be burnt to get by."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.lookup import OUT_OF_TIME, Lookup, Question, RRType
from gateway.mail.body import Spool
from gateway.mail.message import Message, parse_header
from gateway.policy import OnError
from gateway.session import AddressSource, Envelope, Session, Transaction, Trust
from gateway.smtp.address import parse_reverse_path
from gateway.testing.zone import Node, Zone
from gateway.verdict import Action, AuthResult, Result, Stage, Verdict
from policies.dmarc import BAD_FROM, JUDGE_S, BadFrom, Dmarc, DmarcSettings
from policies.verify.dmarc.judge import Discovery
from policies.verify.handling import Handling, TemporaryHandling
from policies.verify.org_domain import public_suffixes
from tests.fakes import FakeDns, FakeServices

T = TypeVar("T")

AUTHOR = "From: Joe <joe@bank.example>"


def zone(**records: str) -> Zone:
    """A policy record by domain: `bank_example="p=reject"`; "!servfail" is a failure."""
    nodes: dict[str, Node] = {
        f"_dmarc.{name.replace('_', '.')}": {
            RRType.TXT: text[1:] if text[:1] == "!" else [f"v=DMARC1; {text}".encode()]
        }
        for name, text in records.items()
    }
    return Zone(nodes)


def transaction(
    *results: AuthResult,
    header: str = AUTHOR,
    mail_from: str = "<a@attacker.example>",
    trust: Trust = Trust.UNTRUSTED,
    source: AddressSource = AddressSource.SOCKET,
) -> Transaction:
    octets = f"{header}\r\nSubject: x\r\n".encode()
    message = Message(
        parse_header(octets, max_fields=100, wire_bytes=len(octets)), Spool().new(is_stuffed=True)
    )
    session = Session("S", ip_address("192.0.2.7"), 1234, trust=trust, address_source=source)
    return Transaction(
        "S-1", session, Envelope(parse_reverse_path(mail_from, smtputf8=False)), message, results
    )


def spf(domain: str, result: Result = Result.PASS) -> AuthResult:
    return AuthResult("spf", result, properties=(("smtp.mailfrom", f"a@{domain}"),))


def dkim(domain: str, result: Result = Result.PASS) -> AuthResult:
    return AuthResult("dkim", result, properties=(("header.d", domain),))


def policy_of(dns: Zone | None = None, **settings: Any) -> Dmarc:
    return Dmarc(DmarcSettings(**settings), FakeServices(dns=FakeDns(dns or zone(bank_example="p=reject"))))


def run(policy: Dmarc, tx: Transaction) -> Verdict:
    """The verdict on a message; a fake resolver has all answers at once."""
    try:
        policy.on_eom(tx).send(None)
    except StopIteration as stop:
        verdict: Verdict = stop.value
        return verdict
    raise AssertionError("the policy suspended")


def result_of(verdict: Verdict) -> AuthResult:
    (result,) = verdict.results
    assert result.method == "dmarc"
    return result


def test_declares_itself() -> None:
    assert Dmarc.stages() == {Stage.EOM}
    assert Dmarc.after == ("spf", "dkim", "arc")
    assert Dmarc.on_error is OnError.DEFER


def test_an_aligned_pass_goes_on() -> None:
    verdict = run(policy_of(), transaction(spf("bank.example")))
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "")
    assert result_of(verdict) == AuthResult(
        "dmarc", Result.PASS, properties=(("header.from", "bank.example"), ("policy.dmarc", "reject"))
    )


@pytest.mark.parametrize("trust", Trust)
@pytest.mark.parametrize("source", [AddressSource.SOCKET, AddressSource.HIDDEN])
def test_of_a_pass_nothing_is_said_but_the_pass(trust: Trust, source: AddressSource) -> None:
    policy = policy_of(zone(bank_example="p=reject; t=y"), exceptions=("bank.example",))
    verdict = run(policy, transaction(spf("bank.example"), trust=trust, source=source))
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "")
    assert (result_of(verdict).result, result_of(verdict).reason) == (Result.PASS, "")


def test_a_spoof_is_rejected_where_the_owner_asks_for_it() -> None:
    verdict = run(policy_of(), transaction(spf("attacker.example"), dkim("attacker.example")))
    assert (verdict.action, verdict.reason) == (Action.REJECT, "dmarc_fail")
    assert str(verdict.reply) == "550 5.7.1 Message rejected per DMARC policy for bank.example"
    result = result_of(verdict)
    assert (result.result, result.reason) == (Result.FAIL, "nothing that passed is aligned")
    assert verdict.evidence is not None
    assert verdict.evidence.lines()[0] == "author domain bank.example"


@pytest.mark.parametrize(
    ("record", "action"),
    [
        ("p=none", Action.CONTINUE),
        ("p=quarantine", Action.QUARANTINE),
        ("p=reject", Action.REJECT),
        ("p=reject; t=y", Action.QUARANTINE),
        ("p=quarantine; t=y", Action.CONTINUE),
    ],
)
def test_a_fail_is_handled_as_the_owner_prefers(record: str, action: Action) -> None:
    verdict = run(policy_of(zone(bank_example=record)), transaction())
    assert (verdict.action, verdict.reason) == (action, "dmarc_fail")
    assert result_of(verdict).result is Result.FAIL
    assert ("policy_test_mode" in result_of(verdict).reason) is ("t=y" in record)


@pytest.mark.parametrize("handling", Handling)
@pytest.mark.parametrize("wish", ["reject", "quarantine"])
def test_a_fail_is_handled_as_the_operator_sets_it(wish: str, handling: Handling) -> None:
    policy = policy_of(zone(bank_example=f"p={wish}"), **{f"on_{wish}": handling})
    verdict = run(policy, transaction())
    assert verdict.action.label == handling
    if verdict.reply is not None:
        assert verdict.reply.enhanced in {"5.7.1", "4.7.1"}
        assert "DMARC" in verdict.reply.text
        assert "bank.example" in verdict.reply.text


def test_messages_are_counted_by_result_policy_and_disposition() -> None:
    services = FakeServices(dns=FakeDns(zone(bank_example="p=quarantine", unsure_example="p=x")))
    policy = Dmarc(DmarcSettings(), services)
    run(policy, transaction())
    run(policy, transaction())
    run(policy, transaction(spf("bank.example"), mail_from="<a@bank.example>"))
    run(policy, transaction(trust=Trust.TRUSTED))
    run(policy, transaction(header="From: a@nowhere.example"))
    run(policy, transaction(header="X: y"))
    run(policy, transaction(header="From: a@unsure.example"))
    assert services.metrics.of("messages_total") == {
        ("fail", "quarantine", "quarantine"): 2,
        ("pass", "quarantine", "continue"): 1,
        ("fail", "quarantine", "continue"): 1,
        ("none", "absent", "continue"): 2,
        ("permerror", "absent", "reject"): 1,
    }


@pytest.mark.parametrize("dns", [zone(), zone(bank_example="p=x")], ids=["no record", "no policy"])
def test_a_domain_without_a_policy_gets_none(dns: Zone) -> None:
    verdict = run(policy_of(dns), transaction())
    assert verdict.action is Action.CONTINUE
    assert result_of(verdict) == AuthResult(
        "dmarc", Result.NONE, properties=(("header.from", "bank.example"),)
    )


def test_the_null_reverse_path_counts_helo_and_a_reverse_path_does_not() -> None:
    helo = AuthResult("spf", Result.PASS, properties=(("smtp.helo", "bank.example"),))
    assert run(policy_of(), transaction(helo, mail_from="<>")).action is Action.CONTINUE
    assert run(policy_of(), transaction(helo)).action is Action.REJECT


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("X: y", "no_from"),
        ("From: a@bank.example\r\nFrom: a@bank.example", "several_from"),
        ("From: nobody", "from_syntax"),
        ("From: a@bank.example, b@attacker.example", "from_several_domains"),
    ],
)
@pytest.mark.parametrize("source", [AddressSource.SOCKET, AddressSource.HIDDEN])
def test_mail_without_one_author_is_rejected_or_marked(
    header: str, reason: str, source: AddressSource
) -> None:
    tx = transaction(spf("bank.example"), header=header, source=source)
    verdict = run(policy_of(), tx)
    assert (verdict.action, verdict.reason, verdict.reply) == (Action.REJECT, reason, BAD_FROM)
    assert (BAD_FROM.code, BAD_FROM.enhanced) == (550, "5.6.0")
    assert result_of(verdict).result is Result.PERMERROR
    marked = run(policy_of(on_bad_from=BadFrom.MARK), tx)
    assert (marked.action, marked.reason) == (Action.CONTINUE, reason)
    assert result_of(marked) == result_of(verdict)


@pytest.mark.parametrize("header", [AUTHOR, "From: nobody"])
@pytest.mark.parametrize(
    ("trust", "source"),
    [
        (Trust.TRUSTED, AddressSource.SOCKET),
        (Trust.AUTHENTICATED, AddressSource.SOCKET),
        (Trust.AUTHENTICATED, AddressSource.HIDDEN),
    ],
)
def test_of_trusted_clients_the_result_is_reported_only(
    header: str, trust: Trust, source: AddressSource
) -> None:
    verdict = run(policy_of(), transaction(header=header, trust=trust, source=source))
    assert verdict.action is Action.CONTINUE
    assert result_of(verdict).result is (Result.FAIL if header == AUTHOR else Result.PERMERROR)


@pytest.mark.parametrize("trust", [Trust.UNTRUSTED, Trust.TRUSTED])
def test_a_hidden_client_is_not_refused_and_not_trusted(trust: Trust) -> None:
    tx = transaction(spf("bank.example", Result.TEMPERROR), trust=trust, source=AddressSource.HIDDEN)
    verdict = run(policy_of(), tx)
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "client_hidden")
    assert "the client's address is hidden" in result_of(verdict).reason
    bad = transaction(header="X: y", trust=trust, source=AddressSource.HIDDEN)
    assert run(policy_of(), bad).action is Action.REJECT


TEMPERROR = spf("bank.example", Result.TEMPERROR)


def test_what_could_have_passed_is_asked_for_again() -> None:
    verdict = run(policy_of(), transaction(TEMPERROR))
    assert (verdict.action, verdict.reason) == (Action.DEFER, "dmarc_temperror")
    assert verdict.reply is not None
    assert (verdict.reply.code, verdict.reply.enhanced) == (451, "4.7.1")
    assert result_of(verdict).result is Result.TEMPERROR


def test_evidence_that_could_not_have_passed_or_is_not_needed_does_not_defer() -> None:
    others = (spf("attacker.example", Result.TEMPERROR), dkim("attacker.example", Result.TEMPERROR))
    assert run(policy_of(), transaction(*others)).action is Action.REJECT
    assert run(policy_of(), transaction(TEMPERROR, dkim("bank.example"))).action is Action.CONTINUE
    assert run(policy_of(zone(bank_example="p=none")), transaction(TEMPERROR)).action is Action.CONTINUE
    assert run(policy_of(on_reject=Handling.CONTINUE), transaction(TEMPERROR)).action is Action.CONTINUE


def test_a_policy_that_failed_as_a_whole_may_have_passed() -> None:
    assert run(policy_of(), transaction(AuthResult("dkim", Result.TEMPERROR))).action is Action.DEFER


@pytest.mark.parametrize("handling", TemporaryHandling)
def test_temporary_trouble_is_handled_as_set(handling: TemporaryHandling) -> None:
    verdict = run(policy_of(on_temperror=handling), transaction(TEMPERROR))
    assert verdict.action.label == handling
    dns = zone(bank_example="!servfail")
    verdict = run(policy_of(dns, on_record_temperror=handling), transaction(spf("bank.example")))
    assert verdict.action.label == handling
    assert result_of(verdict).result is Result.TEMPERROR


def test_mail_goes_on_where_dns_of_the_author_domain_fails() -> None:
    verdict = run(policy_of(zone(bank_example="!timeout")), transaction())
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, "dmarc_temperror")
    assert result_of(verdict) == AuthResult(
        "dmarc",
        Result.TEMPERROR,
        "_dmarc.bank.example could not be asked: timeout",
        (("header.from", "bank.example"),),
    )


class BurntDns(FakeDns):
    """Has time for so many questions only, for each Lookup anew."""

    def __init__(self, zone: Zone, questions: int) -> None:
        super().__init__(zone)
        self.questions = questions
        self.keys: list[tuple[float | None, bool]] = []

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        self.keys.append((None, own_budget))
        lookup.close()

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        self.keys.append((timeout_s, own_budget))
        left = self.questions
        try:
            questions: Sequence[Question] = next(lookup)
            while True:
                left -= len(questions)
                answers = [self.zone.answer(each) if left >= 0 else OUT_OF_TIME for each in questions]
                questions = lookup.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result


@pytest.mark.parametrize("questions", [0, 1, 2])
def test_time_that_is_used_up_defers_whatever_is_set(questions: int) -> None:
    dns = BurntDns(zone(bank_example="p=none; sp=reject; np=none"), questions)
    policy = Dmarc(DmarcSettings(on_record_temperror=TemporaryHandling.CONTINUE), FakeServices(dns=dns))
    tx = transaction(header="From: a@mail.bank.example")
    policy.on_header(tx)
    verdict = run(policy, tx)
    assert (verdict.action, verdict.reason) == (Action.DEFER, "dmarc_temperror")
    # strangers' names have used up nothing of this
    assert dns.keys == [(None, True), (JUDGE_S, True)]


def test_time_that_is_used_up_for_the_organization_does_not_let_a_spoof_in() -> None:
    dns = BurntDns(zone(bank_example="p=reject"), 1)
    policy = Dmarc(DmarcSettings(), FakeServices(dns=dns))
    assert run(policy, transaction(dkim("x.example"))).action is Action.DEFER
    assert run(policy, transaction(dkim("x.test"))).action is Action.REJECT
    assert run(policy, transaction(dkim("bank.example"))).action is Action.CONTINUE


def test_results_that_burnt_their_time_do_not_stand_for_the_author_domain() -> None:
    burnt = [dkim(f"d{i}.dead.test", Result.TEMPERROR) for i in range(10)]
    tx = transaction(spf("slow.test", Result.TEMPERROR), *burnt)
    assert run(policy_of(), tx).action is Action.REJECT


def test_questions_are_begun_at_the_header() -> None:
    policy = policy_of()
    dns = policy.services.dns
    assert isinstance(dns, FakeDns)
    policy.on_header(transaction(spf("mail.bank.example")))
    begun = [each.name for each in dns.prefetched]
    assert list(dict.fromkeys(begun)) == [
        "_dmarc.bank.example",
        "_dmarc.example",
        "_dmarc.mail.bank.example",
    ]
    policy.on_header(transaction(header="X: y"))
    assert len(dns.prefetched) == len(begun)


@pytest.mark.parametrize(
    ("settings", "results", "reason"),
    [
        ({"exceptions": ("bank.example",)}, (), "local_policy"),
        ({"exceptions": (".example",)}, (), "local_policy"),
        ({"trusted_forwarder_networks": (ip_network("192.0.2.0/24"),)}, (), "trusted_forwarder"),
        ({"trusted_forwarders": ("fwd.test",)}, (spf("fwd.test"),), "trusted_forwarder"),
        ({"trusted_forwarders": ("Fwd.Test",)}, (dkim("fwd.test"),), "trusted_forwarder"),
        ({"mailing_lists": (".list.test",)}, (dkim("a.list.test"),), "mailing_list"),
        ({"mailing_lists": ("list.test",)}, (spf("list.test"), TEMPERROR), "mailing_list"),
        (
            {},
            (AuthResult("arc", Result.PASS, properties=(("policy.trusted-sealer", "list.test"),)),),
            "local_policy",
        ),
    ],
)
def test_an_override_changes_what_becomes_of_mail_and_not_the_result(
    settings: dict[str, Any], results: tuple[AuthResult, ...], reason: str
) -> None:
    verdict = run(policy_of(**settings), transaction(*results))
    assert (verdict.action, verdict.reason) == (Action.CONTINUE, reason)
    result = result_of(verdict)
    assert result.result in {Result.FAIL, Result.TEMPERROR}
    assert f"policy not applied: {reason}, " in result.reason
    assert ("policy.dmarc", "reject") in result.properties
    assert verdict.evidence is not None
    assert verdict.evidence.lines()[-1].startswith(f"policy not applied: {reason}, ")


@pytest.mark.parametrize(
    ("settings", "results"),
    [
        ({"exceptions": ("other.example", ".bank.example")}, ()),
        ({"trusted_forwarder_networks": (ip_network("2001:db8::/32"),)}, ()),
        ({"trusted_forwarders": ("fwd.test",)}, (spf("fwd.test", Result.FAIL), dkim("notfwd.test"))),
        ({"mailing_lists": (".list.test",)}, (dkim("list.test"), dkim("a.list.test", Result.NEUTRAL))),
        ({}, (AuthResult("arc", Result.PASS, properties=(("header.oldest-pass", "0"),)),)),
        ({}, (AuthResult("arc", Result.FAIL, properties=(("policy.trusted-sealer", "list.test"),)),)),
        ({}, (AuthResult("x", Result.PASS, properties=(("policy.trusted-sealer", "list.test"),)),)),
    ],
)
def test_what_is_not_proved_overrides_nothing(
    settings: dict[str, Any], results: tuple[AuthResult, ...]
) -> None:
    assert run(policy_of(**settings), transaction(*results)).action is Action.REJECT


@pytest.mark.parametrize(
    ("record", "sealer", "action"),
    [
        ("p=reject", "policy.trusted-sealer", Action.DEFER),
        ("p=reject", "header.d", Action.REJECT),
        ("p=quarantine", "policy.trusted-sealer", Action.QUARANTINE),
        ("p=none", "policy.trusted-sealer", Action.CONTINUE),
    ],
)
def test_what_a_listed_sealer_may_yet_vouch_for_is_not_refused_for_good(
    record: str, sealer: str, action: Action
) -> None:
    arc = AuthResult("arc", Result.TEMPERROR, properties=((sealer, "list.test"),))
    assert run(policy_of(zone(bank_example=record)), transaction(arc)).action is action


def test_discovery_by_the_public_suffix_list() -> None:
    policy = policy_of(zone(bank_co_uk="p=reject", co_uk="p=none"), discovery=Discovery.PSL)
    verdict = run(policy, transaction(spf("attacker.co.uk"), header="From: a@mail.bank.co.uk"))
    assert verdict.action is Action.REJECT
    tx = transaction(spf("x.bank.co.uk"), header="From: a@mail.bank.co.uk")
    assert result_of(run(policy, tx)).result is Result.PASS


@pytest.mark.parametrize(
    "settings",
    [
        {"exceptions": ["no domain"]},
        {"mailing_lists": ["a@example.org"]},
        {"trusted_forwarders": [""]},
        {"on_temperror": "reject"},
        {"on_record_temperror": "reject"},
        {"on_bad_from": "pass"},
        {"discovery": "dns"},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DmarcSettings).validate_python(settings)


def test_settings_come_from_text() -> None:
    settings = TypeAdapter(DmarcSettings).validate_python(
        {"on_reject": "quarantine", "trusted_forwarder_networks": ["192.0.2.0/24"], "discovery": "psl"}
    )
    assert settings.on_reject is Handling.QUARANTINE
    assert settings.trusted_forwarder_networks == (ip_network("192.0.2.0/24"),)


@pytest.mark.parametrize("discovery", Discovery)
async def test_the_public_suffix_list_is_read_at_the_start_where_it_is_used(discovery: Discovery) -> None:
    public_suffixes.cache_clear()
    await policy_of(discovery=discovery).start()
    assert public_suffixes.cache_info().currsize == (discovery is Discovery.PSL)
