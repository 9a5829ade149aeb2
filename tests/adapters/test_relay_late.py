"""What a downstream says late: refusals at delivery, too many recipients, a message that is too big for it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from gateway.adapters.relay import Protocol
from gateway.adapters.relay.cache import LateRefusals
from gateway.session import Recipient
from gateway.smtp.reply import PARTIAL_REFUSAL, RECIPIENT_OK, ROUTE_TOO_BIG, Reply
from tests.adapters.relaykit import SESSION, Bench, Generated, Mail, envelope, mailbox, relay_to
from tests.adapters.sink import EXTENSIONS, OK, Do, Sink, say
from tests.fakes import FakeClock

ACCEPTED = "250 2.1.5 Recipient ok"
QUOTA = "552 5.2.2 Mailbox full"
LATER = "450 4.2.1 Mailbox busy"
DAY_S = 24 * 3600
HOUR_S = 3600


def from_(client: str) -> Any:
    return replace(SESSION, client=ip_address(client))


# --- refusals at delivery ----------------------------------------------------------------------------


@pytest.mark.parametrize("verify_recipients", [True, False])
@pytest.mark.parametrize("word", [QUOTA, LATER])
async def test_a_late_refusal_answers_the_retry_at_rcpt(word: str, verify_recipients: bool) -> None:
    async with Sink() as sink, relay_to(sink, verify_recipients=verify_recipients) as bench:
        ok = ACCEPTED if verify_recipients else str(RECIPIENT_OK)
        assert await bench.verify("b@example.org", "c@example.org") == [ok, ok]
        sink.steps["rcpt"] = [OK, say(word)]
        delivery = await bench.deliver("b@example.org", "c@example.org")
        assert (delivery.reply, delivery.error) == (PARTIAL_REFUSAL, "partial")
        asked = len(sink.commands)
        assert await bench.verify("b@example.org", "c@example.org") == [ok, word]
        assert len(sink.commands) == asked
        assert (await bench.deliver("b@example.org")).stored


async def refused_late(bench: Bench, sink: Sink, word: str) -> None:
    """One of two recipients is refused at delivery."""
    sink.steps["rcpt"] = [OK, say(word)]
    assert (await bench.deliver("b@example.org", "c@example.org")).error == "partial"
    sink.steps.clear()


async def test_a_late_5yz_is_remembered_for_a_day() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await refused_late(bench, sink, QUOTA)
        bench.services.clock.advance(DAY_S - 0.1)
        assert await bench.verify("c@example.org") == [QUOTA]
        bench.services.clock.advance(0.1)
        assert await bench.verify("c@example.org") == [ACCEPTED]


async def test_a_late_4yz_is_remembered_for_one_attempt_within_an_hour() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await refused_late(bench, sink, LATER)
        bench.services.clock.advance(HOUR_S - 0.1)
        assert await bench.verify("c@example.org") == [LATER]
        assert await bench.verify("c@example.org") == [ACCEPTED]
        await refused_late(bench, sink, LATER)
        bench.services.clock.advance(HOUR_S)
        assert await bench.verify("c@example.org") == [ACCEPTED]


@pytest.mark.parametrize("word", [QUOTA, LATER])
async def test_a_late_refusal_of_everybody_is_the_answer_and_not_remembered(word: str) -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await bench.verify("b@example.org")
        sink.steps["rcpt"] = [say(word)]
        assert str((await bench.deliver("b@example.org")).reply) == word
        sink.steps.clear()
        assert await bench.verify("b@example.org") == [ACCEPTED]
        assert (await bench.deliver("b@example.org")).stored


async def test_a_late_refusal_is_for_its_sender_and_network_only() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await refused_late(bench, sink, QUOTA)
        same = [from_("192.0.2.1"), from_("192.0.2.200")]
        assert [await bench.verify("c@example.org", session=each) for each in same] == [[QUOTA]] * 2
        assert await bench.verify("c@example.org", session=from_("192.0.3.1")) == [ACCEPTED]
        assert await bench.verify("b@example.org") == [ACCEPTED]
        asked = replace(envelope("c@example.org"), mail_from=mailbox("z@example.net"))
        assert [str(reply) for reply in await bench.replies(asked)] == [ACCEPTED]
        asked = replace(asked, mail_from=None)
        assert [str(reply) for reply in await bench.replies(asked)] == [ACCEPTED]


async def test_a_network_is_a_24_or_a_64_and_the_families_are_apart() -> None:
    late = LateRefusals(FakeClock(), 10)
    asked, reply = envelope("b@example.org"), Reply(550, "5.2.2", "Full")
    (rcpt,) = asked.rcpts
    late.add(from_("2001:db8:1:2::3"), asked, rcpt, reply)
    assert late.of(from_("2001:db8:1:2:ffff::1"), asked, rcpt) == reply
    assert late.of(from_("2001:db8:1:3::3"), asked, rcpt) is None
    late.add(from_("0.0.1.7"), asked, rcpt, reply)
    assert late.of(from_("0.0.1.8"), asked, rcpt) == reply
    assert late.of(from_("::1:0:0:0:0"), asked, rcpt) is None


def test_late_refusals_are_bounded() -> None:
    late = LateRefusals(FakeClock(), 2)
    rcpts = [Recipient(mailbox(f"{name}@example.org")) for name in "abc"]
    for rcpt in rcpts:
        late.add(SESSION, envelope(), rcpt, Reply(550, "5.2.2", "Full"))
    assert [late.of(SESSION, envelope(), rcpt) is None for rcpt in rcpts] == [True, False, False]


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        (
            {"mail": [say("550 5.7.1 No")], "rcpt": say("503 5.5.1 MAIL first"), "data": say("503 -")},
            "refused",
        ),
        ({"rcpt": say("421 4.7.0 Enough", "close")}, "refused"),
        ({"rcpt": say("452 4.5.3 Too many")}, "refused"),
        ({"data": say("451 4.3.0 Later")}, "refused"),
        ({"dot": say("554 5.7.1 Spam")}, "refused"),
    ],
)
async def test_what_is_not_about_the_recipient_is_not_remembered(steps: dict[str, Any], error: str) -> None:
    async with Sink(**steps) as sink, relay_to(sink) as bench:
        assert (await bench.deliver("b@example.org")).error == error
        assert not bench.relay._late.entries
        sink.steps.clear()
        assert await bench.verify("b@example.org") == [ACCEPTED]


# --- too many recipients -----------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["452 4.5.3 Too many recipients", "452 Too many recipients"])
async def test_452_at_delivery_teaches_how_many_recipients_pass_for_a_day(word: str) -> None:
    names = [f"u{number}@example.org" for number in range(5)]
    async with Sink(rcpt=[OK, OK, OK, say(word), say(word)]) as sink, relay_to(sink) as bench:
        assert bench.relay.max_recipients("main") == 0
        delivery = await bench.deliver(*names)
        assert (delivery.reply, delivery.error) == (PARTIAL_REFUSAL, "partial")
        assert bench.relay.max_recipients("main") == 3
        # they are no worse than the others
        assert await bench.verify(*names) == [ACCEPTED] * 5
        bench.services.clock.advance(DAY_S - 0.1)
        assert bench.relay.max_recipients("main") == 3
        bench.services.clock.advance(0.1)
        assert bench.relay.max_recipients("main") == 0


async def test_452_at_rcpt_teaches_it_too() -> None:
    async with Sink(rcpt=[OK, say("452 4.5.3 Too many")]) as sink, relay_to(sink) as bench:
        words = await bench.verify("b@example.org", "c@example.org")
        assert words == [ACCEPTED, "452 4.5.3 Too many"]
        assert bench.relay.max_recipients("main") == 1


async def test_the_lowest_rcptmax_of_a_route_counts_and_what_was_taught_below_it() -> None:
    extensions = [(*EXTENSIONS, f"LIMITS RCPTMAX={number}") for number in (50, 20)]
    async with (
        Sink(extensions=extensions[0]) as one,
        Sink(extensions=extensions[1], rcpt=[OK, OK, say("452 4.5.3 Too many")]) as other,
        relay_to([[one, other]]) as bench,
    ):
        await bench.start()
        assert bench.relay.max_recipients("main") == 20
        await bench.relay._dialogues.drain()
        for _ in range(2):
            await bench.deliver(*(f"u{number}@example.org" for number in range(3)))
        assert bench.relay.max_recipients("main") == 2


# --- LMTP --------------------------------------------------------------------------------------------


async def test_lmtp_begins_with_lhlo_and_takes_one_recipient_at_a_time() -> None:
    async with Sink() as sink, relay_to(sink, protocol=Protocol.LMTP) as bench:
        assert bench.relay.max_recipients("main") == 1
        await bench.start()
        assert bench.relay.max_recipients("main") == 1
        assert await bench.verify("b@example.org", "c@example.org") == [ACCEPTED] * 2
        assert (await bench.deliver("b@example.org")).stored
        assert (await bench.deliver("c@example.org")).stored
        assert sink.commands[0] == b"LHLO gw.example.org"
        assert len(sink.peers) == 1
        assert [message.commands[1:] for message in sink.messages] == [
            (b"RCPT TO:<b@example.org>",),
            (b"RCPT TO:<c@example.org>",),
        ]
        delivery = await bench.deliver("b@example.org", "c@example.org")
        assert (delivery.reply.code, delivery.error) == (451, "internal")
        assert len(sink.messages) == 2


async def test_lmtp_has_no_helo_to_fall_back_to() -> None:
    async with Sink(ehlo=say("500 5.5.1 What")) as sink, relay_to(sink, protocol=Protocol.LMTP) as bench:
        assert (await bench.deliver()).error == "ehlo"
        assert sink.commands == [b"LHLO gw.example.org"]


@pytest.mark.parametrize(
    ("dot", "reply", "stored"),
    [
        (say("250 2.0.0 <b@example.org> Saved"), "250 2.0.0 <b@example.org> Saved", True),
        (say("552 5.2.2 Quota"), "552 5.2.2 Quota", False),
        (Do(b"250 2.0.0 Saved\r\n552 5.2.2 Quota\r\n"), "250 2.0.0 Saved", True),
    ],
)
async def test_the_reply_of_lmtp_behind_the_dot_is_the_recipient_s(dot: Do, reply: str, stored: bool) -> None:
    async with Sink(dot=dot) as sink, relay_to(sink, protocol=Protocol.LMTP) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.stored) == (reply, stored)


# --- size --------------------------------------------------------------------------------------------


async def test_a_message_above_the_size_of_the_route_is_refused_without_a_command() -> None:
    async with Sink(extensions=("PIPELINING", "SIZE 1000")) as sink, relay_to(sink) as bench:
        await bench.start()
        seen = list(sink.commands)
        for content in (Mail(size=1001), Generated(320)):
            delivery = await bench.deliver(content=content)
            assert (delivery.reply, delivery.stored, delivery.error) == (ROUTE_TOO_BIG, False, "refused")
        assert sink.commands == seen
        assert bench.services.log.lines == []
        assert (await bench.deliver(content=Mail(size=1000))).stored


async def test_the_smallest_size_of_the_hosts_counts() -> None:
    async with (
        Sink(extensions=("SIZE 1000",)) as one,
        Sink(extensions=("SIZE 2000",)) as other,
        Sink(extensions=("SIZE",)) as third,
        relay_to([[one, other], [third]]) as bench,
    ):
        await bench.start()
        assert bench.relay.refusal("main", envelope(size_hint=1001)) == ROUTE_TOO_BIG
        assert bench.relay.refusal("main", envelope(size_hint=1000)) is None
        assert (await bench.deliver(content=Mail(size=1001))).reply == ROUTE_TOO_BIG
