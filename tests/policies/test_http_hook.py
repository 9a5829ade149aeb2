"""http_hook: what the service is asked, what its answers mean, and that nothing which is none becomes a refusal."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import AuthResult, HttpError, HttpResponse, Reply, Result, Stage, Verdict
from gateway.testing import Client, Harness, HttpRequest, Played, PolicyContract
from gateway.testing.mail import compose
from policies.http_hook import HttpHook, HttpHookSettings, verdict

URL = "http://hook.example:8080/judge"
SPF = AuthResult("spf", Result.PASS, "ok", (("smtp.mailfrom", "ann@client.example"),))


def settings(*stages: Stage, **given: Any) -> HttpHookSettings:
    return HttpHookSettings(URL, stages=stages or (Stage.EOM,), **given)


def says(**answer: object) -> Callable[[HttpRequest], HttpResponse]:
    return lambda _: HttpResponse(200, json.dumps(answer).encode())


class TestContract(PolicyContract):
    policy = HttpHook
    settings = settings(*Stage, send_content=True)

    def http(self, request: HttpRequest) -> HttpResponse:
        asked = json.loads(request.content)
        return says(action="continue", reason=f"at_{asked['stage']}")(request)


def played(
    answer: Callable[[HttpRequest], HttpResponse], *stages: Stage, message: bytes | None = None, **given: Any
) -> tuple[Played, list[Any]]:
    """A session with such a service, and what it was asked."""
    with Harness(HttpHook, settings(*stages, **given), results=[SPF], may_fail=True) as harness:
        harness.http.answer = answer
        client = Client("2001:db8::1", 'a"b\\.example')
        one = harness.deliver(message, client=client, rcpts=["bob@example.org", "eve@example.org"])
        assert {request.method + request.url for request in harness.http.requests} <= {"POST" + URL}
        return one, [json.loads(request.content) for request in harness.http.requests]


def test_it_is_asked_at_the_stages_of_the_settings_and_told_what_is_known() -> None:
    one, asked = played(says(action="continue"), *Stage)
    assert one.reply.code == 250
    assert [each["stage"] for each in asked] == ["connect", "ehlo", "mail", "rcpt", "rcpt", "eom"]
    connect, ehlo, mail, rcpt, _, eom = asked
    assert "envelope" not in connect
    assert ehlo["session"] == {
        "id": ehlo["session"]["id"],
        "client": "2001:db8::1",
        "port": 40_000,
        "address_source": "socket",
        "helo": 'a"b\\.example',
        "esmtp": True,
        "tls": None,
        "trust": "untrusted",
        "user": None,
    }
    assert mail["envelope"] == {
        "mail_from": "ann@client.example",
        "rcpts": [],
        "body_type": "7BIT",
        "smtputf8": False,
        "size_hint": 0,
    }
    assert mail["results"] == [
        {
            "method": "spf",
            "result": "pass",
            "reason": "ok",
            "properties": {"smtp.mailfrom": "ann@client.example"},
        }
    ]
    assert rcpt["rcpt"] == "bob@example.org"
    assert "message" not in rcpt
    assert eom["envelope"]["rcpts"] == ["bob@example.org", "eve@example.org"]
    assert eom["id"] == mail["id"] != connect["id"]
    assert eom["version"] == 1


def test_it_gets_the_header_and_where_it_shall_the_octets_as_the_sender_meant_them() -> None:
    content = compose(body="a\r\n.dot\r\n..dots\r\n" + "x" * 70_000 + "\r\n.\r\n")
    _, (without,) = played(says(action="continue"), message=content)
    assert b64decode(without["message"]["header"]) + b"\r\n" == content[: content.index(b"\r\n\r\n") + 4]
    assert "content" not in without["message"]
    _, (all_of_it,) = played(says(action="continue"), message=content, send_content=True)
    assert b64decode(all_of_it["message"]["content"], validate=True) == content
    _, (too_large,) = played(
        says(action="continue"), message=content, send_content=True, max_message_bytes=100
    )
    assert "content" not in too_large["message"]


@given(st.integers(0, 200))
def test_the_length_that_is_announced_is_that_of_what_is_sent(size: int) -> None:
    with Harness(HttpHook, settings(send_content=True)) as harness:
        harness.http.answer = says(action="continue")
        harness.deliver(compose(body="." * size + "\r\n"))
        (request,) = harness.http.requests
        assert request.all("content-length") == [str(len(request.content))]


def test_a_token_is_sent_and_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with Harness(HttpHook, settings(token_file=file, socket=Path("/run/hook"))) as harness:
        harness.http.answer = says(action="continue")
        harness.deliver()
        (request,) = harness.http.requests
        assert request.all("authorization") == ["Bearer s3cret"]
        assert request.socket == "/run/hook"
    with (
        Harness(HttpHook, settings(token_file=tmp_path / "none")) as harness,
        pytest.raises(OSError, match="none"),
    ):
        harness.deliver()


@pytest.mark.parametrize(
    ("answer", "reply", "reason"),
    [
        ({"action": "continue"}, "250 2.0.0 Stored as 1", "hook_continue"),
        ({"action": "continue", "reason": "known", "new_key": 1}, "250 2.0.0 Stored as 1", "known"),
        ({"action": "reject"}, "550 5.7.1 Refused by policy", "hook_reject"),
        ({"action": "defer"}, "451 4.7.1 Refused by policy for now, please try again later", "hook_defer"),
        (
            {
                "action": "reject",
                "reason": "x",
                "reply": {"code": 554, "enhanced": "5.7.9", "text": "Go away"},
            },
            "554 5.7.9 Go away",
            "x",
        ),
        ({"action": "defer", "reply": {"code": 450, "text": "Later"}}, "450 4.7.1 Later", "hook_defer"),
    ],
)
def test_an_answer_is_a_verdict(answer: dict[str, object], reply: str, reason: str) -> None:
    one, _ = played(says(**answer))
    assert (str(one.reply), one.verdict(Stage.EOM).reason) == (reply, reason)


def test_it_may_quarantine_and_put_fields_above_the_message() -> None:
    fields = [{"name": "X-Seen", "value": "yes"}, {"name": "X-Folded", "value": "a\r\n b"}]
    one, _ = played(says(action="quarantine", reason="odd", add_fields=fields))
    assert one.message is not None
    assert b"X-Mxgate-Quarantine: odd\r\n" in one.message
    assert b"X-Seen: yes\r\nX-Folded: a\r\n b\r\n" in one.message


def test_204_is_nothing_to_say() -> None:
    one, _ = played(lambda _: HttpResponse(204, b""))
    assert one.reply.code == 250


NONE = [
    b"",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'"reject"',
    b"{}",
    b'{"action": null}',
    b'{"action": "accept"}',
    b'{"action": ["reject"]}',
    b'{"action": "reject", "reason": "Not A Token"}',
    b'{"action": "reject", "reason": 5}',
    b'{"action": "reject", "reply": "550 no"}',
    b'{"action": "reject", "reply": {"code": 450, "text": "x"}}',
    b'{"action": "reject", "reply": {"code": 250, "text": "x"}}',
    b'{"action": "reject", "reply": {"code": "550", "text": "x"}}',
    b'{"action": "reject", "reply": {"code": true, "text": "x"}}',
    b'{"action": "reject", "reply": {"code": 550}}',
    b'{"action": "reject", "reply": {"code": 550, "text": ""}}',
    b'{"action": "reject", "reply": {"code": 550, "text": "x\\r\\n250 2.0.0 Ok"}}',
    b'{"action": "reject", "reply": {"code": 550, "text": "x\\ny"}}',
    '{"action": "reject", "reply": {"code": 550, "text": "für"}}'.encode(),
    b'{"action": "reject", "reply": {"code": 550, "enhanced": "4.7.1", "text": "x"}}',
    b'{"action": "reject", "reply": {"code": 1e999, "text": "x"}}',
    b'{"action": "continue", "add_fields": {}}',
    b'{"action": "continue", "add_fields": [5]}',
    b'{"action": "continue", "add_fields": [{"name": "X-A"}]}',
    b'{"action": "continue", "add_fields": [{"name": "X A", "value": "b"}]}',
    b'{"action": "continue", "add_fields": [{"name": "X-A", "value": "b\\r\\nX-B: c"}]}',
    b'{"action": "continue", "add_fields": [{"name": "X-A", "value": "\\ud800"}]}',
    b'{"action": "continue", "add_fields": [{"name": "Subject", "value": "b"}]}',
    b'{"action": "continue", "add_fields": ['
    + b'{"name": "X-A", "value": "b"},' * 20
    + b'{"name": "X-A", "value": "b"}]}',
    b"[" * 50_000,
    b'{"action": "continue", "x": ' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("answer", NONE)
def test_what_is_no_answer_is_a_failure_and_never_a_refusal_for_good(answer: bytes) -> None:
    one, _ = played(lambda _: HttpResponse(200, answer))
    assert str(one.reply) == "451 4.3.0 Temporary trouble here, try again later"
    assert len(one.failures) == 1


@pytest.mark.parametrize("status", [100, 301, 400, 404, 500, 503])
def test_another_status_is_a_failure(status: int) -> None:
    one, _ = played(lambda _: HttpResponse(status, b'{"action": "reject"}'))
    assert one.reply.code == 451


def test_who_is_not_there_is_a_failure() -> None:
    with Harness(HttpHook, settings(), may_fail=True) as harness:
        assert harness.deliver().reply.code == 451


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["action", "reason", "reply", "add_fields", "code", "text", "name", "value"])
                | st.text(),
                inner,
            )
        ),
    )
    | st.fixed_dictionaries(
        {
            "action": st.sampled_from(["reject", "continue"]),
            "reply": st.fixed_dictionaries({"code": st.integers(), "text": st.text()}),
        }
    )
)
def test_any_json_is_a_verdict_or_the_one_error(answer: object) -> None:
    try:
        found: Verdict = verdict(HttpResponse(200, json.dumps(answer).encode()))
    except HttpError:
        return
    assert found.reply is None or isinstance(found.reply, Reply)


@pytest.mark.parametrize(
    "given",
    [
        {"url": "hook:80"},
        {"url": "ftp://x/"},
        {"url": "http://a:b@x/"},
        {"url": "http://x:0/"},
        {"url": URL, "stages": ()},
    ],
)
def test_a_setting_that_cannot_be_is_told(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"url|stages"):
        HttpHookSettings(**given)
