"""headers: what RFC 5322 wants of a header is found missing, and what follows is the operator's choice."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import Stage
from gateway.testing import Harness, PolicyContract
from policies.headers import Headers, HeadersSettings, OnFinding

ALL: dict[str, Any] = {
    each.name: OnFinding.REJECT for each in fields(HeadersSettings) if each.name.startswith("on_")
}
STRICT = HeadersSettings(**ALL)
# The clock of the harness shows 14 November 2023.
GOOD = (
    b"From: ann@client.example\r\n"
    b"Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    b"Message-ID: <1@client.example>\r\n"
    b"Subject: =?utf-8?q?f=C3=BCr?=\r\n dich\r\n"
)


class TestContract(PolicyContract):
    policy = Headers
    settings = STRICT


def message(*more: bytes, without: bytes = b"", instead: bytes = b"") -> bytes:
    kept = [line for line in GOOD.splitlines(keepends=True) if not without or not line.startswith(without)]
    return b"".join([*more, *kept, instead]) + b"\r\nHello.\r\n"


def received(count: int, by: bytes = b"mx.example.net") -> bytes:
    return b"".join(
        b"Received: from a%d (by.example [192.0.2.1])\r\n\tby %b with ESMTP; Tue, 14 Nov 2023 22:13:20 +0000\r\n"
        % (n, by)
        for n in range(count)
    )


@pytest.mark.parametrize(
    ("content", "finding", "words"),
    [
        (message(), "", ""),
        (message(without=b"Date"), "missing", "there is no date"),
        (message(without=b"From"), "missing", "there is no from"),
        (message(b"from: x@x.example\r\n"), "repeated", "more than one from"),
        (message(b"To: a@a.example\r\nTO: b@b.example\r\n"), "repeated", "more than one to"),
        (message(without=b"Date", instead=b"Date: yesterday\r\n"), "bad_date", "date is no date: yesterday"),
        (message(without=b"Date", instead=b"Date: \r\n"), "bad_date", "date is no date: "),
        (
            message(without=b"Date", instead=b"Date: Tue, 21 Nov 2023 22:13:20 +0000\r\n"),
            "bad_date",
            "date lies 604800 s ahead",
        ),
        (message(without=b"Date", instead=b"Date: Wed, 15 Nov 2023 22:13:20 +0000\r\n"), "", ""),
        (message(without=b"Date", instead=b"Date: 1 Jan 1999 00:00 -0000\r\n"), "", ""),
        (
            message(without=b"Date", instead=b"Date: (a (b) \\)) Fri, 21 Nov 1997 09(c): 55 : 06 -0600\r\n"),
            "",
            "",
        ),
        (message(without=b"Message-ID"), "no_message_id", "there is no message-id"),
        (message(b"X-A: " + b"x" * 994 + b"\r\n"), "long_line", "a line has 999 octets"),
        (message(b"X-A: " + b"x" * 993 + b"\r\n"), "", ""),
        (message(b"X-A: a\x07b\r\n"), "control", "octet 0x07 at 6"),
        (message(b"X-A: a\x7fb\r\n"), "control", "octet 0x7f at 6"),
        (message(b"X-A: a\tb\r\n"), "", ""),
        (message("X-A: für\r\n".encode()), "eightbit", "it is not ASCII"),
        (message(b"X-A: f\xfcr\r\n"), "eightbit", "it is neither ASCII nor UTF-8"),
        (message(b"X-A : b\r\n"), "malformed", "this is no field: X-A : b"),
        (message(b"no field\r\n"), "malformed", "this is no field: no field"),
        (message(b": x\r\n"), "malformed", "this is no field: : x"),
        (message(received(10)), "", ""),
        (message(received(11)), "loop", "11 Received fields by mx.example.net"),
        (
            message(received(6), received(5, b"MX.example.NET")),
            "loop",
            "11 Received fields by mx.example.net",
        ),
        (message(received(6), received(6, b"other.example")), "", ""),
    ],
)
def test_what_is_found(content: bytes, finding: str, words: str) -> None:
    with Harness(Headers, STRICT) as harness:
        played = harness.deliver(content)
        verdict = played.verdict(Stage.EOM)
        if not finding:
            assert played.reply.code == 250, verdict
            assert verdict.evidence is None
            return
        assert (played.reply.code, verdict.reason) == (
            554 if finding == "loop" else 550,
            f"headers_{finding}",
        )
        assert verdict.evidence is not None
        assert [*verdict.evidence.lines()] == [f"{finding}: {words}"]
        assert harness.metrics["mxgate_headers_findings_total", finding] == 1


def test_mail_of_smtputf8_may_have_utf_8_in_its_header_and_nothing_else() -> None:
    with Harness(Headers, STRICT) as harness:
        content = message("X-A: für\r\n".encode())
        assert harness.deliver(content, mail_from="jörg@bücher.example").reply.code == 250
        assert harness.deliver(message(b"X-A: f\xfcr\r\n"), mail_from="jörg@bücher.example").reply.code == 550


@pytest.mark.parametrize(
    ("action", "code"), [("continue", 250), ("quarantine", 250), ("defer", 450), ("reject", 550)]
)
def test_each_finding_has_its_action(action: str, code: int) -> None:
    with Harness(Headers, HeadersSettings(on_missing=OnFinding(action))) as harness:
        played = harness.deliver(message(without=b"Date"))
        assert played.reply.code == code
        assert (b"X-Mxgate-Quarantine: headers_missing" in (played.message or b"")) == (
            action == "quarantine"
        )


def test_the_strictest_of_several_counts_and_all_are_told() -> None:
    settings = HeadersSettings(on_missing=OnFinding.QUARANTINE, on_loop=OnFinding.REJECT, max_passes=1)
    with Harness(Headers, settings) as harness:
        played = harness.deliver(message(received(2), without=b"Date"))
        assert (
            str(played.reply) == "554 5.4.6 The message has passed one host too often, this looks like a loop"
        )
        evidence = played.verdict(Stage.EOM).evidence
        assert evidence is not None
        assert [line.partition(":")[0] for line in evidence.lines()] == ["missing", "loop"]


def test_by_default_it_only_tells() -> None:
    with Harness(Headers) as harness:
        assert harness.deliver(b"\r\nno header at all\r\n").reply.code == 250
        assert harness.metrics["mxgate_headers_findings_total", "missing"] == 1


@given(st.binary(max_size=300))
def test_no_date_and_no_received_field_makes_it_fail(octets: bytes) -> None:
    text = octets.translate(None, b"\r\n\0")
    with Harness(Headers, STRICT) as harness:
        assert harness.deliver(b"Date: %b\r\nReceived: %b\r\n\r\n" % (text, text)).reply.code == 550


def test_a_setting_that_cannot_be_is_told() -> None:
    for wrong in ({"max_passes": 0}, {"max_ahead_s": -1.0}, {"max_ahead_s": float("inf")}):
        with pytest.raises(ValueError, match="max_passes"):
            HeadersSettings(**wrong)
