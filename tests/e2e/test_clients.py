"""Real clients through the gateway into a real Postfix: what is stored is what was sent."""

from __future__ import annotations

import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.client import stuff
from tests.e2e.gateway import Gateway
from tests.e2e.machine import require
from tests.e2e.postfix import STORE_HOSTNAME, Postfix, behind_our_fields, sending_postfix

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
# Dots at the begin of lines, an empty line at the end, a field that is folded oddly: what careless relays change.
MESSAGE = (
    b"Subject: =?utf-8?q?f=C3=BCr?=\r\n  you\r\nFrom: <sender@client.example.net>\r\nTO:<user@example.org>\r\n"
    b"Date: Sun, 22 Nov 2026 05:00:00 +0000\r\nMessage-ID: <1@client.example.net>\r\n\r\n"
    b"first\r\n.\r\n..\r\n.dot\r\n trailing blanks  \t\r\n\r\n"
)


@pytest.fixture(scope="module")
def sender(gateway: Gateway) -> Iterator[Postfix]:
    """A second Postfix, whose only way out is the gateway."""
    running = sending_postfix(gateway.address)
    yield running
    running.close()


def test_delivers_what_swaks_sends(gateway: Gateway, postfix: Postfix, rcpt: str, tmp_path: Path) -> None:
    require(program="swaks")
    file = tmp_path / "message.eml"
    # with --no-data-fixup swaks sends the file as it is and one CRLF: it has to be stuffed, with the final dot
    file.write_bytes(stuff(MESSAGE) + b".")
    host, port = gateway.address
    sent = subprocess.run(
        [
            *("swaks", "--server", host, "--port", str(port), "--helo", "client.example.net"),
            *("--from", SENDER, "--to", rcpt, "--data", f"@{file}", "--no-data-fixup"),
        ],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert postfix.wait_content(rcpt) == MESSAGE


def test_delivers_what_smtplib_sends(gateway: Gateway, postfix: Postfix, rcpt: str) -> None:
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        assert client.sendmail(SENDER, [rcpt], MESSAGE) == {}
    assert postfix.wait_content(rcpt) == MESSAGE


def test_delivers_what_postfix_sends(gateway: Gateway, postfix: Postfix, sender: Postfix, rcpt: str) -> None:
    sender.inject(SENDER, [rcpt], MESSAGE.replace(b"\r\n", b"\n"))
    content = postfix.wait_content(rcpt)
    # the client's own Received field is the only thing in front
    own_field, found, behind = content.partition(MESSAGE)
    assert (found, behind) == (MESSAGE, b"")
    assert own_field.startswith(b"Received: by client.example.net (Postfix")
    assert own_field.count(b"\r\nReceived:") == 0


def test_delivers_what_smtp_source_sends(
    gateway: Gateway, postfix: Postfix, rcpt: str, tmp_path: Path
) -> None:
    require(program="smtp-source")
    file = tmp_path / "message.eml"
    # it ends each line of the file with CRLF, one that has no line end too
    file.write_bytes(MESSAGE.removesuffix(b"\r\n").replace(b"\r\n", b"\n"))
    host, port = gateway.address
    sent = subprocess.run(
        [
            "smtp-source",
            "-F",
            str(file),
            "-f",
            SENDER,
            "-t",
            rcpt,
            "-m",
            "6",
            "-s",
            "3",
            f"inet:{host}:{port}",
        ],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    postfix.wait_copies(rcpt, 6)
    assert {behind_our_fields(stored) for stored in postfix.stored_for(rcpt)} == {MESSAGE}


def test_delivers_over_starttls(gateway: Gateway, postfix: Postfix, tls: Tls, rcpt: str) -> None:
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        client.starttls(context=tls.trusting)
        assert client.sendmail(SENDER, [rcpt], MESSAGE) == {}
    assert postfix.wait_content(rcpt) == MESSAGE
    # RFC 3848: ESMTPS is ESMTP after STARTTLS
    assert b"with ESMTPS" in postfix.stored_for(rcpt)[0]


@pytest.mark.full
def test_delivers_over_implicit_tls(gateway: Gateway, postfix: Postfix, tls: Tls, rcpt: str) -> None:
    with smtplib.SMTP_SSL(*gateway.tls_address, timeout=15, context=tls.trusting) as client:
        assert not client.has_extn("starttls")
        assert client.sendmail(SENDER, [rcpt], MESSAGE) == {}
    assert postfix.wait_content(rcpt) == MESSAGE


@pytest.mark.full
def test_names_itself_and_the_client_in_one_received_field(
    gateway: Gateway, postfix: Postfix, rcpt: str
) -> None:
    with smtplib.SMTP(*gateway.address, local_hostname="client.example.net", timeout=15) as client:
        client.sendmail(SENDER, [rcpt], MESSAGE)
    header = postfix.wait_stored(rcpt).split(b"\n\n")[0].replace(b"\n\t", b" ").replace(b"\n ", b" ")
    received = [line for line in header.split(b"\n") if line.startswith(b"Received:")]
    assert len(received) == 2
    assert STORE_HOSTNAME.encode() in received[0]
    # RFC 5321 4.4: from the client's name and address, by us
    assert b"from client.example.net" in received[1]
    assert b"[127.0.0.1]" in received[1]
    assert b"by mx.example.org" in received[1]
