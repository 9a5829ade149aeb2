"""debugging: the dialogue and the verdicts of those who are named, of nobody else, and never a secret."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest

from gateway.debugging import Debugging, Dialogue
from gateway.decision import Judged
from gateway.lookup import Answer, Asked, Found, Question, RRType
from gateway.redaction import Redaction
from gateway.session import Recipient
from gateway.testing import FakeLog
from gateway.verdict import Stage, reject
from tests.decision.records import DENIED, decision, mailbox

CLIENT = ip_address("192.0.2.7")


def debugging(clients: Sequence[str] = (), rcpts: Sequence[str] = ()) -> tuple[Debugging, FakeLog]:
    log = FakeLog()
    return Debugging(log, [ip_network(client) for client in clients], rcpts), log


def lines(log: FakeLog) -> list[str]:
    return [f"{line.keys['side']}: {line.keys['line']}" for line in log.lines]


def opened(debug: Debugging) -> Dialogue:
    dialogue = debug.dialogue("s", CLIENT)
    assert dialogue is not None
    return dialogue


def test_a_client_that_is_named_is_heard_at_once() -> None:
    debug, log = debugging(["192.0.2.0/24"])
    dialogue = opened(debug)
    dialogue.said(b"220 mx\r\n250-mx\r\n250 SIZE\r\n")
    dialogue.heard(b"EHLO \xff")
    dialogue.content(12)
    assert lines(log) == [
        "gateway: 220 mx",
        "gateway: 250-mx",
        "gateway: 250 SIZE",
        r"client: EHLO \xff",
        "client: (12 octets came with the content, not shown)",
    ]
    assert {line.level for line in log.lines} == {"debug"}


def test_nobody_else_is_heard() -> None:
    debug, log = debugging(["198.51.100.0/24"])
    assert debug.dialogue("s", CLIENT) is None
    debug.decided(decision())
    assert log.lines == []
    assert not debugging()[0]


@pytest.mark.parametrize(
    ("named", "is_heard"),
    [
        ("ann@example.org", True),
        ("bob@example.org", False),
        ("example.org", True),
        ("example.com", False),
        (".org", True),
        (".example.org", False),
    ],
)
def test_what_was_said_before_a_recipient_is_told_when_it_is_named(named: str, is_heard: bool) -> None:
    debug, log = debugging(rcpts=[named])
    dialogue = opened(debug)
    dialogue.heard(b"MAIL FROM:<you@example.net>")
    assert log.lines == []
    dialogue.rcpts([Recipient(mailbox("ANN@Example.ORG"))])
    dialogue.said(b"250 Ok\r\n")
    assert lines(log) == (["client: MAIL FROM:<you@example.net>", "gateway: 250 Ok"] if is_heard else [])


def test_what_is_kept_meanwhile_has_a_bound() -> None:
    debug, log = debugging(rcpts=["example.org"])
    dialogue = opened(debug)
    for number in range(500):
        dialogue.heard(b"NOOP %d " % number + b"x" * 5000)
    dialogue.rcpts([Recipient(mailbox("ann@example.org"))])
    told = lines(log)
    assert len(told) == 101
    assert told[0] == "gateway: (400 earlier lines were not kept)"
    assert max(map(len, told)) < 1100


def test_credentials_are_never_told() -> None:
    debug, log = debugging(["192.0.2.7"])
    dialogue = opened(debug)
    for line in (b"AUTH PLAIN AGFubgBzZWNyZXQ=", b"c2VjcmV0", b"auth login c2VjcmV0", b"secret", b"NOOP"):
        dialogue.heard(line)
    assert "c2VjcmV0" not in str(lines(log))
    assert "ZWNyZX" not in str(lines(log))
    assert "secret" not in str(lines(log))
    assert lines(log)[0] == "client: AUTH PLAIN ..."
    assert lines(log)[-1] == "client: NOOP"


@pytest.mark.parametrize(
    "line",
    [b"AUTH\tPLAIN\tc2VjcmV0", b"AUTH c2VjcmV0", b"AUTH=c2VjcmV0", b"auth  plain  c2VjcmV0", b"AUTH\t"],
)
def test_no_way_to_write_auth_tells_what_is_behind_it(line: bytes) -> None:
    debug, log = debugging(["192.0.2.7"])
    dialogue = opened(debug)
    dialogue.heard(line)
    dialogue.heard(b"c2VjcmV0")
    assert "c2VjcmV0" not in str(lines(log))
    assert lines(log)[0].startswith("client: AUTH ")


@pytest.mark.parametrize(
    "line", [b" AUTH PLAIN c2VjcmV0", b"AUTH\tPLAIN\tc2VjcmV0", b"\tauth  plain c2VjcmV0"]
)
def test_credentials_behind_odd_blanks_are_not_told_either(line: bytes) -> None:
    debug, log = debugging(["192.0.2.7"])
    dialogue = opened(debug)
    for each in (line, b"c2VjcmV0", b"", b"NOOP"):
        dialogue.heard(each)
    assert "c2VjcmV0" not in str(lines(log))
    assert lines(log)[-1] == "client: NOOP"


def test_the_verdicts_are_told_when_a_transaction_ends() -> None:
    debug, log = debugging(rcpts=["ann@example.org"])
    judged = Judged("dmarc", Stage.EOM, "enforce", reject("dmarc_fail", DENIED), None, 0.01, "")
    debug.decided(decision(judged=[judged], action="rejected", answer=DENIED))
    verdict, ended = log.lines
    assert (verdict.event, verdict.keys["policy"], verdict.keys["reason"]) == (
        "debug.verdict",
        "dmarc",
        "dmarc_fail",
    )
    assert (ended.event, ended.keys["action"]) == ("debug.decision", "rejected")
    assert ended.keys["rcpts"] == ["550 5.7.1 Relaying denied ann@example.org"]


def test_what_is_to_be_redacted_is_not_told_of_a_transaction_either() -> None:
    log = FakeLog()
    debug = Debugging(log, [ip_network("192.0.2.7")], redaction=Redaction(["local_parts"]))
    asked = Asked("spf", Question("you._spf.example.net", RRType.A), Answer(Found.NO_DATA))
    debug.decided(decision(error="no you here")._replace(dns=(asked,)))
    assert "***._spf.example.net" in str(log.lines)
    assert "you" not in str(log.lines)
