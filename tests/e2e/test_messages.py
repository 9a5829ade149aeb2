"""Kinds of messages and envelopes, stored by Postfix as they were sent."""

from __future__ import annotations

import email.message
import email.policy
import smtplib
from collections.abc import Callable

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway
from tests.e2e.postfix import Postfix, behind_our_fields

pytestmark = [pytest.mark.e2e, pytest.mark.full]

SENDER = "sender@client.example.net"
HEADER = b"From: <sender@client.example.net>\r\nSubject: test\r\n\r\n"
MEBIBYTE = 1 << 20

CONTENTS = {
    "plain": HEADER + b"Hello\r\n",
    "empty-body": HEADER,
    "body-of-1-byte": b"\r\nx\r\n",
    "dots": HEADER + b".\r\n..\r\n...\r\n.x\r\n\r\n.\r\n",
    "line-of-998-octets": HEADER + b"x" * 998 + b"\r\n",
    "line-of-8000-octets": HEADER + b"x" * 8000 + b"\r\nend\r\n",
    "line-of-dots": HEADER + b"." * 5000 + b"\r\n",
    "field-of-900-octets": b"X-Long: " + b"y" * 890 + b"\r\n" + HEADER + b"x\r\n",
    "blanks-and-tabs": HEADER + b" \r\n\t\r\n  x  \r\n\r\n\r\n",
    "8-bit-binary": HEADER + bytes(octet for octet in range(1, 256) if octet not in b"\r\n") + b"\r\n",
    "several-blocks": HEADER + (b"0123456789abcdef" * 4 + b"\r\n") * 5000 + b".line\r\n" * 30_000,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_stores_the_content_sent_with_data(name: str, gateway: Gateway, postfix: Postfix, rcpt: str) -> None:
    with gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENTS[name]).code == 250
    assert postfix.wait_content(rcpt) == CONTENTS[name]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1000], ids=["one-chunk", "many-chunks"])
def test_stores_the_content_sent_with_bdat(
    name: str, chunk_bytes: int, gateway: Gateway, postfix: Postfix, rcpt: str
) -> None:
    content = CONTENTS[name]
    with gateway.connect() as client:
        client.hello()
        assert [reply.code for reply in client.envelope(SENDER, [rcpt], "BODY=8BITMIME")] == [250, 250]
        for begin in range(0, len(content), chunk_bytes):
            end = begin + chunk_bytes
            assert client.bdat(content[begin:end], last=end >= len(content)).code == 250
    assert postfix.wait_content(rcpt) == content


# What Postfix would change itself: the sink shows that we do not.
ODD_CONTENTS = {
    "blank-before-colon": b"From : <sender@client.example.net>\r\nSUBJECT:x\r\n\r\nx\r\n",
    "no-header": b"x\r\n",
    "no-separator": b"Subject: x\r\nbody without an empty line\r\n",
    "field-of-blanks": b"Subject: x\r\n \r\n\t\r\nTo: a@example.org\r\n\r\nx\r\n",
    "8-bit-header": b"Subject: \xe9\xff\r\nX-\xfc: 1\r\n\r\n\x01\x7f\r\n",
    "mbox-line": b"From sender@client.example.net Sun Nov 22 05:00:00 2026\r\nSubject: x\r\n\r\nFrom x\r\n",
    "empty": b"",
}


@pytest.mark.parametrize("name", ODD_CONTENTS)
def test_changes_nothing_in_odd_content(
    name: str, sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    with sink_gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], ODD_CONTENTS[name]).code == 250
    assert behind_our_fields(sink.wait_for_message().content.replace(b"\r\n", b"\n")) == ODD_CONTENTS[name]


def test_adds_the_line_end_that_bdat_content_lacks(
    sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    with sink_gateway.connect() as client:
        client.hello()
        client.envelope(SENDER, [rcpt])
        # 1 octet, the smallest message that there is; DESIGN.md section 6 on BDAT
        assert client.bdat(b"x", last=True).code == 250
    assert behind_our_fields(sink.wait_for_message().content.replace(b"\r\n", b"\n")) == b"x\r\n"


def test_stores_8_bit_content(gateway: Gateway, postfix: Postfix, rcpt: str) -> None:
    content = HEADER + "Grüße, 世界\r\n".encode() + bytes(range(128, 256)) + b"\r\n"
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        assert client.sendmail(SENDER, [rcpt], content, mail_options=["BODY=8BITMIME"]) == {}
    assert postfix.wait_content(rcpt) == content


def test_stores_mail_for_an_internationalised_address(
    gateway: Gateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    rcpt = "grüße-" + new_rcpt()
    message = email.message.EmailMessage(policy=email.policy.SMTPUTF8)
    message["From"] = "Jürgen <jürgen@client.example.net>"
    message["To"] = rcpt
    message["Subject"] = "世界"
    message.set_content("Grüße\n", cte="8bit")
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        assert client.send_message(message, "jürgen@client.example.net", rcpt) == {}
    assert postfix.wait_content(rcpt) == message.as_bytes()


def test_stores_mail_for_an_internationalised_address_sent_with_bdat(
    gateway: Gateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    rcpt = "用户-" + new_rcpt()
    content = "Subject: 世界\r\n\r\n世界\r\n".encode()
    with gateway.connect() as client:
        client.hello()
        replies = client.envelope("jürgen@bücher.example.net", [rcpt], "BODY=8BITMIME SMTPUTF8")
        assert [reply.code for reply in replies] == [250, 250]
        assert client.bdat(content, last=True).code == 250
    assert postfix.wait_content(rcpt) == content


def test_takes_the_null_sender(gateway: Gateway, postfix: Postfix, rcpt: str) -> None:
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        assert client.sendmail("", [rcpt], CONTENTS["plain"]) == {}
    stored = postfix.wait_stored(rcpt)
    assert stored.startswith(b"Return-Path: <>\n")


def test_takes_mail_for_postmaster_without_a_domain(gateway: Gateway, postfix: Postfix) -> None:
    with gateway.connect() as client:
        client.hello()
        # RFC 5321 4.5.1: <Postmaster> in any case
        assert client.submit(SENDER, ["PostMaster"], CONTENTS["plain"]).code == 250
    stored = postfix.wait_stored("PostMaster@example.org")
    assert stored.endswith(b"Hello\n")


def test_takes_several_messages_on_one_connection(
    gateway: Gateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    rcpts = [new_rcpt() for _ in range(5)]
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        for rcpt in rcpts:
            client.sendmail(SENDER, [rcpt], HEADER + rcpt.encode() + b"\r\n")
    for rcpt in rcpts:
        assert postfix.wait_content(rcpt) == HEADER + rcpt.encode() + b"\r\n"


def test_stores_25_mebibytes(gateway: Gateway, postfix: Postfix, rcpt: str) -> None:
    line = b"." + b"0123456789abcdef" * 4 + b"\r\n"
    content = HEADER + line * (25 * MEBIBYTE // len(line) + 1)
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        assert client.sendmail(SENDER, [rcpt], content) == {}
    # bare equality would print 50 MiB when it fails
    stored = postfix.wait_content(rcpt)
    assert len(stored) == len(content)
    assert (stored == content) is True


def test_refuses_at_mail_what_is_larger_than_announced(gateway: Gateway) -> None:
    with gateway.connect() as client:
        size = next(text for text in client.hello().texts if text.startswith("SIZE ")).split(" ")[1]
        reply = client.command(f"MAIL FROM:<{SENDER}> SIZE={int(size) + 1}")
        # RFC 1870 6.1
        assert (reply.code, reply.enhanced) == (552, "5.3.4")
        assert client.command(f"MAIL FROM:<{SENDER}> SIZE={size}").code == 250
