"""Who may receive: refusals by Postfix are passed on at RCPT, and nobody relays through us."""

from __future__ import annotations

import smtplib
from collections.abc import Callable

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway
from tests.e2e.postfix import Postfix

pytestmark = [pytest.mark.e2e, pytest.mark.full]

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\n\r\nHello\r\n"


@pytest.mark.parametrize("pipelined", [False, True], ids=["one-by-one", "pipelined"])
def test_gives_postfix_refusals_at_rcpt_for_some_of_100_recipients(
    pipelined: bool, gateway: Gateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    # fewer refusals than the 20 errors after which a connection ends
    rcpts = [("refused-" if index % 7 == 3 else "") + new_rcpt() for index in range(100)]
    refused = {rcpt for rcpt in rcpts if rcpt.startswith("refused-")}
    with gateway.connect() as client:
        client.hello()
        if pipelined:
            lines = [f"MAIL FROM:<{SENDER}>", *(f"RCPT TO:<{rcpt}>" for rcpt in rcpts)]
            client.send("".join(f"{line}\r\n" for line in lines).encode())
            mail, *replies = [client.read_reply() for _ in lines]
        else:
            mail, *replies = client.envelope(SENDER, rcpts)
        assert mail.code == 250
        codes = dict(zip(rcpts, [(reply.code, reply.enhanced) for reply in replies], strict=True))
        assert {rcpt for rcpt, code in codes.items() if code == (550, "5.1.1")} == refused
        assert {code[0] for rcpt, code in codes.items() if rcpt not in refused} == {250}
        assert client.data(CONTENT).code == 250
    for rcpt in rcpts:
        if rcpt not in refused:
            assert postfix.wait_content(rcpt) == CONTENT


def test_reports_each_refused_recipient_to_smtplib(
    gateway: Gateway, postfix: Postfix, new_rcpt: Callable[[], str]
) -> None:
    good, bad = new_rcpt(), "refused-" + new_rcpt()
    with smtplib.SMTP(*gateway.address, timeout=15) as client:
        refused = client.sendmail(SENDER, [good, bad], CONTENT)
    assert list(refused) == [bad]
    assert refused[bad][0] == 550
    assert postfix.wait_content(good) == CONTENT


def test_has_no_message_when_postfix_refuses_all(gateway: Gateway, new_rcpt: Callable[[], str]) -> None:
    with gateway.connect() as client:
        client.hello()
        assert [reply.code for reply in client.envelope(SENDER, ["refused-" + new_rcpt()])] == [250, 550]
        # RFC 5321 3.3: 503 or 554 when there is no valid recipient
        assert client.command("DATA").code in {503, 554}


# Forms that some MTA somewhere routes to foreign.example (RFC 5321 3.6.1, F.2; SECURITY.md section 2, open-relay).
RELAY_ATTEMPTS = {
    "foreign": "<user@foreign.example>",
    "percent": "<user%foreign.example@example.org>",
    "percent-foreign": "<user%example.org@foreign.example>",
    "bang": "<foreign.example!user@example.org>",
    "bang-only": "<foreign.example!user>",
    "source-route": "<@example.org:user@foreign.example>",
    "source-route-foreign": "<@foreign.example:user@example.org>",
    "source-routes": "<@example.org,@foreign.example:user@example.org>",
    "quoted-at": '<"user@foreign.example"@example.org>',
    "quoted-percent": '<"user%foreign.example"@example.org>',
    "quoted-all": '<"user@foreign.example">',
    "two-at": "<user@foreign.example@example.org>",
    "two-at-foreign": "<user@example.org@foreign.example>",
    "sub-domain": "<user@sub.example.org>",
    "suffix": "<user@notexample.org>",
    "prefix": "<user@example.org.foreign.example>",
    "address-literal": "<user@[192.0.2.1]>",
    "own-address-literal": "<user@[127.0.0.1]>",
    "no-domain": "<user>",
    "trailing-dots": "<user@foreign.example..>",
    "nul": "<user@foreign.example\0@example.org>",
    "comment": "<user@foreign.example(@example.org)>",
    "two-paths": "<user@example.org> <user@foreign.example>",
    "comma": "<user@foreign.example,user@example.org>",
    "blank": "<user@foreign.example @example.org>",
    "full-width-at": "<user\uff20foreign.example@example.org>",
}


@pytest.mark.parametrize("name", RELAY_ATTEMPTS)
def test_does_not_relay(name: str, sink_gateway: Gateway, sink: Downstream) -> None:
    with sink_gateway.connect() as client:
        client.hello()
        assert client.command(f"MAIL FROM:<{SENDER}>").code == 250
        reply = client.command(f"RCPT TO:{RELAY_ATTEMPTS[name]}")
        assert 500 <= reply.code <= 599, reply
        assert client.command("DATA").code in {503, 554}
    assert sink.rcpts_seen() == []


@pytest.mark.parametrize("name", ["foreign", "address-literal", "sub-domain", "suffix", "prefix"])
def test_says_that_relaying_is_denied(name: str, sink_gateway: Gateway) -> None:
    with sink_gateway.connect() as client:
        client.hello()
        client.command(f"MAIL FROM:<{SENDER}>")
        reply = client.command(f"RCPT TO:{RELAY_ATTEMPTS[name]}")
        # RFC 3463 X.7.1: not authorised
        assert (reply.code, reply.enhanced) == (550, "5.7.1")


def test_delivers_to_own_recipients_only_when_mixed_with_foreign_ones(
    sink_gateway: Gateway, sink: Downstream, rcpt: str
) -> None:
    with sink_gateway.connect() as client:
        client.hello()
        replies = client.envelope(SENDER, ["user@foreign.example", rcpt, "other@foreign.example"])
        assert [reply.code for reply in replies] == [250, 550, 250, 550]
        assert client.data(CONTENT).code == 250
    assert [message.rcpts for message in sink.messages] == [(f"<{rcpt}>",)]
