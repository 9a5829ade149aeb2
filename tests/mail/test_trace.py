"""trace: our Received field has RFC 5321 4.4's syntax whatever the client said."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mail.trace import received
from gateway.session import Envelope, Recipient, Session, TlsInfo, Transaction
from gateway.smtp.address import parse_forward_path

NOW = 1_700_000_000.9
TLS = TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384")
RCPT = Recipient(parse_forward_path("<b@example.org>", smtputf8=False))

# RFC 5321 4.4 with the blanks and folds that we write; addr: RFC 5321 4.1.3
_DOMAIN = r"[A-Za-z0-9.:_\[\]?-]+"
_RECEIVED = re.compile(
    rf"Received: from (?P<helo>{_DOMAIN}) \(\[(?P<client>IPv6:[0-9a-f:.]+|[0-9.]+)\]\)\r\n"
    rf"\tby (?P<by>{_DOMAIN}) with (?P<protocol>[A-Z0-9]+) id (?P<id>[A-Za-z0-9-]+)"
    r"(?:\r\n\t\((?P<tls>[\w.]+ [\w.-]+)\))?"
    r"(?:\r\n\tfor <(?P<for>[^\r\n]+)>)?;"
    r"\r\n\t(?P<date>\w{3}, \d{2} \w{3} \d{4} \d\d:\d\d:\d\d \+0000)\r\n"
)


def transaction(
    *,
    helo: str = "client.example",
    client: str = "192.0.2.1",
    esmtp: bool = True,
    tls: TlsInfo | None = None,
    smtputf8: bool = False,
    rcpts: tuple[Recipient, ...] = (RCPT,),
) -> Transaction:
    session = Session("S", ip_address(client), 1234, helo, esmtp, tls)
    return Transaction("S-1", session, Envelope(None, rcpts, smtputf8=smtputf8))


def parsed(tx: Transaction) -> dict[str, str | None]:
    field = received(tx, "mx.example.org", NOW).decode()
    match = _RECEIVED.fullmatch(field)
    assert match, field
    return match.groupdict()


def test_says_who_gave_the_message_to_whom_how_and_when() -> None:
    field = received(transaction(tls=TLS), "mx.example.org", NOW)

    assert field.decode() == (
        "Received: from client.example ([192.0.2.1])\r\n"
        "\tby mx.example.org with ESMTPS id S-1\r\n"
        "\t(TLSv1.3 TLS_AES_256_GCM_SHA384)\r\n"
        "\tfor <b@example.org>;\r\n"
        "\tTue, 14 Nov 2023 22:13:20 +0000\r\n"
    )
    assert parsedate_to_datetime(field.decode().rpartition("\t")[2]).timestamp() == int(NOW)


@pytest.mark.parametrize(
    ("esmtp", "tls", "smtputf8", "protocol"),
    [
        (False, None, False, "SMTP"),
        (True, None, False, "ESMTP"),
        (True, TLS, False, "ESMTPS"),
        (True, None, True, "UTF8SMTP"),
        (True, TLS, True, "UTF8SMTPS"),
    ],
)
def test_protocol_is_a_registered_word(
    esmtp: bool, tls: TlsInfo | None, smtputf8: bool, protocol: str
) -> None:
    assert parsed(transaction(esmtp=esmtp, tls=tls, smtputf8=smtputf8))["protocol"] == protocol


def test_names_the_recipient_only_when_there_is_one() -> None:
    other = Recipient(parse_forward_path("<c@example.org>", smtputf8=False))

    assert parsed(transaction())["for"] == "b@example.org"
    assert parsed(transaction(rcpts=(RCPT, other)))["for"] is None
    assert parsed(transaction(rcpts=()))["for"] is None


def test_recipient_outside_ascii_stands_as_it_is() -> None:
    rcpt = Recipient(parse_forward_path("<bücher@bücher.example>", smtputf8=True))

    assert parsed(transaction(rcpts=(rcpt,), smtputf8=True))["for"] == "bücher@xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("client", "literal"), [("192.0.2.1", "192.0.2.1"), ("2001:db8::1", "IPv6:2001:db8::1")]
)
def test_client_is_an_address_literal(client: str, literal: str) -> None:
    assert parsed(transaction(client=client))["client"] == literal


@given(st.text(min_size=1) | st.text('\r\n\t ();,:<>@[]a.\\"=\0\x1b', min_size=1))
def test_helo_cannot_leave_its_place(helo: str) -> None:
    assert len(str(parsed(transaction(helo=helo))["helo"])) == len(helo)


@pytest.mark.parametrize(
    "helo", ["[192.0.2.7]", "[IPv6:2001:db8::7]", "mail_1.example", "xn--bcher-kva.example"]
)
def test_helo_that_is_a_domain_or_a_literal_is_kept(helo: str) -> None:
    assert parsed(transaction(helo=helo))["helo"] == helo


@given(st.from_regex(r'"([ -!#-\[\]-~]|\\[ -~]){0,31}"', fullmatch=True))
def test_a_quoted_recipient_cannot_leave_its_brackets(local: str) -> None:
    rcpt = Recipient(parse_forward_path(f"<{local}@example.org>", smtputf8=False))

    assert parsed(transaction(rcpts=(rcpt,)))["for"] == f"{local}@example.org"
