"""Organizational domains: how far a walk goes, where it ends, and what the end is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.lookup import OUT_OF_TIME, RRType
from gateway.testing.zone import Zone
from policies.verify.org_domain import DmarcRecords, Walk, list_search, registrable, tree_walk


def zone(**records: str) -> Zone:
    """`example_com="psd=n"` is a record at _dmarc.example.com."""
    return Zone(
        {
            f"_dmarc.{name.replace('_', '.')}": {RRType.TXT: [f"v=DMARC1; p=none; {tags}".encode()]}
            for name, tags in records.items()
        }
    )


def walk(domain: str, dns: Zone) -> Walk:
    return dns.run(tree_walk(domain, DmarcRecords()))


@pytest.mark.parametrize(
    ("domain", "dns", "org_domain"),
    [
        ("a.mail.example.com", zone(), "a.mail.example.com"),
        ("a.mail.example.com", zone(mail_example_com="", example_com=""), "example.com"),
        ("a.mail.example.com", zone(mail_example_com="psd=n", example_com=""), "mail.example.com"),
        ("a.mail.example.com", zone(example_com="psd=y"), "mail.example.com"),
        ("a.mail.example.com", zone(com="psd=y"), "example.com"),
        ("mail.example.com", zone(mail_example_com="psd=y", example_com=""), "mail.example.com"),
        ("mail.example.com", zone(mail_example_com="", example_com="psd=y"), "mail.example.com"),
        ("example.com", zone(example_com=""), "example.com"),
        ("example.com", zone(example_com="", com="psd=n"), "com"),
        ("com", zone(com=""), "com"),
        ("a.b.c.d.e.f.g.h.example", zone(c_d_e_f_g_h_example="psd=y"), "b.c.d.e.f.g.h.example"),
        ("a.b.c.d.e.f.g.h.example", zone(b_c_d_e_f_g_h_example="psd=n"), "a.b.c.d.e.f.g.h.example"),
    ],
)
def test_tree_walk(domain: str, dns: Zone, org_domain: str) -> None:
    assert walk(domain, dns).org_domain == org_domain


def test_a_top_level_domain_is_nobodys_organization_unless_it_says_so() -> None:
    dns = zone(com="")
    assert walk("example.com", dns).org_domain == "example.com"
    assert walk("mail.example.com", dns).org_domain == "example.com"


def test_a_walk_ends_at_psd_and_where_dns_fails() -> None:
    dns = zone(b_example_com="psd=y", example_com="")
    walk("a.b.example.com", dns)
    assert [asked.question.name for asked in dns.trail] == ["_dmarc.a.b.example.com", "_dmarc.b.example.com"]
    dns = zone(a_b_example_com="")
    dns.nodes["_dmarc.b.example.com"] = {RRType.TXT: "servfail"}
    failed = walk("a.b.example.com", dns)
    assert (failed.org_domain, failed.failed_at, list(failed.records)) == (
        "",
        "b.example.com",
        ["a.b.example.com"],
    )
    assert failed.failure is not None
    assert failed.failure.why == "servfail"


@given(st.integers(1, 40))
def test_a_walk_asks_at_most_eight_questions(labels: int) -> None:
    dns = Zone()
    domain = ".".join(["x"] * labels)
    assert walk(domain, dns).org_domain == domain
    names = [asked.question.name for asked in dns.trail]
    assert len(names) == min(labels, 8)
    assert names[0] == f"_dmarc.{domain}"
    assert names[-1] == "_dmarc.x"


def test_a_name_is_asked_for_once() -> None:
    dns, records = zone(example_com=""), DmarcRecords()
    for domain in ("a.example.com", "b.example.com", "a.example.com"):
        assert dns.run(tree_walk(domain, records)).org_domain == "example.com"
    assert len(dns.trail) == 4


def test_list_search_asks_at_the_registrable_domain_only() -> None:
    dns = zone(example_co_uk="", a_example_co_uk="")
    found = dns.run(list_search("b.a.example.co.uk", DmarcRecords()))
    assert found.org_domain == "example.co.uk"
    assert [asked.question.name for asked in dns.trail] == ["_dmarc.example.co.uk"]
    assert zone().run(list_search("co.uk", DmarcRecords())) == Walk("co.uk", {})
    lookup = list_search("example.org", DmarcRecords())
    next(lookup)
    with pytest.raises(StopIteration) as done:
        lookup.send([OUT_OF_TIME])
    assert done.value.value == Walk("", {}, "example.org", OUT_OF_TIME)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b.co.uk", "b.co.uk"),
        ("co.uk", None),
        ("x.y.unknown", "y.unknown"),
        ("", None),
        ("a" * 300, None),
        ("a." * 121 + "example.org", "example.org"),
        # RFC 1035 2.3.4: a name of 254 octets in dots and labels is too long
        ("aa." + "a." * 120 + "example.org", None),
    ],
)
def test_registrable(name: str, expected: str | None) -> None:
    assert registrable(name) == expected


@given(st.text(st.sampled_from("ab.-_*!ü"), max_size=20))
def test_registrable_of_any_text_is_a_part_of_it(text: str) -> None:
    found = registrable(text)
    assert found is None or text.rstrip(".").endswith(found)
