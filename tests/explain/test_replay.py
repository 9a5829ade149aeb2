"""replay: a decision that was recorded comes to the same again, without a body, without DNS, at another time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.decision import RecordError
from gateway.explain.run import ExplainError
from gateway.lookup import RRType
from gateway.policy import Policy
from gateway.session import AddressSource, Recipient, Session, Transaction
from gateway.smtp.address import parse_forward_path
from gateway.smtp.reply import Reply
from gateway.testing import Zone
from gateway.verdict import Verdict, defer, proceed, reject
from policies.greylist import Greylist, GreylistSettings
from tests.explainkit import case, config_of, explained, planned_of, record_of, replayed
from tests.mailkit import compose, dkim_sign, ed25519_key, rsa_key, seal, txt_line, zone_of, zone_text

AUTHOR, OTHER, LIST = rsa_key("author.example"), ed25519_key("other.example"), rsa_key("list.example")
SIGNED = dkim_sign(compose(), AUTHOR)
MESSAGES = {
    "plain": compose(),
    "signed": SIGNED,
    "signed twice": dkim_sign(SIGNED, OTHER),
    "body changed": SIGNED + b"More.\r\n",
    "header changed": SIGNED.replace(b"Hello\r\n", b"Hello!\r\n", 1),
    "signed by another": dkim_sign(compose(), OTHER),
    "sealed": seal(SIGNED, LIST, "mx.list.example; dkim=pass header.d=author.example"),
    "sealed and changed": seal(SIGNED, LIST, "mx.list.example; dkim=pass") + b"footer\r\n",
    "expired": SIGNED.replace(b"; t=", b"; x=1700000100; t=", 1),
    "two authors": b"From: x@elsewhere.example\r\n" + compose(),
    "no body": compose(body=""),
    "a large header": compose(fields=[f"X-Filler: {'x' * 70}"] * 100),
    "not ascii": compose(subject="B\u00fccher"),
}
SPF = {"pass": "v=spf1 ip4:192.0.2.0/24 -all", "fail": "v=spf1 -all", "broken": "v=spf1 nonsense:x"}
DMARC = ("reject", "quarantine", "none")


def zone_with(spf: str, dmarc: str, failing: str = "") -> Zone:
    zone = Zone.parse(
        zone_text(AUTHOR, OTHER, LIST)
        + (txt_line("author.example", SPF[spf]) if spf else "")
        + (txt_line("_dmarc.author.example", f"v=DMARC1; p={dmarc}") if dmarc else "")
    )
    if failing:
        zone.nodes[failing] = {"*": "servfail"}
    return zone


def same(live: Any, **given: Any) -> None:
    record = record_of(live)
    again = replayed(record, **given)
    assert (again.differences, again.missing) == ((), ())
    now = json.loads(json.dumps(again.as_json()["decision"]))
    for key in ("action", "code", "enhanced", "text", "stage", "policy", "reason", "results", "route"):
        assert now[key] == record[key], key
    assert [verdict["evidence"] for verdict in now["verdicts"]] == [
        verdict["evidence"] for verdict in record["verdicts"]
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    message=st.sampled_from(sorted(MESSAGES)),
    spf=st.sampled_from(["", *SPF]),
    dmarc=st.sampled_from(["", *DMARC]),
    failing=st.sampled_from(["", "author.example", "_dmarc.author.example", AUTHOR.name, LIST.name]),
    mail_from=st.sampled_from(["ann@author.example", "<>", "x@other.example"]),
    rcpts=st.sampled_from(
        [("bob@example.org",), ("x@elsewhere.example",), ("bob@example.org", "x@elsewhere.example")]
    ),
    on_fail=st.sampled_from(["continue", "defer", "reject"]),
    mode=st.sampled_from(["enforce", "observe"]),
    source=st.sampled_from(AddressSource),
    is_trusted=st.booleans(),
    delay_reject=st.booleans(),
)
def test_a_recorded_decision_comes_to_the_same(
    message: str, spf: str, dmarc: str, failing: str, mail_from: str, rcpts: tuple[str, ...], **given: Any
) -> None:
    on_fail = type(planned_of()[1].settings.on_fail)(given["on_fail"])  # type: ignore[attr-defined]  # the spf policy's
    planned = planned_of(settings={"spf": {"on_fail": on_fail}}, mode=given["mode"])
    config = config_of(
        f"pipeline.delay_reject={str(given['delay_reject']).lower()}",
        *(['relay.trusted_networks=["192.0.2.0/24"]'] if given["is_trusted"] else []),
    )
    of = replace(case(MESSAGES[message], mail_from=mail_from, rcpts=rcpts), source=given["source"])
    same(explained(of, zone_with(spf, dmarc, failing), planned, config), planned=planned, config=config)


@pytest.mark.parametrize("message", MESSAGES)
def test_each_kind_of_message_comes_to_the_same(message: str) -> None:
    planned = planned_of()
    same(explained(case(MESSAGES[message]), zone_with("pass", "reject"), planned), planned=planned)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"Subject: x\r\n\r\na\nb\r\n", "line_end"), (b"X: y\r\n\r\n" + b"x" * 20_000, "long_line")],
)
def test_content_that_breaks_a_rule_is_refused_again(content: bytes, reason: str) -> None:
    live = explained(case(content), zone_with("pass", ""), planned_of())
    assert live.decision.reason == reason
    same(live, planned=planned_of())


def test_the_clock_is_that_of_the_decision() -> None:
    live = explained(case(MESSAGES["signed"]), zone_with("", "reject"), planned_of())
    assert "dkim=pass" in {f"{each.method}={each.result}" for each in live.decision.results}
    same(live, planned=planned_of())


def test_another_answer_of_dns_is_not_asked_for() -> None:
    record = record_of(explained(case(MESSAGES["signed"]), zone_with("pass", "reject"), planned_of()))
    record["dns"] = [each for each in record["dns"] if each["name"] != AUTHOR.name]
    again = replayed(record, planned_of())
    assert again.missing == (f"the answer to {AUTHOR.name} TXT",)
    assert not again.is_same


def test_what_a_configuration_would_decide_otherwise_is_told() -> None:
    spoofed = explained(case(MESSAGES["plain"]), zone_with("fail", "reject"), planned_of())
    assert spoofed.decision.action == "rejected"
    again = replayed(record_of(spoofed), planned_of(mode="observe"))
    assert again.explained.decision.action == "accepted"
    assert "action: 'rejected' then, 'accepted' now" in again.differences
    assert not again.is_same


def test_a_header_that_was_cut_cannot_be_replayed_fully() -> None:
    long = compose(fields=[f"X-Filler: {'x' * 900}"] * 30)
    again = replayed(record_of(explained(case(long), zone_with("pass", ""), planned_of())), planned_of())
    assert [each.partition(" ")[2] for each in again.missing] == ["octets of the header"]
    assert not again.is_same


def test_the_downstreams_words_are_taken_from_the_record() -> None:
    record = record_of(explained(case(compose()), zone_with("pass", ""), planned_of()))
    refused = {"code": 554, "enhanced": "5.7.1", "text": "No thanks"}
    record |= {**refused, "action": "rejected", "delivered": False, "reason": "refused"}
    again = replayed(record, planned_of())
    assert str(again.explained.decision.reply) == "554 5.7.1 No thanks"
    assert again.is_same


def test_a_recipient_that_the_downstream_refused_is_refused_again() -> None:
    record = record_of(explained(case(compose()), zone_with("pass", ""), planned_of()))
    refused = {"code": 550, "enhanced": "5.1.1", "text": "Who?"}
    record["rcpts"][0] |= refused
    record |= {**refused, "stage": "rcpt", "action": "rejected", "delivered": False, "reason": "downstream"}
    assert str(replayed(record, planned_of()).explained.decision.reply) == "550 5.1.1 Who?"


def test_a_transaction_that_was_given_up_has_nothing_to_replay() -> None:
    record = record_of(explained(replace(case(b""), content=None), zone_with("", ""), planned_of()))
    assert record["action"] == "aborted"
    with pytest.raises(ExplainError, match="gave this transaction up"):
        replayed(record, planned_of())


def test_a_broken_record_is_told() -> None:
    with pytest.raises(RecordError, match="header_octets"):
        replayed({"tx": "1"}, planned_of())


class Sender(Policy[Any]):
    """Sends a client away at once."""

    name = "sender"

    async def on_ehlo(self, session: Session) -> Verdict:
        return reject("unwanted", Reply(554, "5.7.1", "Go away"), close=True)


def test_a_client_that_was_sent_away_before_mail_is_explained() -> None:
    live = explained(case(compose()), zone_with("", ""), planned_of(Sender))
    decision = live.decision
    assert (decision.action, decision.stage, decision.policy) == ("rejected", "ehlo", "sender")
    assert str(decision.reply) == "554 5.7.1 Go away"
    assert live.fields is None


class Held(Policy[Any]):
    """Defers one recipient, and every message behind its size."""

    name = "held"

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        held = rcpt.mailbox == parse_forward_path("<held@example.org>", smtputf8=False)
        return defer("held", Reply(450, "4.2.1", "Later")) if held else proceed()

    async def on_eom(self, tx: Transaction) -> Verdict:
        assert tx.message is not None
        if tx.message.size_bytes > 1000:
            return reject("large", Reply(552, "5.3.4", f"{tx.message.size_bytes} octets"))
        return proceed()


@pytest.mark.parametrize("body", ["x\r\n", "x" * 70 + "\r\n" * 1000])
def test_policies_of_others_see_the_same_size_and_recipients(body: str) -> None:
    planned = planned_of(Held)
    of = case(compose(body=body), rcpts=("held@example.org", "bob@example.org"))
    same(explained(of, zone_with("pass", ""), planned), planned=planned)


def test_every_question_is_in_the_record_once_with_its_answer() -> None:
    live = explained(case(MESSAGES["signed twice"]), zone_with("pass", "reject"), planned_of())
    asked = [(each.question.name, each.question.rrtype) for each in live.decision.dns]
    assert len(asked) == len(set(asked))
    assert {(AUTHOR.name, RRType.TXT), (OTHER.name, RRType.TXT), ("_dmarc.author.example", RRType.TXT)} <= {
        *asked
    }
    assert {each.policy for each in live.decision.dns} == {"spf", "dkim", "dmarc"}
    assert zone_of(AUTHOR).nodes.keys() <= {name for name, _ in asked}


@pytest.mark.parametrize("mode", ["enforce", "observe"])
@pytest.mark.parametrize("delay_s", [0, 300])
def test_a_policy_that_remembers_says_again_what_it_said(mode: str, delay_s: float) -> None:
    """What it knew then is not in the record: a sender that was known then is a stranger to it now."""
    given = {"greylist": {"delay_s": delay_s}}
    live = explained(case(SIGNED), zone_with("pass", "none"), planned_of(Greylist, settings=given, mode=mode))
    assert live.decision.action == ("deferred" if delay_s and mode == "enforce" else "accepted")
    other = {"greylist": {"delay_s": 300 - delay_s}}
    same(live, planned=planned_of(Greylist, settings=other, mode=mode))


def test_a_record_with_verdicts_that_nobody_can_have_given_is_judged_all_the_same() -> None:
    planned = planned_of(Greylist, settings={"greylist": {"stage": GreylistSettings().stage}})
    record = record_of(explained(case(SIGNED), zone_with("pass", "none"), planned))
    for verdict in record["verdicts"]:
        if verdict["policy"] == "greylist":
            verdict.update(code=250, reason="no token", would_be=[])
    assert replayed(record, planned).differences
