"""Lists of domains: a name is on the list itself, or by a parent that begins with a dot."""

from __future__ import annotations

import pytest

from gateway.smtp.address import AddressError, Domain
from policies.verify.domain_list import DomainList


@pytest.mark.parametrize(
    ("entry", "domain"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.org", "example.org"),
        (".example.org", "a.example.org"),
        (".example.org", "c.b.a.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
    ],
)
def test_holds_what_an_entry_names(entry: str, domain: str) -> None:
    assert Domain.parse(domain) in DomainList(["other.example", entry])


@pytest.mark.parametrize(
    ("entry", "domain"),
    [
        ("example.org", "a.example.org"),
        ("example.org", "badexample.org"),
        (".example.org", "example.org"),
        (".example.org", "badexample.org"),
        ("a.example.org", "example.org"),
    ],
)
def test_holds_nothing_else(entry: str, domain: str) -> None:
    assert Domain.parse(domain) not in DomainList([entry])


def test_is_false_when_empty() -> None:
    assert not DomainList([])
    assert DomainList([".example.org"])


@pytest.mark.parametrize("entry", ["", ".", "..example.org", "*.example.org", "example.org.", "a b"])
def test_refuses_what_is_no_domain(entry: str) -> None:
    with pytest.raises(AddressError):
        DomainList([entry])
