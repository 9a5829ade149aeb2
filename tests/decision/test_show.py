"""show and text: whatever strangers and policies wrote, it is JSON for everybody and lines for a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.decision import Judged, as_text, to_json
from gateway.decision.show import SHOWN_FIELDS
from gateway.lookup import Answer, Asked, Found, Question, RRType
from gateway.session import Recipient
from gateway.smtp.reply import Reply
from gateway.verdict import AddField, AuthResult, RemoveFields, Result, Stage, defer, proceed, reject
from tests.decision.records import DENIED, decision, mailbox, plain, session

GREYLISTED = Reply(451, "4.7.1", "Come again")
ANN = Recipient(mailbox("ann@example.org"))

any_text = st.text(alphabet=st.characters())  # lone surrogates too
strange: st.SearchStrategy[Any] = (
    st.none() | st.integers() | st.binary() | st.lists(st.text()) | any_text | st.tuples(any_text)
)
seconds = st.floats() | st.floats(0, 1e6)


class Words:
    """Evidence of a policy that nobody checked."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def lines(self) -> Any:
        if self.said == []:
            raise RuntimeError
        return self.said


@st.composite
def verdicts(draw: st.DrawFn) -> Any:
    """What a policy may hand over that nobody checked."""
    result = AuthResult(draw(any_text), draw(strange), draw(strange), draw(strange | st.tuples(strange)))
    return proceed(
        results=(result, draw(strange)),
        edits=(AddField("X-Y", "z"), draw(strange)),
        evidence=Words(draw(strange)),
    )


@st.composite
def records(draw: st.DrawFn) -> Any:
    judged = [
        Judged(
            draw(any_text),
            draw(st.sampled_from(Stage)),
            draw(any_text),
            draw(verdicts()),
            draw(st.none() | verdicts() | st.just(reject("no", DENIED))),
            draw(seconds),
            draw(any_text),
            draw(st.none() | st.just(ANN)),
        )
    ]
    return decision(1, judged=judged)._replace(
        error=draw(any_text),
        reason=draw(any_text),
        policy=draw(any_text),
        session=replace(session(), helo=draw(any_text)),
        header=draw(st.binary()) + b"\r\nFrom: " + draw(st.binary()),
        timings=((draw(any_text), draw(seconds)),),
        duration_s=draw(seconds),
        dns=(
            Asked(
                draw(any_text),
                Question(draw(any_text), RRType.PTR),
                Answer(Found.RECORDS, (draw(any_text), draw(st.binary()))),
                draw(seconds),
            ),
        ),
        results=(draw(strange),),
    )


@given(records())
@example(decision(1)._replace(duration_s=1e308, timings=(("x", float("nan")),)))
def test_any_record_is_json_that_every_reader_takes_and_printable_lines(record: Any) -> None:
    shown = to_json(record)
    text = json.dumps(shown, allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")  # no lone surrogate
    assert json.loads(text) == shown
    for line in as_text(shown):
        assert line.isprintable()


_KEYS = {*to_json(decision(1, judged=[plain()])), "rcpt", "code", "method", "edit", "name", "value"}
KEYS = st.text() | st.sampled_from(sorted(_KEYS))
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, json_values))
def test_any_answer_of_what_listens_there_is_printable_lines(answer: dict[str, Any]) -> None:
    for line in as_text(answer):
        assert line.isprintable()


def test_shows_the_whole_record_in_the_words_of_the_log() -> None:
    found = AuthResult("dmarc", Result.FAIL, "p=reject", (("header.from", "example.net"),))
    record = decision(
        21,
        action="rejected",
        judged=[
            plain(2, "spf"),
            Judged("greylist", Stage.RCPT, "observe", proceed(), defer("new", GREYLISTED), 0.0021, "", ANN),
            Judged(
                "dmarc",
                Stage.EOM,
                "enforce",
                reject("dmarc_fail", Reply(550, "5.7.1", "Rejected by policy"), results=[found]),
                None,
                0.01,
                "",
            ),
            Judged(
                "tagger", Stage.EOM, "enforce", proceed(edits=[RemoveFields("X-Old")]), None, 0.0, "timeout"
            ),
        ],
        header=b"Received: x\r\nFrom: Ann\r\n <ann@example.net>\r\nSubject: secret\r\nno field\r\n",
    )._replace(reply=DENIED, policy="dmarc", reason="dmarc_fail", results=(found,))
    shown = cast("Any", to_json(record))
    assert shown["tx"] == "1m80vxzckjnp021-21"
    assert shown["timestamp"] == "2001-09-09T01:47:01.000Z"
    assert (shown["code"], shown["enhanced"], shown["text"]) == (550, "5.7.1", "Relaying denied")
    assert (shown["mail_from"], shown["client"], shown["helo"]) == (
        "you@example.net",
        "192.0.2.7",
        "mail21.example.net",
    )
    assert shown["rcpts"] == [
        {
            "rcpt": "ann@example.org",
            "notify": "",
            "orcpt": "",
            "code": 250,
            "enhanced": "2.1.5",
            "text": "Ok 21 0",
            "policy": "",
            "reason": "downstream",
        }
    ]
    assert shown["would_be"]["action"] == "defer"
    assert [(v["policy"], v["action"], v["duration_ms"]) for v in shown["verdicts"]] == [
        ("spf", "continue", 2.0),
        ("greylist", "continue", 2.1),
        ("dmarc", "reject", 10.0),
        ("tagger", "continue", 0.0),
    ]
    assert shown["verdicts"][1]["would_be"]["reason"] == "new"
    assert shown["results"][0]["properties"] == [["header.from", "example.net"]]
    assert shown["header"] == [{"name": "From", "value": "Ann <ann@example.net>"}]
    assert "secret" not in json.dumps(shown)
    assert "header" not in to_json(record, in_full=False)
    assert [*as_text(shown)] == [
        "2001-09-09T01:47:01.000Z rejected 1m80vxzckjnp021-21",
        "  client 192.0.2.7 (mail21.example.net, TLSv1.3)",
        "  from <you@example.net>",
        "  to <ann@example.org>: 250 2.1.5 Ok 21 0 [downstream]",
        "  answered 550 5.7.1 Relaying denied at eom [dmarc dmarc_fail]",
        "  is it us? yes, a rule of ours: our policy dmarc refused it: dmarc_fail",
        "  observed only: would have been defer at rcpt for <ann@example.org> [greylist new] 451 4.7.1 Come again",
        "  From: Ann <ann@example.net>",
        "  verdicts",
        "    eom     spf: continue 2 ms",
        "    rcpt    greylist: continue for <ann@example.org> observed 2.1 ms",
        "            would have been defer new 451 4.7.1 Come again",
        "    eom     dmarc: reject dmarc_fail 10 ms",
        "            dmarc=fail (p=reject) header.from=example.net",
        "    eom     tagger: continue FAILED (timeout) 0 ms",
        "            remove X-Old:",
        "  took 210 ms (policies 21) 4021 bytes route route1",
    ]


def test_the_strictest_of_what_would_have_been_is_shown() -> None:
    def observed(policy: str, verdict: Any) -> Judged:
        return Judged(policy, Stage.EOM, "observe", proceed(), verdict, 0.1, "")

    judged = [
        observed("spf", proceed()),
        observed("greylist", defer("new", GREYLISTED)),
        observed("dmarc", reject("dmarc_fail", DENIED)),
        observed("lists", reject("listed", DENIED)),
    ]
    shown = cast("Any", to_json(decision(1, judged=judged)))
    assert (shown["would_be"]["policy"], shown["would_be"]["action"]) == ("dmarc", "reject")
    assert to_json(decision(1, judged=judged[:1]))["would_be"] is None
    assert to_json(decision(1, judged=[plain()]))["would_be"] is None


def test_of_many_recipients_the_first_are_lines_and_the_others_a_number() -> None:
    record = decision(1, rcpts=[f"user{number}@example.org" for number in range(25)])._replace(
        omitted_rcpts=75
    )
    lines = [line for line in as_text(to_json(record)) if line.startswith("  to ")]
    assert len(lines) == 21
    assert lines[-1] == "  to 80 more"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\r\n250 ok", r"  error a\r\n250 ok"),
        ("\x1b[2J", r"  error \x1b[2J"),
        ("\u202eevil", r"  error \u202eevil"),
        ("\udc80", r"  error \\udc80"),
        ("\\x1b", r"  error \\x1b"),
        ("b\u00fccher", "  error b\u00fccher"),
        ("x" * 400, f"  error {'x' * 300}..."),
    ],
)
def test_no_text_drives_a_terminal(text: str, line: str) -> None:
    assert line in as_text(to_json(decision(1, error=text)))


def test_a_text_without_end_is_cut() -> None:
    endless = AuthResult("spf", Result.PASS, "\u2028" * 100_000)
    shown = to_json(
        decision(1, judged=[Judged("spf", Stage.EOM, "enforce", proceed(results=[endless]), None, 0, "")])
    )
    assert len(json.dumps(shown)) < 20_000


def test_fields_that_show_what_the_mail_is_about_are_not_shown() -> None:
    assert not SHOWN_FIELDS & {b"subject", b"to", b"cc", b"received", b"x-originating-ip"}
