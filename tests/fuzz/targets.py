"""What `./dev fuzz --atheris` gives octets to: one target for each parser of what strangers send.

A target returns, whatever it is given: it lets pass the error that its parser documents and no other, so that what
comes out of it is a finding. Its seeds are texts as honest people write them; the search begins with those.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import dns.message

from gateway.mail import authres
from gateway.mail.author import AuthorError, author_domain, authors
from gateway.mail.message import Header
from gateway.smtp.address import AddressError, Domain, parse_forward_path, parse_reverse_path
from gateway.smtp.command import CommandError, Extension, parse_command
from gateway.smtp.proxy_protocol import ProxyHeaderError, read_header
from gateway.smtp.sasl import Challenge, Exchange, Mechanism, SaslError, prepared
from policies.verify.arc.sets import ChainError, read_sets
from policies.verify.arc.trust import claims
from policies.verify.dkim.signature import parse_signatures
from policies.verify.dmarc import record as dmarc
from policies.verify.keys import parse_key
from policies.verify.spf import record as spf
from policies.verify.tags import TagError, parse_tags, without_tag
from tests.adapters.fake_nameserver import reply_to
from tests.fuzz import machines

OWN_IDS = authres.own_ids("mx.example.org", "mx.bücher.example")
AUTHOR = Domain("example.org")
OFFERED = frozenset(Extension)


CORPUS = Path(__file__).parent / "corpus"


def kept(name: str) -> list[bytes]:
    """What earlier searches have learnt about a target: octets that reach code which others do not, one a line."""
    lines = (CORPUS / f"{name}.txt").read_text("ascii").splitlines()
    return [ast.literal_eval(line) for line in lines]


class Target(NamedTuple):
    """A function that takes any octets, and what to begin with."""

    function: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def address(octets: bytes) -> None:
    text = octets.decode("utf-8", "surrogateescape")
    for smtputf8 in (False, True):
        for parse in (parse_forward_path, parse_reverse_path):
            with suppress(AddressError):
                parse(text, smtputf8=smtputf8)


def arc(octets: bytes) -> None:
    for utf8 in (False, True):
        with suppress(ChainError):
            for each in read_sets(Header(octets, len(octets)), utf8=utf8):
                claims(each.results, AUTHOR)


def author(octets: bytes) -> None:
    field = b"From:%b\r\n" % octets
    domain = None
    with suppress(AuthorError):
        domain = author_domain(Header(field, len(field)))
    with suppress(AuthorError):
        found = {each.domain for each in authors(Header(field, len(field)))}
        # both read a field alike
        assert domain is None or found == {domain}


def authentication_results(octets: bytes) -> None:
    authres.parse(octets)
    authres.is_ours(octets, OWN_IDS)
    claims(octets, AUTHOR)


def command(octets: bytes) -> None:
    for smtputf8 in (False, True):
        with suppress(CommandError):
            parse_command(octets, OFFERED, smtputf8)


def dkim_signature(octets: bytes) -> None:
    field = b"DKIM-Signature:%b\r\n" % octets
    for is_internationalized in (False, True):
        parse_signatures(
            Header(field, len(field)), now=1_700_000_000, most=10, is_internationalized=is_internationalized
        )


def dmarc_record(octets: bytes) -> None:
    dmarc.parse_record(octets)
    str(dmarc.parse_record(b"v=DMARC1;" + octets))


def proxy_header(octets: bytes) -> None:
    with suppress(ProxyHeaderError):
        read_header(octets)


def sasl(octets: bytes) -> None:
    for mechanism in Mechanism:
        with suppress(SaslError):
            exchange = Exchange(mechanism)
            step = exchange.begin(octets)
            while isinstance(step, Challenge):
                step = exchange.respond(octets)
            assert not step.user or prepared(step.user) == step.user


def spf_record(octets: bytes) -> None:
    with suppress(spf.RecordError):
        spf.parse_record(b"v=spf1 " + octets)


def tags(octets: bytes) -> None:
    without_tag(octets, b"b")
    for utf8 in (False, True):
        with suppress(TagError):
            parse_tags(octets, utf8=utf8)


SIGNATURE = b" v=1; a=rsa-sha256; c=relaxed/simple; d=example.org;\r\n\ts=s1; i=@a.example.org; t=1690000000;"
SET = (
    b"ARC-Seal: i=1; a=rsa-sha256; cv=none; d=example.org; s=s1; b=AAAA\r\n"
    b"ARC-Message-Signature: i=1; a=rsa-sha256; d=example.org; s=s1; h=from; bh=AAAA; b=AAAA\r\n"
    b"ARC-Authentication-Results: i=1; mx.example.org; dmarc=pass header.from=example.org\r\n"
)
# The octets in front of what a machine is fed say where it is cut.
CUT = bytes([1, 30, 80, 200])
SESSION = (
    b"EHLO c.example\r\nMAIL FROM:<a@example.org> SIZE=100\r\nRCPT TO:<b@example.org>\r\n"
    b"RCPT TO:<unknown@example.org>\r\nDATA\r\n"
)
CONTENT = b"Subject: x\r\n y\r\n\r\n..a\r\n.\r\n"
PACKET = reply_to(
    dns.message.make_query("a.example.org", "TXT", use_edns=0),
    "a.example.org. 60 IN CNAME b.example.org.",
    'b.example.org. 60 IN TXT "v=spf1" " -all"',
    "a.example.org. 60 IN MX 10 b.example.org.",
    "a.example.org. 60 IN AAAA ::ffff:192.0.2.1",
).to_wire()
PROXY_V2 = bytes.fromhex("0d0a0d0a000d0a515549540a2111000cc0000201c00002020400 0019")

TARGETS = {
    "address": Target(
        address, (b"<a@example.org>", b'<"a b"@[IPv6:2001:db8::1]>', "<ü@bücher.example>".encode())
    ),
    "arc": Target(arc, (SET,)),
    "author": Target(
        author,
        (
            b' "A, B" (c) <a.b@example.org>, a@example.org',
            b" =?utf-8?q?x?= <a@example.org>",
            b"\r\n a@[192.0.2.1]",
        ),
    ),
    "authres": Target(
        authentication_results,
        (
            b' mx.example.org 1; spf=pass (ok) reason="a \\" b" smtp.mailfrom=a@example.org;\r\n\tdkim=none',
            b" (a (b)) mx.example.org; none",
            " mx.bücher.example; dmarc/1=fail header.from = example.org".encode(),
        ),
    ),
    "bdat": Target(machines.bdat, (CUT + CONTENT, CUT + b"a\r\n.\r\nb")),
    "command": Target(
        command,
        (
            b"EHLO mx.example.org",
            b"MAIL FROM:<a@example.org> SIZE=1000 BODY=8BITMIME SMTPUTF8",
            b"RCPT TO:<a@example.org> NOTIFY=NEVER ORCPT=rfc822;a@example.org",
            b"BDAT 100 LAST",
        ),
    ),
    "data": Target(machines.data, (CUT + CONTENT, CUT + b"a\n.\nb\r\n.\r\nNOOP\r\n", CUT + b".\r\nQUIT\r\n")),
    "dkim": Target(
        dkim_signature, (SIGNATURE + b" h=from:to; bh=AAAA; l=3; x=1800000000; z=From:a|To:=20b; b=AAAA",)
    ),
    "dmarc": Target(
        dmarc_record,
        (b" p=reject; sp=none; np=quarantine; adkim=s; psd=y; t=y; rua=mailto:a@example.org!10m",),
    ),
    "dns": Target(machines.dns_packet, (PACKET,)),
    "header": Target(
        machines.header,
        (
            CUT + b"From: a@example.org\r\nSubject : x\r\n\ty\r\nno field\r\n..x: y\r\n\r\nbody",
            CUT + b"\r\nbody\r\n",
        ),
    ),
    "key": Target(
        parse_key,
        (
            b"v=DKIM1; h=sha256; s=email; t=y:s; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
            b"v=DKIM1; p=MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAAAA",
        ),
    ),
    "proxy": Target(
        proxy_header, (b"PROXY TCP6 2001:db8::1 2001:db8::2 1024 25\r\n", b"PROXY UNKNOWN\r\n", PROXY_V2)
    ),
    "replies": Target(
        machines.replies,
        (
            CUT
            + b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n550-5.1.1 No\r\n550 5.1.1 user\r\n354 Go\r\n250 2.0.0 Stored\r\n",
            CUT + b"250-mx.example.org\r\n250-SIZE 100\r\n250-LIMITS RCPTMAX=5\n250 XCLIENT NAME ADDR\r\n",
            CUT + b"250 a\r\n250 b\r\n250 c\r\n354 d\r\n421 4.3.2 Bye\r\n",
        ),
    ),
    "server": Target(
        machines.server,
        (
            CUT + SESSION + CONTENT + b"QUIT\r\n",
            CUT
            + b"HELO c\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 4\r\na\r\nbBDAT 3 LAST\r\nc\r\nNOOP\r\n",
            CUT + b"EHLO c\r\nSTARTTLS\r\nEHLO c\r\nVRFY x\r\nRSET\r\n",
        ),
    ),
    "sasl": Target(sasl, (b"AGFubgBzZWNyZXQ=", b"YW5uAGFubgBzZWNyZXQ=", b"=", b"*", b"w7xhAMO8AMO8")),
    "spf": Target(
        spf_record,
        (
            b"ip4:192.0.2.0/24 ip6:2001:db8::/32 a:example.org/24//64 mx -all",
            b"exists:%{i}._spf.%{d2r.-} ptr ?include:example.org redirect=example.org exp=x.%{l}%%%_%-.example.org",
        ),
    ),
    "tags": Target(tags, (SIGNATURE, "a_1=ü ; b=\r\n x".encode())),
}
