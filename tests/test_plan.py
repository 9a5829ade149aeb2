"""plan: which policies are run for whom; the order of them is in test_pipeline.py."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from gateway.plan import Override, Step, closest_pattern
from gateway.policy import Mode, OnError
from gateway.session import Session, Trust
from gateway.smtp.address import AddressLiteral, Domain
from tests.fakes import Says

PATTERNS = ("example.org", ".example.org", ".org", "*")


@pytest.mark.parametrize(
    ("domain", "patterns", "pattern"),
    [
        (Domain("example.org"), PATTERNS, "example.org"),
        (Domain("a.example.org"), PATTERNS, ".example.org"),
        (Domain("b.a.example.org"), PATTERNS, ".example.org"),
        (Domain("example.net.org"), PATTERNS, ".org"),
        (Domain("example.net"), PATTERNS, "*"),
        (Domain("example.org"), (".example.org",), None),
        (Domain("notexample.org"), (".example.org", "example.org"), None),
        (Domain("org"), (".org",), None),
        (AddressLiteral.parse("[192.0.2.1]"), PATTERNS, "*"),
        (None, PATTERNS, "*"),
        (None, ("example.org",), None),
        (".a.example.org", PATTERNS, ".example.org"),
        (".example.org", PATTERNS, ".example.org"),
        ("*", PATTERNS, "*"),
        ("*", ("example.org",), None),
    ],
)
def test_the_closest_pattern_decides(
    domain: Domain | AddressLiteral | None, patterns: tuple[str, ...], pattern: str | None
) -> None:
    assert closest_pattern(domain, patterns) == pattern


def test_a_step_is_another_one_for_the_domains_of_its_overrides() -> None:
    base, other = Says(), Says()
    step = Step(
        base,
        3,
        OnError.DEFER,
        overrides=(Override("example.org", Mode.OBSERVE), Override(".example.org", Mode.ENFORCE, other)),
    )

    assert step.at("example.org") == Step(base, 3, OnError.DEFER, Mode.OBSERVE)
    assert step.at(".example.org") == step.at(".a.example.org") == Step(other, 3, OnError.DEFER)
    assert step.at("example.net") == Step(base, 3, OnError.DEFER)


@pytest.mark.parametrize(
    ("client", "trust", "is_exempt"),
    [
        ("192.0.2.1", Trust.UNTRUSTED, True),
        ("2001:db8::1", Trust.UNTRUSTED, True),
        ("198.51.100.1", Trust.UNTRUSTED, False),
        ("198.51.100.1", Trust.AUTHENTICATED, True),
        ("198.51.100.1", Trust.TRUSTED, False),
    ],
)
def test_clients_are_exempt_by_address_or_by_trust(client: str, trust: Trust, is_exempt: bool) -> None:
    exempt = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"), Trust.AUTHENTICATED)
    step = Step(Says(), 3, OnError.DEFER, exempt=exempt)

    assert step.exempts(Session("S", ip_address(client), 1, trust=trust)) is is_exempt


def test_nobody_is_exempt_unless_somebody_says_so() -> None:
    session = Session("S", ip_address("192.0.2.1"), 1, trust=Trust.TRUSTED)
    assert not Step(Says(), 3, OnError.DEFER).exempts(session)
