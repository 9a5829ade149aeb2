"""The attacks of espoofer (Chen, Paxson, Jiang: "Composition Kills", USENIX Security 2020, A1 to A19) on our gateway.

They are written anew here, for our zones: bank.example.net has an SPF record that ends in -all, and p=reject;
attacker.example.com has all that an honest domain has, keys too. A mail in which somebody sees the bank is refused, or
delivered without a pass.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway.testing.mail import SigningKey, rsa_key
from tests.dkimkit import sign
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import HOSTNAME, Gateway, StartGateway
from tests.nameserver import Unbound

pytestmark = [pytest.mark.e2e, pytest.mark.full]

BANK, ATTACKER = "bank.example.net", "attacker.example.com"
KEY = rsa_key(ATTACKER, "selector")
# Chunks, as a TXT record holds strings of at most 255 octets
PUBLISHED = " ".join(f'"{KEY.record[at : at + 200]}"' for at in range(0, len(KEY.record), 200))
RECORDS = f"""
{BANK}. 300 IN TXT "v=spf1 ip4:192.0.2.1 -all"
{BANK}. 300 IN MX 10 {BANK}.
_dmarc.{BANK}. 300 IN TXT "v=DMARC1; p=reject"
{ATTACKER}. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
{ATTACKER}. 300 IN MX 10 {ATTACKER}.
_dmarc.{ATTACKER}. 300 IN TXT "v=DMARC1; p=none"
33.{ATTACKER}. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
any.{ATTACKER}. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
helo.{ATTACKER}. 300 IN TXT "v=spf1 ip4:127.0.0.0/8 -all"
selector._domainkey.{ATTACKER}. 300 IN TXT {PUBLISHED}
"""


class Attack(NamedTuple):
    """`signature` are tags that differ from an honest signature of the attacker's; None is no signature."""

    author: str
    mail_from: str = f"<any@{ATTACKER}>"
    helo: str = ATTACKER
    more: str = ""
    signature: dict[str, str | None] | None = None


def encoded(text: str) -> str:
    return f"=?utf-8?B?{b64encode(text.encode()).decode()}?="


SPOOFED = f"From: <admin@{BANK}>"
FIRST = f"From: <first@{ATTACKER}>"
ATTACKS = {
    "A1-no-such-subdomain": Attack(SPOOFED, f"<any@mailfrom.notexist.{BANK}>", f"helo.{ATTACKER}"),
    "A2-empty-mail-from": Attack(SPOOFED, f"<(any@{BANK}>"),
    "A2-null-with-helo": Attack(SPOOFED, "<>"),
    "A3-nul-in-selector": Attack(
        SPOOFED, f"<any@33.{ATTACKER}>", signature={"d": BANK, "s": f"selector._domainkey.{ATTACKER}.\0.any"}
    ),
    "A3-nul-in-domain": Attack(SPOOFED, signature={"d": f"{ATTACKER}\0.{BANK}"}),
    "A4-quote-in-domain": Attack(SPOOFED, signature={"d": f"{BANK}'a.{ATTACKER}"}),
    "A4-double-quote-in-domain": Attack(SPOOFED, signature={"d": f'{BANK}"a.{ATTACKER}'}),
    "A4-paren-in-domain": Attack(SPOOFED, signature={"d": f"{BANK}(.{ATTACKER}"}),
    "A5-paren-in-mail-from": Attack(SPOOFED, f"<any@{BANK}(a.{ATTACKER}>"),
    "A6-quote-in-mail-from": Attack(SPOOFED, f"<any@{BANK}'@any.{ATTACKER}>"),
    "A6-quoted-local-part": Attack(SPOOFED, f'<"any@{BANK}; dmarc=pass "@{ATTACKER}>'),
    "A7-route": Attack(SPOOFED, f"<@{BANK},@any.example:'any@{ATTACKER}>"),
    "A7-sound-route": Attack(SPOOFED, f"<@{BANK}:any@{ATTACKER}>"),
    "A8-two-from": Attack(f"{FIRST}\r\n{SPOOFED}", signature={}),
    "A8-two-from-turned": Attack(f"{SPOOFED}\r\n{FIRST}", signature={}),
    "A9-blank-before": Attack(f" {FIRST}\r\n{SPOOFED}"),
    "A9-blank-before-below": Attack(f"{FIRST}\r\n {SPOOFED}"),
    "A10-blank-behind": Attack(f"{FIRST}\r\nFrom : <admin@{BANK}>", signature={}),
    "A10-tab-behind": Attack(f"{FIRST}\r\nFrom\t: <admin@{BANK}>"),
    "A11-folded-name": Attack(f"From\r\n : <first@{ATTACKER}>\r\n{SPOOFED}"),
    "A11-folded-name-below": Attack(f"{FIRST}\r\nFrom\r\n : <admin@{BANK}>"),
    "A12-sender": Attack(f"From\r\n : <first@{ATTACKER}>\r\nn", more=f"Sender: <admin@{BANK}>\r\n"),
    "A13-resent-from": Attack(f"From\r\n : <first@{ATTACKER}>\r\nn", more=f"Resent-From: <admin@{BANK}>\r\n"),
    "A14-two-addresses": Attack(
        f"From: <first@{ATTACKER}>, <admin@{BANK}>", more=f"Sender: <s@{ATTACKER}>\r\n"
    ),
    "A14-two-addresses-turned": Attack(f"From: <admin@{BANK}>, <first@{ATTACKER}>", signature={}),
    "A15-encoded-address": Attack(f"From:{encoded(f'<admin@{BANK}>')},<second@{ATTACKER}>"),
    "A16-route-portion": Attack(f"From: <@{ATTACKER},@any.example:admin@{BANK}>"),
    "A17-quoted-pair": Attack(f"From: <admin@{BANK}>\\,<second@{ATTACKER}>"),
    "A18-special-characters": Attack(f"From: admin@{BANK},<second@{ATTACKER}>"),
    "A19-text-behind": Attack(f"From: <any@{ATTACKER}>admin@{BANK}", signature={}),
    "A19-text-behind-turned": Attack(f"From: <admin@{BANK}><any@{ATTACKER}>"),
}


@pytest.fixture
def gateway(
    sink: Downstream, start_gateway: StartGateway, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Gateway]:
    """`request.param` is what becomes of a From field that DMARC cannot use."""
    server = Unbound(RECORDS, tmp_path)
    settings = {"on_bad_from": request.param} if request.param else {}
    yield start_gateway(
        sink.address,
        {
            "dns": {"nameservers": [f"{server.address[0]}:{server.address[1]}"]},
            "policy": {"dmarc": {"mode": "enforce", "settings": {**settings}}},
        },
    )
    server.close()


def message(attack: Attack) -> bytes:
    content = (
        f"{attack.author}\r\nTo: <victim@example.org>\r\nSubject: attack\r\n"
        f"Date: Sun, 22 Nov 2026 12:00:00 +0000\r\nMessage-ID: <1@{ATTACKER}>\r\n{attack.more}\r\nHi!\r\n"
    ).encode()
    if attack.signature is None:
        return content
    return sign(content, SigningKey(KEY.domain, KEY.selector), attack.signature)


def submit(gateway: Gateway, attack: Attack, content: bytes) -> int:
    """The code of the refusal, or of the final reply."""
    with gateway.connect() as client:
        client.read_reply()
        client.command(f"EHLO {attack.helo}")
        client.send(f"MAIL FROM:{attack.mail_from}\r\n".encode())
        reply = client.read_reply()
        if reply.code == 250:
            reply = client.command("RCPT TO:<victim@example.org>")
        return client.data(content).code if reply.code == 250 else reply.code


def spoof_passed(delivered: bytes) -> bool:
    """Whether our own verdict says that a mail passed in which somebody sees the bank as its author."""
    head = delivered.partition(b"\r\n\r\n")[0].decode("latin-1")
    own = re.match(rf"Authentication-Results: {re.escape(HOSTNAME)};([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)", head)
    assert own, "a mail without our verdict"
    if "dmarc=pass" not in own[1]:
        return False
    judged = re.search(r"header\.from=(\S+?);?(?:\s|$)", own[1])
    # what a lenient reader may show: any field that looks like From
    shown = re.findall(r"(?im)^[ \t]*From[ \t]*(?:\r\n[ \t]+)?:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*", head)
    return judged is None or judged[1] != ATTACKER or any(BANK in each for each in shown) or BANK in own[1]


@pytest.mark.parametrize("gateway", ["", "mark"], indirect=True)
def test_no_spoof_of_a_domain_with_p_reject_is_delivered_as_pass(gateway: Gateway, sink: Downstream) -> None:
    # the attacker's own mail passes: what follows is no accident of a resolver that is away
    honest = Attack(FIRST, signature={})
    assert submit(gateway, honest, message(honest)) == 250
    own = sink.messages[-1].content
    assert b"dmarc=pass" in own
    assert b"dkim=pass" in own
    assert b"spf=pass" in own
    wrong = []
    for name, attack in ATTACKS.items():
        before = len(sink.messages)
        code = submit(gateway, attack, message(attack))
        assert 400 <= code < 600 or code == 250, (name, code)
        delivered = sink.messages[before:]
        assert len(delivered) == (code == 250), name
        wrong += [name for each in delivered if spoof_passed(each.content)]
    assert wrong == []


@pytest.mark.parametrize(
    ("results", "author", "passed"),
    [
        ("dmarc=pass header.from=bank.example.net", SPOOFED, True),
        ("dmarc=pass header.from=attacker.example.com", f"{FIRST}\r\nFrom : <admin@{BANK}>", True),
        ("dmarc=pass header.from=attacker.example.com", FIRST, False),
        ("dmarc=fail header.from=bank.example.net", SPOOFED, False),
    ],
)
def test_a_spoof_that_passed_would_be_seen(results: str, author: str, passed: bool) -> None:
    text = f"Authentication-Results: {HOSTNAME};\r\n\t{results}\r\n{author}\r\n\r\nHi!\r\n"
    assert spoof_passed(text.encode()) == passed
