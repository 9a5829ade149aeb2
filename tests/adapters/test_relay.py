"""Deliveries to a downstream that fails at every step: which class of reply, what is tried again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.adapters.relay import HostSettings
from gateway.session import BodyType
from gateway.smtp.client import ServerReply
from gateway.smtp.reply import (
    FINAL_REPLY_LOST,
    PARTIAL_REFUSAL,
)
from tests.adapters.relaykit import (
    LONG_S,
    MESSAGE,
    PREFIX,
    SESSION,
    SHORT,
    SHORT_GREETING,
    SHORT_S,
    TROUBLE,
    Mail,
    both_loops,
    relay_to,
    turns,
)
from tests.adapters.sink import CLOSE, EXTENSIONS, HANG, OK, RESET, Do, Sink, say

# --- the good case -----------------------------------------------------------------------------------


@both_loops
async def test_a_message_arrives_byte_for_byte_and_the_connection_is_reused() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        for number in (1, 2, 3):
            delivery = await bench.deliver("b@example.org", "c@example.org")
            assert (str(delivery.reply), delivery.stored) == (f"250 2.0.0 Stored as {number}", True)
            assert delivery.error == ""
        assert [message.wire for message in sink.messages] == [PREFIX + MESSAGE] * 3
        assert sink.messages[0].commands == (
            b"MAIL FROM:<a@example.net> SIZE=%d" % len(PREFIX + MESSAGE),
            b"RCPT TO:<b@example.org>",
            b"RCPT TO:<c@example.org>",
        )
        assert len(sink.peers) == 1
        assert bench.connections == {"idle": 1}
        assert bench.services.log.lines == []
        observed = bench.services.metrics.observed
        counts = {key[3]: len(seen) for key, seen in observed.items() if seen}
        assert counts == {"connect": 1, "deliver": 3, "final": 3}


@both_loops
async def test_commands_leave_in_one_write_and_content_in_another() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await bench.deliver()
        size = len(PREFIX + MESSAGE)
        assert sink.peers[0].pieces == [
            b"EHLO gw.example.org\r\n",
            b"MAIL FROM:<a@example.net> SIZE=%d\r\nRCPT TO:<b@example.org>\r\nDATA\r\n" % size,
            PREFIX + MESSAGE + b".\r\n",
        ]


@both_loops
async def test_a_downstream_that_knows_helo_only_gets_plain_mail() -> None:
    async with Sink(ehlo=say("502 5.5.1 What")) as sink, relay_to(sink) as bench:
        assert (await bench.deliver(body_type=BodyType.EIGHT_BIT)).stored
        assert sink.commands[:3] == [
            b"EHLO gw.example.org",
            b"HELO gw.example.org",
            b"MAIL FROM:<a@example.net>",
        ]


@both_loops
async def test_parameters_go_to_who_offered_them() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await bench.deliver(
            body_type=BodyType.EIGHT_BIT, smtputf8=True, dsn_ret="FULL", dsn_envid="X", content=Mail(size=7)
        )
        assert sink.messages[0].commands[0] == (
            b"MAIL FROM:<a@example.net> SIZE=7 BODY=8BITMIME SMTPUTF8 RET=FULL ENVID=X"
        )


# --- faults ------------------------------------------------------------------------------------------

LOST = str(FINAL_REPLY_LOST)
FAULTS: list[tuple[str, Do, str, str]] = [
    # before MAIL it is never the client's fault
    ("banner", say("421 4.3.2 Later"), TROUBLE, "banner"),
    ("banner", say("554 5.7.1 Go away"), TROUBLE, "banner"),
    ("banner", say("250 2.0.0 Hm"), TROUBLE, "banner"),
    ("banner", say("hello"), TROUBLE, "banner"),
    ("banner", CLOSE, TROUBLE, "banner"),
    ("banner", RESET, TROUBLE, "banner"),
    ("banner", HANG, TROUBLE, "banner"),
    ("ehlo", say("421 4.3.2 Later"), TROUBLE, "ehlo"),
    ("ehlo", say("354 go"), TROUBLE, "ehlo"),
    ("ehlo", CLOSE, TROUBLE, "ehlo"),
    ("ehlo", RESET, TROUBLE, "ehlo"),
    ("ehlo", HANG, TROUBLE, "ehlo"),
    ("ehlo", Do(b"250-" + b"x" * 200_000 + b"\r\n"), TROUBLE, "ehlo"),
    ("mail", say("451 4.3.0 Later"), "451 4.3.0 Later", "refused"),
    ("mail", say("550 5.7.1 No"), "550 5.7.1 No", "refused"),
    ("mail", say("550 5.7.1 No", "close"), "550 5.7.1 No", "refused"),
    ("mail", say("421 4.3.2 Bye", "close"), "451 4.3.2 Bye", "refused"),
    ("mail", say("521 5.3.2 No mail", "close"), "521 5.3.2 No mail", "refused"),
    ("mail", say("\x00\xff\x80"), TROUBLE, "protocol"),
    ("mail", CLOSE, TROUBLE, "closed"),
    ("mail", RESET, TROUBLE, "closed"),
    ("mail", HANG, TROUBLE, "timeout"),
    ("rcpt", say("450 4.2.1 Later"), "450 4.2.1 Later", "refused"),
    ("rcpt", say("550 5.1.1 No such user"), "550 5.1.1 No such user", "refused"),
    ("rcpt", say("354 go"), TROUBLE, "protocol"),
    ("rcpt", CLOSE, TROUBLE, "closed"),
    ("rcpt", HANG, TROUBLE, "timeout"),
    ("data", say("451 4.3.0 Later"), "451 4.3.0 Later", "refused"),
    ("data", say("554 5.3.0 No"), "554 5.3.0 No", "refused"),
    ("data", say("250 2.0.0 Hm"), TROUBLE, "protocol"),
    ("data", CLOSE, TROUBLE, "closed"),
    ("data", HANG, TROUBLE, "timeout"),
    ("data", Do(b"354 go\r\n250 2.0.0 Stored already\r\n"), TROUBLE, "protocol"),
    # behind the dot a duplicate is possible, a loss is not
    ("content", CLOSE, LOST, "final_lost"),
    ("dot", say("451 4.3.0 Later"), "451 4.3.0 Later", "refused"),
    ("dot", say("421 4.3.2 Bye", "close"), "451 4.3.2 Bye", "refused"),
    ("dot", say("554 5.7.1 Spam"), "554 5.7.1 Spam", "refused"),
    ("dot", say("354 more"), LOST, "final_lost"),
    ("dot", say("199 more"), LOST, "final_lost"),
    ("dot", say("garbage"), LOST, "final_lost"),
    ("dot", Do(b"250-" + b"x" * 200_000 + b"\r\n250 ok\r\n"), LOST, "final_lost"),
    ("dot", Do(b"250-" + b"x" * 100 + b"\r\n550 ok\r\n"), LOST, "final_lost"),
    ("dot", CLOSE, LOST, "final_lost"),
    ("dot", RESET, LOST, "final_lost"),
    ("dot", HANG, LOST, "final_lost"),
]


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@pytest.mark.parametrize(("step", "do", "reply", "error"), FAULTS)
@both_loops
async def test_a_fault_gives_its_class_and_the_next_message_passes(
    step: str, do: Do, reply: str, error: str, pipelining: bool
) -> None:
    extensions = EXTENSIONS if pipelining else ()
    steps: dict[str, Any] = {step: do, "helo": do} if step == "ehlo" else {step: [do]}
    short: dict[str, Any] = {}
    if do.then == "hang":
        short = SHORT_GREETING if step in ("banner", "ehlo") else SHORT
    async with Sink(extensions=extensions, **steps) as sink, relay_to(sink, **short) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (reply, error)
        assert not delivery.stored
        is_trouble = error != "refused"
        assert bench.errors == ({error: 1} if is_trouble else {})
        assert [(keys["step"], keys["error"]) for keys in bench.failures] == (
            [("deliver", error)] if is_trouble else []
        )
        if step != "ehlo":
            assert (await bench.deliver()).stored
        assert len([message for message in sink.messages if message.wire]) <= 2


@both_loops
async def test_a_downstream_that_does_not_listen_is_trouble() -> None:
    async with Sink() as sink:
        pass
    async with relay_to(sink) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "connect")
        assert await bench.verify("b@example.org", "c@example.org") == [TROUBLE, TROUBLE]
        assert bench.errors == {"connect": 2}
        async with sink:
            assert (await bench.deliver()).stored


async def test_a_name_that_does_not_resolve_is_trouble() -> None:
    async with Sink() as sink, relay_to(sink, host=HostSettings("nowhere.invalid", 25)) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "connect")


async def test_each_address_of_a_name_is_tried_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    asked: list[str] = []
    async with Sink() as sink:
        # the first one refuses: nobody listens on that port of ::1
        found = [(10, 1, 6, "", ("::1", sink.port, 0, 0)), (2, 1, 6, "", ("127.0.0.1", sink.port))]

        async def getaddrinfo(host: str, *args: Any, **keys: Any) -> Any:
            if host == "mta.example.org":
                asked.append(host)
                return found
            return await type(loop).getaddrinfo(loop, host, *args, **keys)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        host = HostSettings("mta.example.org", sink.port)
        async with relay_to(sink, host=host, idle_timeout_s=0.001) as bench:
            assert (await bench.deliver()).stored
            await sink.until(lambda sink: not sink.open_peers)
            assert (await bench.deliver()).stored
        assert asked == ["mta.example.org"]


@both_loops
async def test_250_counts_although_the_downstream_dies_behind_it() -> None:
    async with Sink(dot=say("250 2.0.0 Stored", "reset")) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.stored) == ("250 2.0.0 Stored", True)
        assert (await bench.deliver()).stored
        assert len(sink.messages) == 2


@both_loops
async def test_garbage_behind_250_costs_the_connection_only() -> None:
    async with Sink(dot=[Do(b"250 2.0.0 Stored\r\nwhat\r\n")]) as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 2


# --- several recipients ------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@both_loops
async def test_when_only_some_are_refused_nothing_is_sent(pipelining: bool) -> None:
    extensions = EXTENSIONS if pipelining else ()
    rcpt = [OK, say("550 5.1.1 No such user")]
    async with Sink(extensions=extensions, rcpt=rcpt) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver("b@example.org", "c@example.org", "d@example.org")
        assert (delivery.reply, delivery.error) == (PARTIAL_REFUSAL, "partial")
        assert not delivery.stored
        # pipelined, 354 was there already: closed without a dot; otherwise RSET
        if pipelining:
            await sink.until(lambda sink: not sink.open_peers)
        else:
            await sink.until(lambda sink: b"RSET" in sink.commands)
            assert b"DATA" not in sink.commands
        assert sink.messages == []


@both_loops
async def test_after_a_refusal_the_connection_is_reset_and_reused() -> None:
    async with Sink(mail=[say("550 5.7.1 No")], data=[say("503 5.5.1 No")]) as sink, relay_to(sink) as bench:
        assert str((await bench.deliver()).reply) == "550 5.7.1 No"
        await sink.until(lambda sink: b"RSET" in sink.commands)
        await turns(lambda: bench.connections == {"idle": 1})
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 1


@both_loops
async def test_a_reset_that_is_refused_costs_the_connection() -> None:
    steps: dict[str, Any] = {"mail": [say("550 5.7.1 No")], "data": [say("503 -")]}
    steps |= {"rset": say("421 4.3.2 Bye", "close")}
    async with Sink(**steps) as sink, relay_to(sink) as bench:
        await bench.deliver()
        await sink.until(lambda sink: sink.peers and not sink.open_peers)
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 2


async def test_a_late_refusal_forgets_what_was_remembered() -> None:
    async with Sink(rcpt=[OK, say("550 5.1.1 Gone")]) as sink, relay_to(sink) as bench:
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert str((await bench.deliver("b@example.org")).reply) == "550 5.1.1 Gone"
        sink.steps["rcpt"] = say("550 5.1.1 Gone")
        assert await bench.verify("b@example.org") == ["550 5.1.1 Gone"]


# --- reused connections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "do"),
    [
        ("mail", say("421 4.4.2 Idle too long", "close")),
        ("mail", CLOSE),
        ("mail", RESET),
        ("rcpt", say("421 4.7.0 Enough", "close")),
        ("data", say("421 4.7.0 Enough", "close")),
    ],
)
@both_loops
async def test_a_reused_connection_that_is_used_up_is_replaced_once(step: str, do: Do) -> None:
    steps: dict[str, Any] = {step: [OK, do]}
    async with Sink(**steps) as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        assert (await bench.deliver()).stored
        assert (len(sink.messages), len(sink.peers)) == (2, 2)
        assert bench.errors == {}


@both_loops
async def test_the_replacement_is_not_replaced() -> None:
    async with Sink(mail=[OK, CLOSE, CLOSE]) as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        assert str((await bench.deliver()).reply) == TROUBLE
        assert len(sink.peers) == 2


@pytest.mark.parametrize(
    ("step", "do"), [("rcpt", HANG), ("rcpt", CLOSE), ("data", HANG), ("mail", say("garbage"))]
)
@both_loops
async def test_other_trouble_is_not_tried_again(step: str, do: Do) -> None:
    steps: dict[str, Any] = {step: [OK, do]}
    async with Sink(**steps) as sink, relay_to(sink, reply_timeout_s=0.5) as bench:
        assert (await bench.deliver()).stored
        assert str((await bench.deliver()).reply) == TROUBLE
        assert len(sink.peers) == 1


@pytest.mark.parametrize("step", ["content", "dot"])
@pytest.mark.parametrize("do", [CLOSE, RESET, say("421 4.3.2 Bye", "close")])
@both_loops
async def test_nothing_is_tried_again_once_content_was_sent(step: str, do: Do) -> None:
    steps: dict[str, Any] = {step: [OK, do]}
    async with Sink(**steps) as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        delivery = await bench.deliver()
        assert delivery.reply.is_transient
        assert not delivery.stored
        assert len(sink.peers) == 1


@both_loops
async def test_an_idle_connection_that_the_downstream_closed_is_not_used() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        sink.peers[0].writer.write(b"421 4.4.2 Idle too long\r\n")
        sink.peers[0].writer.close()
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 2
        assert bench.errors == {}


@both_loops
async def test_an_idle_connection_ends_with_quit_in_time() -> None:
    async with Sink() as sink, relay_to(sink, idle_timeout_s=SHORT_S) as bench:
        assert (await bench.deliver()).stored
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.commands[-1] == b"QUIT"
        assert bench.connections == {}


@both_loops
async def test_a_connection_retires_after_its_share_of_transactions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.adapters.relay.pool._MAX_TRANSACTIONS", 2)
    async with Sink() as sink, relay_to(sink) as bench:
        for _ in range(5):
            assert (await bench.deliver()).stored
        assert len(sink.peers) == 3
        await sink.until(lambda sink: len(sink.open_peers) == 1)


@both_loops
async def test_a_connection_retires_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.adapters.relay.pool._MAX_AGE_S", 0.0)
    async with Sink() as sink, relay_to(sink) as bench:
        await bench.deliver()
        await bench.deliver()
        assert len(sink.peers) == 2


# --- cancellation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["banner", "ehlo", "mail", "data"])
@both_loops
async def test_cancelled_before_the_dot_nothing_is_delivered(step: str) -> None:
    gate = asyncio.Event()
    steps: dict[str, Any] = {step: [Do(gate=gate)]}
    async with Sink(**steps) as sink, relay_to(sink) as bench:
        delivery = asyncio.create_task(bench.deliver())
        await sink.until(
            lambda sink: sink.peers if step == "banner" else len(sink.commands) > (step != "ehlo")
        )
        delivery.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivery
        gate.set()
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.messages == []
        assert bench.connections == {}


@pytest.mark.parametrize(
    ("do", "event"),
    [
        (say("250 2.0.0 Stored"), {"orphan": 1}),
        (say("554 5.7.1 Spam"), {}),
        (CLOSE, {"final_lost": 1}),
    ],
)
@both_loops
async def test_cancelled_behind_the_dot_the_delivery_goes_on(do: Do, event: dict[str, float]) -> None:
    gate = asyncio.Event()
    held = Do(do.say, do.then, gate)
    async with Sink(dot=[held]) as sink, relay_to(sink) as bench:
        delivery = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: sink.messages)
        delivery.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivery
        assert bench.connections == {"in_use": 1}
        assert not sink.peers[0].is_closed
        gate.set()
        await bench.relay.close()
        assert bench.errors == event
        assert [line.event for line in bench.services.log.of("info")] == ["relay.orphaned"]
        assert len(sink.messages) == 1


@both_loops
async def test_the_connection_of_an_orphan_is_used_again() -> None:
    gate = asyncio.Event()
    async with Sink(dot=[Do(gate=gate)]) as sink, relay_to(sink, max_connections_per_host=1) as bench:
        delivery = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: sink.messages)
        delivery.cancel()
        second = asyncio.create_task(bench.deliver())
        await asyncio.wait((delivery,))
        gate.set()
        assert (await second).stored
        assert len(sink.peers) == 1
        assert bench.errors == {"orphan": 1}


@both_loops
async def test_a_reply_that_came_with_the_cancellation_is_not_lost() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        connection = await bench.pool.acquire(SESSION, asyncio.get_running_loop().time() + LONG_S)
        bench.pool.release(connection)
        delivery = asyncio.create_task(bench.deliver())
        complete = connection._complete

        def complete_and_cancel(waiter: asyncio.Future[list[ServerReply]]) -> None:
            # The reply is there; before the task runs, its caller gives up.
            complete(waiter)
            if sink.messages:
                delivery.cancel()

        connection._complete = complete_and_cancel  # type: ignore[method-assign]
        await asyncio.wait((delivery,))
        assert delivery.cancelled()
        await bench.relay.close()
        assert bench.errors == {"orphan": 1}
        assert len(sink.messages) == 1


@both_loops
async def test_close_waits_for_orphans_no_longer_than_it_may() -> None:
    async with Sink(dot=HANG) as sink, relay_to(sink, drain_timeout_s=SHORT_S) as bench:
        delivery = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: sink.messages)
        delivery.cancel()
        await asyncio.wait((delivery,))
        await bench.relay.close()
        await sink.until(lambda sink: not sink.open_peers)
