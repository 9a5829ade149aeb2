"""rspamd: what it is told, what its actions become, and that nothing it says can break a header or a reply."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import AddressSource, HttpError, HttpResponse, Stage
from gateway.testing import Client, Harness, HttpRequest, Played, PolicyContract
from gateway.testing.mail import compose
from policies.rspamd import OnAction, Rspamd, RspamdSettings, read_answer

# As rspamd 3.4 answers, shortened.
ANSWER: dict[str, Any] = {
    "is_skipped": False,
    "score": 7.25,
    "required_score": 15.0,
    "action": "add header",
    "symbols": {
        "R_SPF_FAIL": {"name": "R_SPF_FAIL", "score": 1.0, "metric_score": 1.0, "options": ["-all"]},
        "BIG": {"name": "BIG", "score": 6.25, "description": "a description"},
        "MIME_GOOD": {"name": "MIME_GOOD", "score": -0.1, "options": ["text/plain", "a;b,[c]\r\nX: y"]},
    },
    "messages": {},
    "message-id": "1@client.example",
    "time_real": 0.01,
}


def says(**changes: object) -> Callable[[HttpRequest], HttpResponse]:
    return lambda _: HttpResponse(200, json.dumps(ANSWER | changes).encode())


class TestContract(PolicyContract):
    policy = Rspamd

    def http(self, request: HttpRequest) -> HttpResponse:
        return says()(request)


def played(answer: Callable[[HttpRequest], HttpResponse], **settings: Any) -> Played:
    with Harness(Rspamd, RspamdSettings(**settings), may_fail=True) as harness:
        harness.http.answer = answer
        return harness.deliver()


def test_it_gets_the_message_as_the_sender_meant_it_and_what_is_known_of_the_session() -> None:
    zone = "1.2.0.192.in-addr.arpa. 60 IN PTR mail.client.example.\nmail.client.example. 60 IN A 192.0.2.1\n"
    content = compose(body="a\r\n.dot\r\n" + "x" * 70_000 + "\r\n")
    with Harness(Rspamd, zone=zone) as harness:
        harness.http.answer = says()
        harness.deliver(
            content,
            helo="h.example",
            mail_from="jörg@bücher.example",
            rcpts=["a@example.org", "b@example.org"],
        )
        (request,) = harness.http.requests
    assert (request.method, request.url) == ("POST", "http://127.0.0.1:11333/checkv2")
    assert request.content == content
    told = {name: request.all(name) for name in ("IP", "Helo", "Hostname", "From", "Rcpt", "Queue-Id")}
    assert told == {
        "IP": ["192.0.2.1"],
        "Helo": ["h.example"],
        "Hostname": ["mail.client.example"],
        "From": ["jörg@xn--bcher-kva.example"],
        "Rcpt": ["a@example.org", "b@example.org"],
        "Queue-Id": ["T1-1"],
    }


def test_a_name_that_is_not_confirmed_and_an_address_that_hides_are_not_told() -> None:
    zone = "1.2.0.192.in-addr.arpa. 60 IN PTR forged.example.\n"
    with Harness(Rspamd, zone=zone) as harness:
        harness.http.answer = says()
        harness.deliver(mail_from="")
        harness.deliver(client=Client(source=AddressSource.HIDDEN))
        named, hidden = harness.http.requests
    assert named.all("IP") == ["192.0.2.1"]
    assert (named.all("Hostname"), named.all("From")) == ([], ["<>"])
    assert hidden.all("IP") == []


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [
        ("no action", 250, "rspamd_pass"),
        ("greylist", 250, "rspamd_greylist"),
        ("add header", 250, "rspamd_add_header"),
        ("rewrite subject", 250, "rspamd_rewrite_subject"),
        ("quarantine", 250, "rspamd_quarantine"),
        ("soft reject", 451, "rspamd_soft_reject"),
        ("reject", 550, "rspamd_reject"),
        ("discard", 550, "rspamd_discard"),
        ("an action of the operator's", 250, "rspamd_other"),
        ("", 250, "rspamd_other"),
    ],
)
def test_its_actions_become_verdicts(action: str, code: int, reason: str) -> None:
    one = played(says(action=action))
    assert (one.reply.code, one.verdict(Stage.EOM).reason) == (code, reason)
    message = one.message or b""
    assert (b"X-Spam: Yes\r\n" in message) == (action in {"add header", "rewrite subject", "quarantine"})
    assert (b"X-Mxgate-Quarantine:" in message) == (action == "quarantine")


@pytest.mark.parametrize("action", OnAction)
def test_what_follows_is_the_operators_choice(action: OnAction) -> None:
    code = {OnAction.DEFER: 451, OnAction.REJECT: 550}.get(action, 250)
    assert played(says(action="add header"), on_add_header=action).reply.code == code


def test_score_and_symbols_stand_above_the_message_the_weightiest_first() -> None:
    message = played(says()).message
    assert message is not None
    assert (
        b"X-Mxgate-Rspamd: add header; score=7.25; required=15.00;\r\n"
        b"\tBIG(6.25)[];\r\n"
        b"\tR_SPF_FAIL(1.00)[-all];\r\n"
        b"\tMIME_GOOD(-0.10)[text/plain,a_b__c__X:_y]\r\n"
    ) in message
    assert b"X-Mxgate-Rspamd" not in (played(says(), show_symbols=False).message or b"")


@pytest.mark.parametrize(("answer", "ours"), [(says(), 1), (lambda _: HttpResponse(503, b""), 0)])
def test_a_field_of_that_name_that_came_in_is_forged(
    answer: Callable[[HttpRequest], HttpResponse], ours: int
) -> None:
    """Also where nobody answers, which the sender of a heavy message may bring about."""
    with Harness(Rspamd, may_fail=True) as harness:
        harness.http.answer = answer
        message = harness.deliver(
            b"X-Mxgate-Rspamd: no action; score=-9\r\nFrom: a@a.example\r\n\r\nx\r\n"
        ).message
    assert message is not None
    assert message.count(b"X-Mxgate-Rspamd") == ours
    assert b"score=-9" not in message


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Gtube pattern", "550 5.7.1 Gtube pattern"),
        ("", "550 5.7.1 Spam message rejected"),
        ("a\r\n250 2.0.0 Ok", "550 5.7.1 a 250 2.0.0 Ok"),
        ("für", "550 5.7.1 f r"),
        (5, "550 5.7.1 Spam message rejected"),
        ("x" * 5000, "550 5.7.1 " + "x" * 400),
    ],
)
def test_its_words_for_the_client_are_given_as_one_line(text: object, reply: str) -> None:
    assert str(played(says(action="reject", messages={"smtp_message": text})).reply) == reply


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with Harness(Rspamd, RspamdSettings(max_message_bytes=100)) as harness:
        played = harness.deliver()
        assert played.reply.code == 250
        assert played.verdict(Stage.EOM).reason == "rspamd_too_large"
        assert harness.http.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"pong\r\n",
        b"null",
        b"[]",
        b"{}",
        b'{"error": "cannot scan"}',
        b'{"action": 5}',
        b'{"action": "reject", "score": 1e999}',
        b'{"action": "reject", "score": 1' + b"0" * 400 + b"}",
        b"[" * 50_000,
        b"\xff",
    ],
)
def test_what_is_no_answer_is_a_failure_and_the_mail_goes_on(answer: bytes) -> None:
    one = played(lambda _: HttpResponse(200, answer))
    assert one.reply.code == 250
    assert len(one.failures) == 1
    assert b"X-Mxgate-Rspamd" not in (one.message or b"")


def test_a_number_without_end_is_no_answer() -> None:
    with pytest.raises(HttpError, match="none of rspamd"):
        read_answer(HttpResponse(200, b'{"action": "reject", "score": 1' + b"0" * 400 + b"}"))


def test_another_status_and_nobody_there_are_failures() -> None:
    assert played(lambda _: HttpResponse(500, b"{}")).failures
    with Harness(Rspamd, may_fail=True) as harness:
        assert harness.deliver().failures


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.fixed_dictionaries(
        {
            "action": st.text() | st.sampled_from(["reject", "add header"]),
            "score": st.floats() | st.integers(),
        },
        optional={
            "symbols": st.dictionaries(st.text(), st.fixed_dictionaries({"score": _JSON, "options": _JSON})),
            "messages": _JSON,
        },
    )
    | _JSON
)
def test_any_json_is_a_finding_or_the_one_error(answer: object) -> None:
    response = HttpResponse(200, json.dumps(answer).encode())
    try:
        found = read_answer(response)
    except HttpError:
        return
    lines = found.field().split("\r\n")
    assert all(line.isprintable() or line[0] == "\t" for line in lines)
    assert all(len(line) < 900 for line in lines)
    # and so it is a field, and a reply
    one = played(lambda _: response)
    assert one.failures == ()


def test_the_field_has_the_weightiest_symbols_where_there_are_too_many() -> None:
    symbols = {f"S{n}": {"score": n, "options": ["x" * 90] * 9} for n in range(200)}
    message = played(says(symbols=symbols)).message
    assert message is not None
    field = message.partition(b"X-Mxgate-Rspamd: ")[2].partition(b"\r\nX-Spam")[0]
    assert 7000 < len(field) <= 8000
    assert b"\tS199(199.00)" in field


def test_a_setting_that_cannot_be_is_told() -> None:
    for url in ("127.0.0.1:11333", "http://", "http://x:99999", "https://me:secret@x/"):
        with pytest.raises(ValueError, match=r"url|[Pp]ort"):
            RspamdSettings(url=url)
    assert RspamdSettings(socket=Path("/run/rspamd/s")).url
