"""gateway.testing.harness: a session is played through the real engine, and a policy that fails is not overlooked."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.api import (
    AddField,
    AddressSource,
    AuthResult,
    NoSettings,
    OnError,
    Outcome,
    Policy,
    Recipient,
    Reply,
    Result,
    Session,
    Stage,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
    reject,
)
from gateway.policy import Mode
from gateway.testing import Client, FakeRelay, Harness, NotAskedError, PolicyFailedError
from gateway.testing.mail import compose

LATER = Reply(451, "4.7.1", "Come back on Monday")
NO = Reply(550, "5.7.1", "No")


class Monday(Policy[NoSettings]):
    """Refuses bounces for now, one recipient for good, and marks the rest."""

    name = "monday"
    requires = ("spf",)
    exempt = (Trust.TRUSTED,)

    async def start(self) -> None:
        self.seen = self.services.metrics.counters("mail_total", "Mail", ("day",)).labels("monday")

    async def on_mail(self, tx: Transaction) -> Verdict:
        self.seen.inc()
        self.services.log.info("mail.seen", tx=tx.id)
        return proceed(reason="seen") if tx.envelope.mail_from else defer("bounce", LATER)

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        return reject("carl", NO) if rcpt.mailbox.local_value == "carl" else proceed()

    async def on_eom(self, tx: Transaction) -> Verdict:
        await asyncio.sleep(0)
        found = AuthResult("x-monday", Result.PASS, tx.results[0].result if tx.results else "")
        return proceed(results=[found], edits=[AddField("X-Monday", tx.session.address_source)])

    async def on_outcome(self, tx: Transaction, outcome: Outcome) -> None:
        self.services.log.info("mail.ended", delivered=outcome.delivered)


class Fails(Policy[NoSettings]):
    name = "fails"
    on_error = OnError.DEFER

    async def on_connect(self, session: Session) -> Verdict:
        if session.helo == session.id:
            await asyncio.sleep(0)
        return proceed()

    async def on_eom(self, tx: Transaction) -> Verdict:
        await asyncio.sleep(0)
        raise ZeroDivisionError(tx.id)


def test_the_message_reaches_the_downstream_with_what_the_policy_adds() -> None:
    message = compose("ann@client.example")
    with Harness(Monday) as harness:
        played = harness.deliver(message)
    assert played.reply == Reply(250, "2.0.0", "Stored as 1")
    assert played.message is not None
    assert played.message.endswith(message)
    assert b"\r\nX-Monday: socket\r\n" in played.message
    assert played.results == (AuthResult("x-monday", Result.PASS),)


def test_a_refusal_of_mail_is_given_at_each_recipient_as_in_the_gateway() -> None:
    with Harness(Monday) as harness:
        played = harness.deliver(mail_from="", rcpts=["bob@example.org", "dora@example.org"])
    assert played.replies[1:] == (LATER, LATER)
    assert played.message is None
    assert played.verdict(Stage.MAIL) == defer("bounce", LATER)
    with pytest.raises(NotAskedError, match="monday was not asked at eom"):
        played.verdict(Stage.EOM)


def test_the_word_about_each_recipient_is_told_apart() -> None:
    with Harness(Monday) as harness:
        played = harness.deliver(rcpts=["bob@example.org", "carl@example.org"])
    assert [each.code for each in played.replies] == [250, 250, 550, 250]
    assert played.verdict(Stage.RCPT, "carl@example.org").reason == "carl"
    assert played.verdict(Stage.RCPT, "bob@example.org") == proceed()


def test_what_others_found_and_what_is_known_of_the_client_can_be_given() -> None:
    with Harness(Monday, results=[AuthResult("spf", Result.FAIL)]) as harness:
        played = harness.deliver(client=Client("2001:db8::1", "x.example", source=AddressSource.PROXY))
        assert played.results[0].reason == "fail"
        assert b"X-Monday: proxy\r\n" in (played.message or b"")
        with pytest.raises(NotAskedError):
            harness.deliver(client=Client(trust=Trust.TRUSTED)).verdict(Stage.MAIL)


def test_an_observed_policy_tells_what_it_would_say() -> None:
    with Harness(Monday, mode=Mode.OBSERVE) as harness:
        played = harness.deliver(mail_from="")
        assert played.reply.code == 250
        assert played.verdict(Stage.MAIL).reply == LATER
        assert harness.metrics["mxgate_policy_would_total", "monday", "mail", "defer"] == 1


def test_log_and_metrics_are_under_the_policys_name() -> None:
    with Harness(Monday) as harness:
        harness.deliver()
        assert harness.metrics["mxgate_monday_mail_total", "monday"] == 1
        lines = [line for line in harness.log.lines if line.event.startswith("mail.")]
    assert [line.keys["policy"] for line in lines] == ["monday", "monday"]
    assert lines[1].keys["delivered"] is True


def test_a_failure_ends_the_test_with_the_policys_own_exception() -> None:
    with Harness(Fails) as harness, pytest.raises(PolicyFailedError, match="fails failed at eom") as caught:
        harness.deliver()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failure_that_is_expected_becomes_what_on_error_says() -> None:
    with Harness(Fails, may_fail=True) as harness:
        played = harness.deliver()
    assert played.reply.code == 451
    assert "ZeroDivisionError" in played.failures[0]


def test_downstream_and_time_are_the_tests_own() -> None:
    with Harness(Monday) as harness:
        assert isinstance(harness.downstream, FakeRelay)
        harness.downstream.words["bob@example.org"] = NO
        begun = harness.clock.now()
        harness.clock.advance(86_400)
        assert harness.deliver().reply == NO
        assert harness.clock.now() - begun == 86_400
    assert abs(time.time() - harness.clock.now()) > 86_400


def test_one_harness_plays_many_sessions_on_one_policy() -> None:
    with Harness(Monday) as harness:
        for _ in range(3):
            harness.deliver()
        assert len(harness.downstream.delivered) == 3
        assert harness.metrics["mxgate_monday_mail_total", "monday"] == 3


async def test_sessions_are_played_in_a_loop_that_runs() -> None:
    harness = Harness(Monday)
    played = await asyncio.gather(*(harness.play(rcpts=[f"b{n}@example.org"]) for n in range(10)))
    await harness.stop()
    assert all(each.reply.code == 250 for each in played)
    assert all(len(each.judged) == 3 for each in played)
