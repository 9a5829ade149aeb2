"""DMARC of a message: discovery, policy, alignment, and what DNS trouble makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.lookup import BUDGET, Answer, Found, Question, RRType
from gateway.smtp.address import Domain
from gateway.testing.zone import Node, Zone
from gateway.verdict import AuthResult, Result
from policies.verify.dmarc.judge import (
    Discovery,
    DmarcResult,
    Identifier,
    Trouble,
    identifiers,
    judge,
)
from policies.verify.dmarc.record import DmarcPolicy

NONE, QUARANTINE, REJECT = DmarcPolicy
PASS, FAIL, TEMPERROR = Result.PASS, Result.FAIL, Result.TEMPERROR
EXISTS: Node = {RRType.MX: []}


def zone(records: dict[str, str], **nodes: Node) -> Zone:
    """Records by domain, "!servfail" for a failure; and other nodes, `example_org=`."""
    made: dict[str, Node] = {
        f"_dmarc.{domain}": {RRType.TXT: text[1:] if text[:1] == "!" else [f"v=DMARC1; {text}".encode()]}
        for domain, text in records.items()
    }
    return Zone(made | {name.replace("_", "."): node for name, node in nodes.items()})


def judged(
    dns: Zone, author: str, *identified: Identifier, discovery: Discovery = Discovery.TREEWALK
) -> DmarcResult:
    return dns.run(judge(Domain(author), identified, discovery))


def spf(domain: str, result: Result = PASS) -> Identifier:
    return Identifier("spf", domain, result)


def dkim(domain: str, result: Result = PASS) -> Identifier:
    return Identifier("dkim", domain, result)


def asked(dns: Zone) -> list[str]:
    return [each.question.name for each in dns.trail]


ORG = {"example.org": "p=reject"}


@pytest.mark.parametrize(
    ("identified", "result"),
    [
        ((), FAIL),
        ((spf("example.org"),), PASS),
        ((dkim("example.org"),), PASS),
        ((spf("mail.example.org"),), PASS),
        ((dkim("a.b.example.org"),), PASS),
        ((spf("example.net"), dkim("notexample.org")), FAIL),
        ((spf("example.net"), dkim("example.net"), dkim("x.example.org")), PASS),
        ((spf("example.org", FAIL),), FAIL),
        ((dkim("example.org", Result.POLICY), dkim("example.org", Result.PERMERROR)), FAIL),
        ((dkim("org"),), FAIL),
        ((spf("example.org", TEMPERROR),), TEMPERROR),
        ((dkim("x.example.org", TEMPERROR),), TEMPERROR),
        ((dkim("example.net", TEMPERROR), dkim("other.org", TEMPERROR), dkim("org", TEMPERROR)), FAIL),
        ((dkim("example.org", TEMPERROR), spf("example.org")), PASS),
        ((Identifier("dkim", "", TEMPERROR),), TEMPERROR),
        ((Identifier("dkim", "", TEMPERROR), spf("example.org")), PASS),
    ],
)
def test_one_aligned_pass_is_enough(identified: Sequence[Identifier], result: Result) -> None:
    found = judged(zone(ORG), "example.org", *identified)
    assert (found.result, found.policy, found.record_at) == (result, REJECT, "example.org")
    assert (found.trouble is Trouble.EVIDENCE) is (result is TEMPERROR)


@pytest.mark.parametrize(
    ("tags", "identified", "result"),
    [
        ("adkim=s", (dkim("mail.example.org"),), FAIL),
        ("adkim=s", (dkim("example.org"),), PASS),
        ("adkim=s", (spf("mail.example.org"),), PASS),
        ("aspf=s", (spf("mail.example.org"),), FAIL),
        ("aspf=s", (dkim("mail.example.org"),), PASS),
        ("adkim=s", (dkim("mail.example.org", TEMPERROR),), FAIL),
        ("adkim=s", (dkim("example.org", TEMPERROR),), TEMPERROR),
    ],
)
def test_strict_alignment(tags: str, identified: Sequence[Identifier], result: Result) -> None:
    dns = zone({"example.org": f"p=reject; {tags}"})
    assert judged(dns, "example.org", *identified).result is result


def test_siblings_below_a_public_suffix_are_not_aligned() -> None:
    dns = zone({"bank.example": "p=none; psd=y", "giant.bank.example": "p=reject"})
    assert judged(dns, "giant.bank.example", dkim("mega.bank.example")).result is FAIL
    assert judged(dns, "giant.bank.example", dkim("bank.example")).result is FAIL
    assert judged(dns, "giant.bank.example", dkim("mail.giant.bank.example")).result is PASS


def test_a_top_level_domain_authenticates_nobody_below_it_whatever_it_says() -> None:
    dns = zone({"org": "p=reject; psd=n"})
    assert judged(dns, "example.org", dkim("other.org")).result is PASS
    assert judged(dns, "example.org", dkim("org")).result is FAIL


def test_an_organization_within_another_one_is_not_aligned_with_it() -> None:
    dns = zone({"example.org": "p=reject", "dept.example.org": "p=none; psd=n"})
    found = judged(dns, "example.org", dkim("mail.dept.example.org"))
    assert found.result is FAIL
    assert found.judged[0].why == "its organizational domain is dept.example.org"
    assert judged(dns, "mail.dept.example.org", dkim("example.org")).result is FAIL
    assert judged(dns, "a.dept.example.org", dkim("b.dept.example.org")).result is PASS


def test_names_of_others_are_never_asked_for() -> None:
    dns = zone(ORG)
    forged = [dkim(f"d{i}.dead.org", result) for i in range(9) for result in (PASS, TEMPERROR)]
    judged(dns, "example.org", spf("attacker.net"), *forged)
    assert asked(dns) == ["_dmarc.example.org", "_dmarc.org"]


def test_nothing_more_is_asked_for_an_exact_match() -> None:
    dns = zone(ORG)
    found = judged(dns, "example.org", spf("bounce.example.org"), dkim("example.org"))
    assert found.result is PASS
    assert asked(dns) == ["_dmarc.example.org"]


def test_walks_are_bounded() -> None:
    dns = zone(ORG | {f"d{i}.example.org": "p=none; psd=n" for i in range(30)})
    found = judged(dns, "example.org", *[dkim(f"d{i}.example.org") for i in range(30)])
    assert found.result is FAIL
    assert len(asked(dns)) == 2 + 10
    assert found.judged[-1].why == "too many domains to ask for"


@pytest.mark.parametrize(
    ("records", "author", "policy", "record_at"),
    [
        ({"example.org": "p=reject; sp=none"}, "example.org", REJECT, "example.org"),
        ({"example.org": "p=reject; sp=quarantine"}, "mail.example.org", QUARANTINE, "example.org"),
        ({"example.org": "p=reject; sp=quarantine; np=none"}, "nosuch.example.org", NONE, "example.org"),
        ({"example.org": "p=reject; sp=quarantine; np=none"}, "mail.example.org", QUARANTINE, "example.org"),
        ({"example.org": "p=quarantine; t=y"}, "mail.example.org", NONE, "example.org"),
        ({"example.org": "p=none; np=reject; t=y"}, "nosuch.example.org", QUARANTINE, "example.org"),
        (
            {"example.org": "p=none", "mail.example.org": "p=reject"},
            "mail.example.org",
            REJECT,
            "mail.example.org",
        ),
        # RFC 9989 4.10.1: neither the author domain nor its organization
        (
            {"example.org": "p=none", "mail.example.org": "p=reject"},
            "a.mail.example.org",
            NONE,
            "example.org",
        ),
        ({"org": "p=none; sp=reject; psd=y"}, "example.org", REJECT, "org"),
        ({"org": "p=none; sp=reject"}, "example.org", REJECT, "org"),
        ({"org": "p=reject; psd=y", "example.org": "p=none"}, "example.org", NONE, "example.org"),
        ({"org": "p=reject; psd=y", "example.org": "p=none"}, "mail.example.org", NONE, "example.org"),
    ],
)
def test_the_policy_that_applies(records: dict[str, str], author: str, policy: str, record_at: str) -> None:
    found = judged(zone(records, mail_example_org=EXISTS, example_org=EXISTS), author)
    assert (found.result, found.policy, found.record_at) == (FAIL, policy, record_at)


def test_existence_is_asked_for_where_it_matters_only() -> None:
    dns = zone({"example.org": "p=reject; sp=quarantine"})
    judged(dns, "x.example.org")
    assert "x.example.org" not in asked(dns)


@pytest.mark.parametrize(
    ("tags", "result", "policy", "trouble"),
    [
        ("p=reject; sp=none", TEMPERROR, NONE, Trouble.RECORD),
        ("p=none; sp=none; np=reject", TEMPERROR, NONE, Trouble.RECORD),
        ("p=reject; sp=quarantine; np=reject", FAIL, QUARANTINE, None),
        ("p=reject; sp=reject; np=quarantine", FAIL, QUARANTINE, None),
    ],
)
def test_the_weaker_policy_applies_where_existence_is_not_known(
    tags: str, result: Result, policy: DmarcPolicy, trouble: Trouble | None
) -> None:
    if "np=" not in tags:
        tags += "; np=quarantine"
    dns = zone({"example.org": tags}, x_example_org={"*": "servfail"})
    found = judged(dns, "x.example.org")
    assert (found.result, found.policy, found.trouble) == (result, policy, trouble)
    assert judged(dns, "x.example.org", dkim("example.org")).result is PASS


@pytest.mark.parametrize("text", ["", "adkim=s", "p=x", "p=reject; sp=x"])
def test_a_record_without_a_policy_is_no_dmarc(text: str) -> None:
    found = judged(zone({"example.org": text}), "example.org", dkim("example.org"))
    assert found.result is Result.NONE
    assert found.policy is NONE


def test_no_record_is_no_dmarc() -> None:
    found = judged(zone({}), "example.org", dkim("example.org"))
    assert (found.result, found.record_at) == (Result.NONE, "")


def test_several_records_are_none_and_the_walk_goes_on() -> None:
    dns = zone(ORG)
    dns.nodes["_dmarc.mail.example.org"] = {RRType.TXT: [b"v=DMARC1; p=none", b"v=DMARC1; p=reject"]}
    assert judged(dns, "mail.example.org").record_at == "example.org"


@pytest.mark.parametrize("at", ["mail.example.org", "example.org"])
def test_a_record_that_cannot_be_asked_for_is_a_temperror(at: str) -> None:
    found = judged(zone({at: "!timeout"}), "mail.example.org", dkim("mail.example.org"))
    assert (found.result, found.trouble) == (TEMPERROR, Trouble.RECORD)
    assert at in found.why
    assert "timeout" in found.why


def test_an_exact_match_passes_whatever_could_not_be_asked_above_a_record() -> None:
    dns = zone(ORG | {"org": "!timeout"})
    assert judged(dns, "mail.example.org", dkim("mail.example.org")).result is PASS
    assert judged(dns, "mail.example.org", dkim("example.org")).result is TEMPERROR
    assert judged(dns, "example.org", dkim("example.org")).result is PASS


@pytest.mark.parametrize("result", [each for each in Result if each is not PASS])
def test_only_a_pass_passes_while_the_record_is_not_known(result: Result) -> None:
    dns = zone({"a.mail.example.org": "p=reject", "org": "!timeout"})
    dns.nodes["_dmarc.a.mail.example.org"] = {RRType.TXT: [b"v=DMARC1; p=reject", b"v=DMARC1; p=none"]}
    dns.nodes["_dmarc.mail.example.org"] = {RRType.TXT: [b"v=DMARC1; p=reject"]}
    author = "a.mail.example.org"
    assert judged(dns, author, dkim(author, result)).result is TEMPERROR
    passed = judged(dns, author, dkim(author))
    assert (passed.result, passed.judged[0].is_aligned) == (PASS, True)


def test_a_walk_that_failed_above_a_record_gives_none_to_apply() -> None:
    dns = zone({"example.org": "p=none", "org": "!timeout"})
    found = judged(dns, "mail.example.org", dkim("example.net"))
    assert (found.result, found.trouble, found.policy) == (TEMPERROR, Trouble.RECORD, NONE)


def test_existence_that_we_did_not_ask_for_leaves_the_policy_open() -> None:
    class Hurried(Zone):
        def answer(self, question: Question) -> Answer:
            if question.name == "x.example.org":
                return Answer(Found.TEMPORARY_FAILURE, why=BUDGET)
            return super().answer(question)

    dns = Hurried(zone({"example.org": "p=reject; sp=reject; np=quarantine"}).nodes)
    found = judged(dns, "x.example.org")
    assert (found.policy, found.trouble) == (QUARANTINE, Trouble.BUDGET)


def test_a_temperror_of_something_else_is_no_check_that_failed_as_a_whole() -> None:
    results = [AuthResult("dkim", TEMPERROR, properties=(("header.i", "@example.org"),))]
    assert identifiers(results, has_reverse_path=True) == ()


def test_what_could_be_aligned_is_a_temperror_while_the_organization_is_not_known() -> None:
    dns = zone(ORG | {"org": "!timeout"})
    found = judged(dns, "example.org", dkim("mail.example.org"))
    assert (found.result, found.policy, found.trouble) == (TEMPERROR, REJECT, Trouble.EVIDENCE)
    assert judged(dns, "example.org", dkim("mail.example.net")).result is FAIL
    dns = zone(ORG | {"mail.example.org": "!timeout"})
    assert judged(dns, "example.org", dkim("mail.example.org")).trouble is Trouble.EVIDENCE


@pytest.mark.parametrize("why", [BUDGET, "limit", "closed", "failed", "a new word", ""])
def test_what_we_did_not_ask_is_told_apart(why: str) -> None:
    lookup = judge(Domain("example.org"), [dkim("example.org")])
    next(lookup)
    with pytest.raises(StopIteration) as done:
        lookup.send([Answer(Found.TEMPORARY_FAILURE, why=why)])
    assert (done.value.value.result, done.value.value.trouble) == (TEMPERROR, Trouble.BUDGET)


@pytest.mark.parametrize(
    "why", ["timeout", "servfail", "refused", "formerr", "notimp", "network", "too_large"]
)
def test_what_dns_did_not_answer_is_told_apart(why: str) -> None:
    assert judged(zone({"example.org": f"!{why}"}), "example.org").trouble is Trouble.RECORD


def test_discovery_by_the_public_suffix_list() -> None:
    dns = zone({"mail.co.za": "p=reject", "org.za": "p=reject"})
    found = judged(dns, "a.b.mail.co.za", dkim("x.mail.co.za"), discovery=Discovery.PSL)
    assert (found.result, found.record_at, found.org_domain) == (PASS, "mail.co.za", "mail.co.za")
    assert asked(dns) == ["_dmarc.a.b.mail.co.za", "_dmarc.mail.co.za"]
    found = judged(dns, "mail.co.za", dkim("other.co.za"), spf("co.za"), discovery=Discovery.PSL)
    assert found.result is FAIL
    assert judged(dns, "bank.org.za", discovery=Discovery.PSL).result is Result.NONE
    assert judged(dns, "org.za", dkim("bank.org.za"), discovery=Discovery.PSL).result is FAIL


def test_the_list_says_without_a_question_what_is_of_one_organization() -> None:
    dns = zone({"a.mail.co.za": "p=reject", "mail.co.za": "!timeout"})
    assert judged(dns, "a.mail.co.za", dkim("b.mail.co.za"), discovery=Discovery.PSL).result is PASS
    assert asked(dns) == ["_dmarc.a.mail.co.za"]


def test_identifiers_are_of_mail_from_or_of_helo_never_of_both() -> None:
    results = [
        AuthResult("spf", PASS, properties=(("smtp.mailfrom", "a@b@Example.org"),)),
        AuthResult("spf", PASS, properties=(("smtp.helo", "mx.example.net"),)),
        AuthResult("dkim", PASS, properties=(("header.i", "@x.example"), ("header.d", "EXAMPLE.com"))),
        AuthResult("dkim", FAIL, properties=(("header.d", "no domain"),)),
        AuthResult("dkim", Result.NONE),
        AuthResult("arc", PASS, properties=(("header.d", "arc.example"),)),
        AuthResult("dkim", TEMPERROR, "policy failed"),
    ]
    common = (Identifier("dkim", "example.com", PASS), Identifier("dkim", "", TEMPERROR))
    assert identifiers(results, has_reverse_path=True) == (spf("example.org"), *common)
    assert identifiers(results, has_reverse_path=False) == (spf("mx.example.net"), *common)


def test_the_evidence_says_what_was_looked_at_and_why() -> None:
    dns = zone({"example.org": "p=reject; t=y"})
    found = judged(
        dns, "mail.example.org", spf("example.net"), dkim("example.org", FAIL), dkim("", TEMPERROR)
    )
    assert list(found.lines()) == [
        "author domain mail.example.org",
        "record at _dmarc.example.org: p=reject sp=reject np=reject adkim=r aspf=r psd=u t=y",
        "policy quarantine",
        "organizational domain example.org",
        "spf=pass example.net: not aligned, it is of another top-level domain",
        "dkim=fail example.org: not aligned, it did not pass",
        "dkim=temperror of no domain: open, the check failed as a whole",
        "dmarc=temperror, what may be aligned could not be checked",
    ]
    assert list(judged(zone({}), "example.org").lines()) == [
        "author domain example.org",
        "dmarc=none, there is no record",
    ]
    aligned = judged(dns, "example.org", spf("example.org"), dkim("example.org"))
    assert list(aligned.lines())[-3:] == [
        "spf=pass example.org: aligned, it is the author domain",
        "dkim=pass example.org: open, not looked at, since another one is aligned",
        "dmarc=pass",
    ]
    assert list(judged(dns, "example.org", dkim("example.org")).lines())[-1] == "dmarc=pass"


LABELS = st.sampled_from(["a", "b", "example", "org"])
DOMAINS = st.lists(LABELS, min_size=1, max_size=10).map(".".join)
TEXTS = st.sampled_from(
    ["p=reject", "p=none; psd=n", "p=none; psd=y", "p=reject; adkim=s; aspf=s", "x", "!servfail"]
)
RESULTS = st.sampled_from([PASS, FAIL, TEMPERROR])


@given(
    st.dictionaries(DOMAINS, TEXTS, max_size=6),
    DOMAINS,
    st.lists(st.builds(Identifier, st.sampled_from(["spf", "dkim"]), DOMAINS, RESULTS), max_size=12),
    st.sampled_from(Discovery),
)
def test_any_world_has_a_result_with_bounded_questions(
    records: dict[str, str], author: str, identified: list[Identifier], discovery: Discovery
) -> None:
    dns = zone(records)
    found = judged(dns, author, *identified, discovery=discovery)
    assert found.result in {Result.NONE, PASS, FAIL, TEMPERROR}
    assert (found.trouble is not None) is (found.result is TEMPERROR)
    names = asked(dns)
    assert len(names) == len(set(names)) <= 8 * 11 + 1
    assert found.lines()
    if found.result is PASS:
        # nobody passes for another top-level domain, or without a pass
        assert any(each.result is PASS and each.domain.endswith(author[-1]) for each in identified)
