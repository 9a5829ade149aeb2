"""check_host: what decides, what it asks, and that nothing from outside makes it raise or go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import BUDGET, Answer, Found, Mx, Question, Result, RRType
from gateway.lookup import NO_SUCH_NAME, OUT_OF_TIME, Record
from gateway.testing.zone import Node, Zone
from policies.verify.spf import SpfLimits, SpfResult, a_labels, check_host, identity, is_checkable
from tests.policies.verify.spf_worlds import HELOS, record, world

V4 = ip_address("192.0.2.1")
V6 = ip_address("2001:db8::1")
REVERSE = "1.2.0.192.in-addr.arpa"
WORDS = {"none", "neutral", "pass", "fail", "softfail", "temperror", "permerror"}


Records = dict[RRType | str, Sequence[Record] | str]


def txt(*texts: str) -> Records:
    return {RRType.TXT: [text.encode("latin-1") for text in texts]}


def a(*addresses: str) -> Records:
    return {RRType.A: [ip_address(address) for address in addresses]}


def mx(*hosts: str) -> Records:
    return {RRType.MX: [Mx(preference, host) for preference, host in enumerate(hosts)]}


def checked(
    nodes: Mapping[str, Node],
    client: IPv4Address | IPv6Address = V4,
    mail_from: str = "user@example.org",
    limits: SpfLimits | None = None,
    *,
    explain: bool = True,
) -> tuple[SpfResult, list[Question]]:
    """The result, and what was asked."""
    zone = Zone(nodes)
    domain, sender = identity(mail_from, "mail.example.org")
    found = zone.run(
        check_host(
            client, domain, sender, "mail.example.org", limits or SpfLimits(), now=1e9, explain=explain
        )
    )
    return found, [asked.question for asked in zone.trail]


def result(text: str, client: IPv4Address | IPv6Address = V4, **nodes: Node) -> SpfResult:
    """Of a record; the other nodes have names of example.net."""
    others = {f"{name.replace('_', '.')}.example.net": node for name, node in nodes.items()}
    return checked({"example.org": txt(text), **others}, client)[0]


def test_only_the_family_of_the_client_is_asked_for() -> None:
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 a mx exists:x.example.net -all") | mx("h.example.net"),
        "h.example.net": {RRType.A: [V4], RRType.AAAA: [V6]},
    }
    for client, other in ((V4, RRType.AAAA), (V6, RRType.A)):
        _, asked = checked(nodes, client)
        # RFC 7208 5.7: exists asks for A whatever the client's address is
        assert other not in {each.rrtype for each in asked if each.name != "x.example.net"}


def test_a_term_is_void_once_however_many_of_its_hosts_are() -> None:
    hosts = [f"h{number}.example.net" for number in range(5)]
    nodes: dict[str, Node] = {"example.org": txt("v=spf1 mx a ip6:2001:db8::/32") | mx(*hosts)}
    found, _ = checked(nodes, V6)
    assert (found.result, found.voids) == (Result.PASS, 2)


def test_more_void_terms_than_allowed_are_a_permerror() -> None:
    nodes = {"example.org": txt("v=spf1 a:x.example.net exists:y.example.net mx +all")}
    assert checked(nodes)[0].result is Result.PERMERROR
    assert checked(nodes)[0].problem == "more than 2 void look-ups"
    assert checked(nodes, limits=SpfLimits(voids=3))[0].result is Result.PASS


def test_a_name_that_dns_cannot_hold_is_not_asked_for_and_not_void() -> None:
    found, asked = checked(
        {"example.org": txt(f"v=spf1 a:{'x' * 64}.net a:a..b.net mx:.net exists:{'y' * 64}.net ~all")}
    )
    assert (found.result, found.voids, found.lookups, len(asked)) == (Result.SOFTFAIL, 0, 4, 1)


def test_the_eleventh_term_that_queries_is_a_permerror_when_it_is_reached() -> None:
    nodes = {"example.org": a("192.0.2.9") | txt("v=spf1" + " a" * 10 + " {} a ~all")}
    for term, expected in (("ip4:192.0.2.1", Result.PASS), ("ip4:192.0.2.2", Result.PERMERROR)):
        nodes["example.org"] = a("192.0.2.9") | txt("v=spf1" + " a" * 10 + f" {term} a ~all")
        assert checked(nodes)[0].result is expected


def test_questions_have_a_limit_of_their_own() -> None:
    nodes = {"example.org": a("192.0.2.9") | txt("v=spf1 a a a ~all")}
    found, asked = checked(nodes, limits=SpfLimits(questions=3))
    assert (found.result, found.problem, len(asked)) == (Result.PERMERROR, "too many DNS questions", 3)


def test_hosts_of_an_mx_are_asked_for_together() -> None:
    lookup = check_host(V4, "example.org", "u@example.org", "h")
    assert next(lookup) == (Question("example.org", RRType.TXT),)
    lookup.send([Answer(Found.RECORDS, (b"v=spf1 mx -all",))])
    found = (Mx(1, "a.example"), Mx(2, "b.example"), Mx(3, "a.example"), Mx(4, ""))
    hosts = lookup.send([Answer(Found.RECORDS, found)])
    assert hosts == (Question("a.example", RRType.A), Question("b.example", RRType.A))


def test_one_host_that_matches_is_enough_whatever_becomes_of_the_others() -> None:
    hosts = ("down.example.net", "gone.example.net", "up.example.net")
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 mx -all") | mx(*hosts),
        "down.example.net": {"*": "servfail"},
        "up.example.net": a("192.0.2.1"),
    }
    assert checked(nodes)[0].result is Result.PASS
    del nodes["up.example.net"]
    assert checked(nodes)[0].result is Result.TEMPERROR


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v=spf1 ptr -all", Result.TEMPERROR),
        ("v=spf1 ptr ip4:192.0.2.1 -all", Result.PASS),
        ("v=spf1 -ptr -all", Result.FAIL),
        ("v=spf1 -ptr +all", Result.TEMPERROR),
        ("v=spf1 ptr include:none.example.net", Result.TEMPERROR),
        ("v=spf1 include:p.example.net -all", Result.TEMPERROR),
        ("v=spf1 exists:%{p}.example.net -all", Result.TEMPERROR),
        ("v=spf1 redirect=%{p}.example.net", Result.TEMPERROR),
        ("v=spf1 ip4:192.0.2.1 ptr -all", Result.PASS),
    ],
)
def test_a_ptr_without_answer_leaves_open_what_a_match_would_change(text: str, expected: Result) -> None:
    nodes: dict[str, Node] = {
        "example.org": txt(text),
        "p.example.net": txt("v=spf1 ptr ?all"),
        REVERSE: {"*": "servfail"},
    }
    assert checked(nodes)[0].result is expected


def test_a_name_of_the_client_without_answer_is_skipped_where_another_matches() -> None:
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 ptr:example.net -all"),
        REVERSE: {RRType.PTR: ["down.example.net", "up.example.net"]},
        "down.example.net": {"*": "timeout"},
        "up.example.net": a("192.0.2.1"),
    }
    assert checked(nodes)[0].result is Result.PASS


def test_names_of_the_client_are_asked_for_once_and_ten_at_most() -> None:
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 ptr ptr exists:%{p}.example.net -all"),
        REVERSE: {RRType.PTR: [f"h{number}.example.net" for number in range(12)]},
        **{f"h{number}.example.net": a("192.0.2.9") for number in range(12)},
    }
    _, asked = checked(nodes)
    assert len(asked) == 1 + 1 + 10 + 1


@pytest.mark.parametrize("at", range(6))
def test_without_time_the_result_is_temperror_and_never_fail(at: int) -> None:
    """Whichever answer is the first that did not come."""
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 a ptr mx -all") | a("192.0.2.9") | mx("h.example.net"),
        REVERSE: {RRType.PTR: ["h.example.net"]},
        "h.example.net": a("192.0.2.9"),
    }

    class Ending(Zone):
        """Answers until its time is used up."""

        def answer(self, question: Question) -> Answer:
            return super().answer(question) if len(self.trail) < at else OUT_OF_TIME

    found = Ending(nodes).run(check_host(V4, "example.org", "u@example.org", "mail.example.org"))
    assert found.result is Result.TEMPERROR
    assert BUDGET in found.problem


def test_explanation_is_asked_for_on_fail_only() -> None:
    nodes = {
        "example.org": txt("v=spf1 ip4:192.0.2.1 exp=why.example.net -all"),
        "why.example.net": txt("%{i} may not, since %{t} on %{r}"),
    }
    passed, asked = checked(nodes)
    assert (passed.result, len(asked)) == (Result.PASS, 1)
    failed, asked = checked(nodes, ip_address("192.0.2.2"))
    assert failed.explanation == "192.0.2.2 may not, since 1000000000 on unknown"
    assert (failed.decided_by, failed.term, len(asked)) == ("example.org", "-all", 2)
    assert len(checked(nodes, ip_address("192.0.2.2"), explain=False)[1]) == 1


@pytest.mark.parametrize(
    "node",
    [
        {},
        txt("one", "two"),
        txt("%{q}"),
        txt("50% off"),
        txt("caf\xe9"),
        txt("a\r\nb"),
        {RRType.TXT: "servfail"},
        txt(""),
    ],
)
def test_an_explanation_that_cannot_be_had_changes_nothing(node: Node) -> None:
    found, _ = checked({"example.org": txt("v=spf1 exp=why.example.net -all"), "why.example.net": node})
    assert (found.result, found.explanation) == (Result.FAIL, "")


def test_an_explanation_is_cut() -> None:
    why = txt("%{s}" * 10_000)
    found, _ = checked({"example.org": txt("v=spf1 exp=why.example.net -all"), "why.example.net": why})
    assert len(found.explanation) == 512


def test_an_explanation_spends_nothing_that_counts() -> None:
    why = "v=spf1 a:n.example.net mx exp=%{p}.example.net -all"
    found, _ = checked({"example.org": txt(why)})
    assert (found.result, found.voids) == (Result.FAIL, 2)


def test_a_local_part_beyond_ascii_matches_nothing() -> None:
    """RFC 8616 4."""
    nodes: dict[str, Node] = {"example.org": txt("v=spf1 exists:%{l}.example.net include:%{s} ?all")}
    found, asked = checked(nodes, mail_from="b\xfccher@example.org")
    assert (found.result, len(asked)) == (Result.NEUTRAL, 1)


def test_u_labels_are_asked_for_as_a_labels() -> None:
    nodes = {
        "xn--bcher-kva.example": txt("v=spf1 exists:%{o}.%{d}.example.net -all"),
        "xn--bcher-kva.example.xn--bcher-kva.example.example.net": a("127.0.0.2"),
    }
    assert checked(nodes, mail_from="u@b\xfccher.example")[0].result is Result.PASS


@pytest.mark.parametrize(
    "domain", ["", "org", "[192.0.2.1]", "a..b", ".org", "x" * 64 + ".org", "y." * 130 + "org", "\xff.\udcff"]
)
def test_what_is_no_multi_label_name_is_none_and_nobody_is_asked(domain: str) -> None:
    zone = Zone()
    assert zone.run(check_host(V4, domain, f"u@{domain}", "h")).result is Result.NONE
    assert zone.trail == []
    assert not is_checkable(a_labels(domain))


def test_a_redirect_to_itself_ends() -> None:
    found = result("v=spf1 redirect=example.org")
    assert (found.result, found.lookups) == (Result.PERMERROR, 11)


def test_an_error_behind_the_match_is_an_error() -> None:
    found = result("v=spf1 +all moo")
    assert (found.result, found.problem, found.problem_domain) == (
        Result.PERMERROR,
        "unknown mechanism",
        "example.org",
    )


def test_evidence_tells_every_term_and_where_it_stood() -> None:
    text = "v=spf1 ip4:198.51.100.0/24 ip4:203.0.113.0/24 a:gone.example.net include:other.example.net -all"
    found = result(text, other=txt("v=spf1 ip6:::/0 ip4:192.0.2.77 ?all"))
    assert list(found.lines()) == [
        "SPF of example.org for 192.0.2.1",
        f"  example.org: {text}",
        "  ip4:198.51.100.0/24 ip4:203.0.113.0/24: no match",
        "  a:gone.example.net: no match, void",
        "    other.example.net: v=spf1 ip6:::/0 ip4:192.0.2.77 ?all",
        "    ip6:::/0 ip4:192.0.2.77: no match",
        "    ?all: match",
        "  include:other.example.net: no match, neutral",
        "  -all: match",
        "fail by -all of example.org; 2 terms that query, 1 void",
    ]


def test_evidence_names_the_term_that_is_wrong() -> None:
    found = result("v=spf1 include:other.example.net -all", other=txt("v=spf1 a:foo -all"))
    assert list(found.lines())[-2:] == [
        "    other.example.net: invalid domain: a:foo",
        "permerror (invalid domain, other.example.net); 1 terms that query, 0 void",
    ]


def test_evidence_of_a_long_record_is_short() -> None:
    found = result("v=spf1" + " ip4:198.51.100.1" * 400 + " -all")
    assert found.lines()[2].endswith("and 350 more: no match")


def test_a_record_without_measure_cannot_be_evaluated() -> None:
    found = result("v=spf1" + " ip4:192.0.2.1" * 1000 + " -all")
    assert (found.result, found.problem) == (Result.PERMERROR, "more than 8192 octets")


@given(st.integers(0, 100_000), st.text(max_size=20), st.text(max_size=300), st.sampled_from(HELOS))
def test_anything_gives_a_word_within_the_questions(seed: int, local: str, domain: str, helo: str) -> None:
    given_world = world(seed)
    for asked_domain in (given_world.domain, domain):
        zone = Zone(given_world.zone.nodes)
        client = ip_address(given_world.client)
        found = zone.run(check_host(client, asked_domain, f"{local}@{domain}", helo + domain))
        assert found.result in WORDS
        assert len(zone.trail) <= SpfLimits().questions
        assert all(each.question.name.isascii() for each in zone.trail)
        assert all(isinstance(line, str) for line in found.lines())


PIECES = [
    "a",
    "mx",
    "ptr",
    "%{p}",
    ":",
    "/",
    "%{",
    "}",
    "include:",
    "d0.example.org",
    "=",
    "exp",
    "24",
    "~",
    "%{l1r-}",
    "exists:",
    "redirect=",
]
RECORDS = st.one_of(
    st.binary(max_size=60),
    st.integers(0, 100_000).map(lambda seed: record(Random(seed)).encode()[7:]),
    st.lists(st.sampled_from([*PIECES, " "]), max_size=14).map(lambda parts: "".join(parts).encode()),
).map(b"v=spf1 ".__add__)


@given(st.lists(RECORDS, min_size=1, max_size=3), st.sampled_from([V4, V6]))
def test_any_record_gives_a_word(texts: list[bytes], client: IPv4Address | IPv6Address) -> None:
    nodes: dict[str, Node] = {
        f"d{number}.example.org": {RRType.TXT: [text]} for number, text in enumerate(texts)
    }
    zone = Zone(nodes)
    found = zone.run(check_host(client, "d0.example.org", "u@d0.example.org", "mail.example.org"))
    assert found.result in WORDS
    assert (found.result in (Result.PERMERROR, Result.TEMPERROR)) == bool(found.problem)


def test_a_client_with_an_ipv4_mapped_address_is_that_of_ipv4() -> None:
    assert result("v=spf1 ip4:192.0.2.1 -all", ip_address("::ffff:192.0.2.1")).result is Result.PASS


def test_no_such_name_is_none() -> None:
    assert Zone().answer(Question("example.org", RRType.TXT)) == NO_SUCH_NAME
    assert checked({})[0].result is Result.NONE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x.other.example", "sub.Example.org", "example.ORG"), "example.ORG"),
        (("x.other.example", "sub.Example.org", "y.other.example"), "sub.Example.org"),
        (("x.other.example", "y.other.example"), "x.other.example"),
        (("gone.example",), "unknown"),
    ],
)
def test_of_the_names_of_the_client_that_of_the_domain_comes_first(
    names: tuple[str, ...], expected: str
) -> None:
    """RFC 7208 7.3."""
    nodes: dict[str, Node] = {name.lower(): a("192.0.2.1") for name in names if "gone" not in name}
    nodes["example.org"] = {**nodes.get("example.org", {}), **txt("v=spf1 -all exp=%{v}.why.example")}
    nodes["in-addr.why.example"] = txt("%{p}")
    nodes[REVERSE] = {RRType.PTR: list(names)}
    assert checked(nodes)[0].explanation == expected


def test_an_explanation_whose_name_needs_the_client_s_may_be_too_much() -> None:
    """Its questions count against the limit of all questions; without it the result stands."""
    nodes: dict[str, Node] = {"example.org": txt("v=spf1 -all exp=%{p}.why.example")}
    found, asked = checked(nodes, limits=SpfLimits(questions=1))
    assert (found.result, found.explanation, len(asked)) == (Result.FAIL, "", 1)
    assert checked({"example.org": txt(f"v=spf1 -all exp={'x' * 64}.example")})[0].explanation == ""


def test_more_mx_hosts_than_ten_and_more_records_than_one_are_permerrors() -> None:
    nodes: dict[str, Node] = {"example.org": txt("v=spf1 mx +all") | mx(*["h.example"] * 11)}
    assert checked(nodes)[0].problem == "more than 10 MX hosts"
    assert (
        checked({"example.org": txt("v=spf1 +all", "V=spf1 +all")})[0].problem == "more than one SPF record"
    )


def test_the_address_of_an_a_that_does_not_come_is_temperror() -> None:
    nodes: dict[str, Node] = {"example.org": txt("v=spf1 a:h.example +all"), "h.example": {"*": "servfail"}}
    found, _ = checked(nodes)
    assert (found.result, found.problem, found.problem_domain) == (
        Result.TEMPERROR,
        "no answer: servfail",
        "h.example",
    )


def test_a_void_name_of_the_client_makes_the_term_void() -> None:
    nodes: dict[str, Node] = {
        "example.org": txt("v=spf1 exists:%{p}.x.example ptr:y.example exists:%{p}.z.example ?all")
    }
    found, _ = checked(nodes)
    assert (found.result, found.voids) == (Result.PERMERROR, 3)
