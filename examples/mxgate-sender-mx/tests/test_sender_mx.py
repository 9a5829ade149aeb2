"""sender_mx: what DNS says of the sender's domain, and what is made of it."""

from __future__ import annotations

import pytest
from mxgate_sender_mx import NO_ANSWER_POSSIBLE, SenderMx, SenderMxSettings, takes_mail

from gateway.testing import Harness, PolicyContract, Zone

ZONE = """
mx.example.      60 IN MX 10 mail.mx.example.
address.example. 60 IN AAAA 2001:db8::1
null.example.    60 IN MX 0 .
txt.example.     60 IN TXT "no mail"
"""


class TestContract(PolicyContract):
    policy = SenderMx
    settings = SenderMxSettings(refuse=True)
    zone = "author.example. 60 IN MX 10 mail.author.example."


@pytest.mark.parametrize(
    ("domain", "found"),
    [("mx", "yes"), ("address", "yes"), ("null", "no"), ("txt", "no"), ("none", "no"), ("broken", "unknown")],
)
def test_a_domain_takes_mail_or_it_does_not(domain: str, found: str) -> None:
    zone = Zone.parse(ZONE)
    zone.nodes["broken.example"] = {"*": "servfail"}
    assert zone.run(takes_mail(f"{domain}.example")) == found
    for refuse in (False, True):
        with Harness(SenderMx, SenderMxSettings(refuse), zone=zone) as harness:
            played = harness.deliver(mail_from=f"ann@{domain}.example")
        if found == "no" and refuse:
            assert played.reply == NO_ANSWER_POSSIBLE
        else:
            assert played.message is not None
            assert f"\r\nX-Sender-Mx: {found}\r\n".encode() in played.message


@pytest.mark.parametrize("mail_from", ["", "ann@[192.0.2.1]"])
def test_without_a_domain_nothing_is_said(mail_from: str) -> None:
    with Harness(SenderMx, SenderMxSettings(refuse=True)) as harness:
        played = harness.deliver(mail_from=mail_from)
        assert harness.zone.trail == []
    assert played.message is not None
    assert b"X-Sender-Mx" not in played.message
