"""Asking about recipients: batches, what is remembered for how long, trouble."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.adapters.relay.cache import RecipientCache
from gateway.smtp.reply import (
    RECIPIENT_OK,
    Reply,
)
from tests.adapters.relaykit import (
    SESSION,
    SHORT,
    TROUBLE,
    both_loops,
    envelope,
    relay_to,
    turns,
)
from tests.adapters.sink import CLOSE, EXTENSIONS, HANG, OK, RESET, Do, Sink, say
from tests.fakes import FakeClock

# --- verify ------------------------------------------------------------------------------------------


@both_loops
async def test_recipients_are_asked_in_one_write_and_remembered() -> None:
    async with Sink(rcpt=[OK, say("550 5.1.1 No such user")]) as sink, relay_to(sink) as bench:
        words = ["250 2.1.5 Recipient ok", "550 5.1.1 No such user"]
        assert await bench.verify("b@example.org", "c@example.org", size_hint=99) == words
        (_, piece) = sink.peers[0].pieces
        assert piece == (
            b"MAIL FROM:<a@example.net> SIZE=99\r\n"
            b"RCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\nRSET\r\n"
        )
        assert await bench.verify("b@example.org", "c@example.org") == words
        assert await bench.verify("c@example.org", "d@example.org") == [words[1], words[0]]
        assert [line for line in sink.commands if line.startswith(b"RCPT")] == [
            b"RCPT TO:<b@example.org>",
            b"RCPT TO:<c@example.org>",
            b"RCPT TO:<d@example.org>",
        ]
        assert len(sink.peers) == 1


async def test_what_is_remembered_is_answered_without_suspending() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        asked = envelope("b@example.org")
        await bench.replies(asked)
        with pytest.raises(StopIteration) as stop:
            bench.replies(asked).__await__().send(None)
        assert [reply.code for reply in stop.value.value] == [250]


async def test_a_route_that_does_not_verify_takes_everybody_without_suspending() -> None:
    async with Sink() as sink, relay_to(sink, verify_recipients=False) as bench:
        with pytest.raises(StopIteration) as stop:
            bench.replies(envelope()).send(None)
        assert stop.value.value == [RECIPIENT_OK]
        assert sink.peers == []


async def test_remembered_words_expire() -> None:
    rcpt = [OK, say("550 5.1.1 No such user")]
    async with Sink(rcpt=rcpt) as sink, relay_to(sink) as bench:
        await bench.verify("b@example.org", "c@example.org")
        clock = bench.services.clock
        clock.advance(59.9)
        assert await bench.verify("c@example.org") == ["550 5.1.1 No such user"]
        clock.advance(0.1)
        assert await bench.verify("c@example.org") == ["250 2.1.5 Recipient ok"]
        asked = len(sink.commands)
        clock.advance(239.9)
        await bench.verify("b@example.org")
        assert len(sink.commands) == asked
        clock.advance(0.1)
        await bench.verify("b@example.org")
        assert len(sink.commands) == asked + 3


@pytest.mark.parametrize(
    "word", ["550 5.7.1 No", "450 4.1.1 Later", "550 No", "452 4.5.3 Many", "550 5.1.2 No"]
)
async def test_other_refusals_are_not_remembered(word: str) -> None:
    async with Sink(rcpt=[say(word)]) as sink, relay_to(sink) as bench:
        assert (await bench.verify("b@example.org"))[0].startswith(word[:3])
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]


@pytest.mark.parametrize("word", ["550 5.1.1 A", "550 5.1.6 B", "556 5.1.10 C"])
async def test_refusals_about_the_recipient_are_remembered(word: str) -> None:
    async with Sink(rcpt=[say(word)]) as sink, relay_to(sink) as bench:
        assert await bench.verify("b@example.org") == [word]
        assert await bench.verify("b@example.org") == [word]


async def test_nothing_is_remembered_where_the_cache_is_off() -> None:
    async with (
        Sink() as sink,
        relay_to(sink, recipient_cache_s=0, recipient_cache_negative_s=0) as bench,
    ):
        await bench.verify("b@example.org")
        await bench.verify("b@example.org")
        assert sink.commands.count(b"RCPT TO:<b@example.org>") == 2


async def test_the_oldest_word_is_forgotten_when_the_cache_is_full() -> None:
    async with Sink() as sink, relay_to(sink, recipient_cache_entries=2) as bench:
        for name in ("a", "b", "c", "c", "b", "a"):
            await bench.verify(f"{name}@example.org")
        asked = [line[9:10] for line in sink.commands if line.startswith(b"RCPT")]
        assert asked == [b"a", b"b", b"c", b"a"]


async def test_a_refused_sender_is_not_held_against_recipients() -> None:
    async with Sink(mail=[say("550 5.1.1 Bad sender")]) as sink, relay_to(sink) as bench:
        assert await bench.verify("b@example.org", "c@example.org") == ["550 5.1.1 Bad sender"] * 2
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]


@both_loops
async def test_at_most_eight_recipients_in_one_write() -> None:
    names = [f"u{number}@example.org" for number in range(20)]
    async with Sink() as sink, relay_to(sink) as bench:
        assert await bench.verify(*names) == ["250 2.1.5 Recipient ok"] * 20
        counts = [piece.count(b"RCPT") for piece in sink.peers[0].pieces[1:]]
        assert counts == [8, 8, 4]


@both_loops
async def test_a_connection_retires_after_eight_refusals() -> None:
    async with Sink(rcpt=say("550 5.7.1 No")) as sink, relay_to(sink) as bench:
        for _ in range(9):
            assert await bench.verify("b@example.org") == ["550 5.7.1 No"]
        assert len(sink.peers) == 2


@both_loops
async def test_a_connection_is_asked_for_no_more_refusals_than_it_has_left() -> None:
    names = [f"u{number}@example.org" for number in range(8)]
    async with Sink(rcpt=say("550 5.7.1 No")) as sink, relay_to(sink) as bench:
        for asked in (names[:5], names):
            assert await bench.verify(*asked) == ["550 5.7.1 No"] * len(asked)
        counts = [[piece.count(b"RCPT") for piece in peer.pieces if b"RCPT" in piece] for peer in sink.peers]
        assert counts == [[5, 3], [5]]


@both_loops
async def test_refusals_at_delivery_count_as_well() -> None:
    async with (
        Sink(rcpt=say("550 5.7.1 No"), data=say("554 5.5.1 No valid recipients")) as sink,
        relay_to(sink) as bench,
    ):
        for _ in range(5):
            assert (await bench.deliver()).error == "refused"
            await turns(lambda: bench.connections.get("in_use") is None)
        # two in each transaction: RCPT and DATA
        assert len(sink.peers) == 2


@both_loops
async def test_a_connection_retires_after_fifty_verifications() -> None:
    async with Sink() as sink, relay_to(sink, recipient_cache_s=0) as bench:
        for _ in range(51):
            await bench.verify("b@example.org")
        assert len(sink.peers) == 2


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@pytest.mark.parametrize("do", [CLOSE, RESET, say("421 4.4.2 Idle", "close")])
@both_loops
async def test_verify_replaces_a_used_up_connection_once(do: Do, pipelining: bool) -> None:
    extensions = EXTENSIONS if pipelining else ()
    async with Sink(extensions=extensions, mail=[OK, do]) as sink, relay_to(sink) as bench:
        await bench.verify("b@example.org")
        assert await bench.verify("c@example.org") == ["250 2.1.5 Recipient ok"]
        assert len(sink.peers) == 2


@pytest.mark.parametrize(
    ("step", "do", "error"),
    [
        ("banner", CLOSE, "banner"),
        ("ehlo", say("554 5.5.1 No"), "ehlo"),
        ("mail", CLOSE, "closed"),
        ("mail", HANG, "timeout"),
        ("rcpt", say("what"), "protocol"),
        ("rcpt", say("354 what"), "protocol"),
        ("rcpt", RESET, "closed"),
    ],
)
@both_loops
async def test_trouble_in_verify_defers_every_recipient(step: str, do: Do, error: str) -> None:
    steps: dict[str, Any] = {step: do, "helo": do}
    short: dict[str, Any] = SHORT if do.then == "hang" else {}
    async with Sink(**steps) as sink, relay_to(sink, **short) as bench:
        assert await bench.verify("b@example.org", "c@example.org") == [TROUBLE, TROUBLE]
        assert bench.errors == {error: 1}
        assert bench.failures[0]["step"] == "verify"


async def test_words_that_came_before_the_trouble_stand() -> None:
    async with Sink(rcpt=[say("550 5.1.1 No such user"), CLOSE]) as sink, relay_to(sink) as bench:
        assert await bench.verify("b@example.org", "c@example.org") == ["550 5.1.1 No such user", TROUBLE]


@both_loops
async def test_a_cancelled_verify_frees_its_connection() -> None:
    gate = asyncio.Event()
    async with Sink(mail=[Do(gate=gate)]) as sink, relay_to(sink, max_connections_per_host=1) as bench:
        asking = asyncio.create_task(bench.verify("b@example.org"))
        await sink.until(lambda sink: len(sink.commands) > 1)
        asking.cancel()
        await asyncio.wait((asking,))
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        gate.set()


@both_loops
async def test_an_envelope_that_cannot_be_written_is_our_trouble() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        assert await bench.verify("b@example.org", dsn_envid="x y") == [TROUBLE]
        assert (await bench.deliver(dsn_envid="x y")).error == "internal"
        assert bench.errors == {"internal": 2}
        assert not any(line.startswith(b"MAIL") for line in sink.commands)


async def test_nobody_to_ask_is_no_question() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        assert await bench.relay.verify(SESSION, envelope(), ()) == ()
        assert sink.peers == []


def test_shared_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.adapters.relay.cache._MAX_SHARED", 2)
    cache = RecipientCache(FakeClock(), positive_s=10, negative_s=10, max_entries=100)
    for number in range(5):
        word = Reply(250, "2.1.5", f"Ok {number}")
        cache.put(f"{number}@example.org", word)
        assert cache.get(f"{number}@example.org") == word
    assert len(cache._shared) <= 2
