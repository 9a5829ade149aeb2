"""Mail as operators meet it, with the DNS that it lives in: what each message is, and what a gateway says of it.

`records()` are lines of a master file for a name server; `SCENARIOS` makes the messages, for recipients of example.org.
All clients have addresses of the loopback network, so that a real gateway can be sent the same. Domains:

    author.example    p=reject; sends from 127.0.0.2 and signs
    weak.example      p=quarantine; sends from 127.0.0.3 and signs
    plain.example     no DMARC; sends from 127.0.0.4 and signs
    list.example      a mailing list at 127.0.0.5 that changes subjects and seals
    forwarder.example a forwarder at 127.0.0.6 that keeps the reverse-path
    evil.example      has everything right, and 127.0.0.7
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.mailkit import compose, dkim_sign, rsa_key, seal, txt_line, zone_text

AUTHOR = rsa_key("author.example")
WEAK = rsa_key("weak.example", number=1)
PLAIN = rsa_key("plain.example", number=2)
LIST = rsa_key("list.example", number=3)
EVIL = rsa_key("evil.example", number=4)

TRUSTED_SEALERS = ("list.example",)
"""What [policy.arc.settings] trusted_sealers has to be."""


@dataclass(frozen=True)
class Scenario:
    """One message on its way, and what is to be said of it: result words by method, and how the reply begins."""

    client: str
    mail_from: str
    content: bytes
    results: Mapping[str, str]
    reply: str = "250"
    is_quarantined: bool = False


def records() -> str:
    """The DNS of all domains, one record a line."""
    addresses = {"author": 2, "weak": 3, "plain": 4, "list": 5, "forwarder": 6, "evil": 7}
    spf = [txt_line(f"{name}.example", f"v=spf1 ip4:127.0.0.{n} -all") for name, n in addresses.items()]
    dmarc = [
        txt_line("_dmarc.author.example", "v=DMARC1; p=reject"),
        txt_line("_dmarc.weak.example", "v=DMARC1; p=quarantine"),
        txt_line("_dmarc.list.example", "v=DMARC1; p=none"),
        txt_line("_dmarc.evil.example", "v=DMARC1; p=none"),
    ]
    return "".join([*spf, *dmarc, zone_text(AUTHOR, WEAK, PLAIN, LIST, EVIL)])


def genuine() -> Scenario:
    """Straight from the author."""
    return Scenario(
        "127.0.0.2",
        "ann@author.example",
        dkim_sign(compose(), AUTHOR),
        {"spf": "pass", "dkim": "pass", "arc": "none", "dmarc": "pass"},
    )


def forwarded() -> Scenario:
    """A forwarder keeps the reverse-path: SPF fails, the author's signature holds."""
    return Scenario(
        "127.0.0.6",
        "ann@author.example",
        b"X-Forwarded-To: bob@example.org\r\n" + dkim_sign(compose(), AUTHOR),
        {"spf": "fail", "dkim": "pass", "arc": "none", "dmarc": "pass"},
    )


def by_a_trusted_list() -> Scenario:
    """A list breaks the signature; the operator takes its word that the author was genuine. dmarc stays fail."""
    return Scenario(
        "127.0.0.5",
        "bounce@list.example",
        _through_the_list("mx.list.example; dmarc=pass header.from=author.example"),
        {"spf": "pass", "dkim": "fail", "arc": "pass", "dmarc": "fail"},
    )


def spoof_by_a_trusted_list() -> Scenario:
    """The same list says that the author was not genuine."""
    return Scenario(
        "127.0.0.5",
        "bounce@list.example",
        _through_the_list("mx.list.example; dmarc=fail header.from=author.example"),
        {"spf": "pass", "dkim": "fail", "arc": "pass", "dmarc": "fail"},
        "550 5.7.1",
    )


def spoof_by_a_forged_chain() -> Scenario:
    """A forger vouches for himself, in a chain without a fault."""
    content = seal(compose(), EVIL, "mx.list.example; dmarc=pass header.from=author.example")
    return Scenario(
        "127.0.0.7",
        "bounce@evil.example",
        content,
        {"spf": "pass", "dkim": "none", "arc": "pass", "dmarc": "fail"},
        "550 5.7.1",
    )


def spoof_of_reject() -> Scenario:
    """From anywhere, unsigned, in the name of a domain with p=reject."""
    return Scenario(
        "127.0.0.7",
        "ann@author.example",
        compose(),
        {"spf": "fail", "dkim": "none", "arc": "none", "dmarc": "fail"},
        "550 5.7.1",
    )


def spoof_of_quarantine() -> Scenario:
    """The same of a domain with p=quarantine."""
    return Scenario(
        "127.0.0.7",
        "ann@weak.example",
        compose("ann@weak.example"),
        {"spf": "fail", "dkim": "none", "arc": "none", "dmarc": "fail"},
        is_quarantined=True,
    )


def unaligned_pass() -> Scenario:
    """SPF and DKIM pass, for the forger's own domain."""
    return Scenario(
        "127.0.0.7",
        "bounce@evil.example",
        dkim_sign(compose(), EVIL),
        {"spf": "pass", "dkim": "pass", "arc": "none", "dmarc": "fail"},
        "550 5.7.1",
    )


def without_dmarc() -> Scenario:
    """A domain that has no DMARC policy."""
    return Scenario(
        "127.0.0.4",
        "ann@plain.example",
        dkim_sign(compose("ann@plain.example"), PLAIN),
        {"spf": "pass", "dkim": "pass", "arc": "none", "dmarc": "none"},
    )


SCENARIOS: Mapping[str, Callable[[], Scenario]] = {
    make.__name__: make
    for make in (
        genuine,
        forwarded,
        by_a_trusted_list,
        spoof_by_a_trusted_list,
        spoof_by_a_forged_chain,
        spoof_of_reject,
        spoof_of_quarantine,
        unaligned_pass,
        without_dmarc,
    )
}


def during_an_outage(scenario: Scenario) -> Scenario:
    """What is to be said of a message while no name server answers: it is taken, with temperror for what was asked."""
    asked = {
        method: "none" if word == "none" and method != "dmarc" else "temperror"
        for method, word in scenario.results.items()
    }
    return Scenario(scenario.client, scenario.mail_from, scenario.content, asked)


def _through_the_list(results: str) -> bytes:
    """A signed message after the list has marked its subject and sealed it."""
    changed = dkim_sign(compose(), AUTHOR).replace(b"Subject: Hello", b"Subject: [list] Hello")
    return seal(changed, LIST, results)
