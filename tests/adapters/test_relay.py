"""The relay against a downstream that fails at every step: which class of reply, what is tried again, what is kept."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.relay import HostSettings, RelaySettings, RelaySettingsError, RouteSettings
from gateway.adapters.relay.outgoing import pieces, whole
from gateway.relaying import Offer
from gateway.session import BodyType
from gateway.smtp.client import ServerReply
from gateway.smtp.content import unstuff
from gateway.smtp.reply import (
    DOWNSTREAM_TROUBLE,
    FINAL_REPLY_LOST,
    INTERNAL,
    PARTIAL_REFUSAL,
    RECIPIENT_OK,
    ROUTE_NO_SMTPUTF8,
    ROUTE_TOO_BIG,
)
from tests.adapters.relaykit import (
    LONG_S,
    MESSAGE,
    PREFIX,
    Bench,
    Mail,
    both_loops,
    envelope,
    mailbox,
    relay_to,
)
from tests.adapters.sink import CLOSE, EXTENSIONS, HANG, OK, RESET, Do, Sink, say
from tests.fakes import FakeServices, LoopTime

TROUBLE = str(DOWNSTREAM_TROUBLE)
LOST = str(FINAL_REPLY_LOST)
SHORT_S = 0.05


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
        counts = {key[2]: len(seen) for key, seen in observed.items() if seen}
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

SHORT: dict[str, Any] = {"reply_timeout_s": SHORT_S, "final_timeout_s": SHORT_S}
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
    short: dict[str, Any] = SHORT if do.then == "hang" else {}
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


# --- reused connections --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("do", [HANG, say("garbage")])
@both_loops
async def test_other_trouble_is_not_tried_again(do: Do) -> None:
    async with Sink(mail=[OK, do]) as sink, relay_to(sink, reply_timeout_s=0.5) as bench:
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


# --- how many ----------------------------------------------------------------------------------------


@both_loops
async def test_no_more_connections_than_allowed_and_all_get_their_turn() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=3) as bench:
        deliveries = await asyncio.gather(*(bench.deliver() for _ in range(20)))
        assert all(delivery.stored for delivery in deliveries)
        assert len(sink.peers) == 3
        assert bench.connections == {"idle": 3}


@both_loops
async def test_who_waits_is_served_in_order() -> None:
    gate = asyncio.Event()
    order: list[int] = []
    async with Sink(dot=[Do(gate=gate)]) as sink, relay_to(sink, max_connections_per_host=1) as bench:

        async def one(number: int) -> None:
            assert (await bench.deliver()).stored
            order.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(one(number))
            await sink.until(lambda sink: sink.messages)
            gate.set()
        assert order == [0, 1, 2, 3, 4]
        assert len(sink.peers) == 1


@both_loops
async def test_waiting_for_a_connection_ends_with_the_budget() -> None:
    async with (
        Sink(dot=[HANG]) as sink,
        relay_to(sink, max_connections_per_host=1, deliver_timeout_s=0.2) as bench,
    ):
        first = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: sink.messages)
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "busy")
        first.cancel()
        await asyncio.wait((first,))
        bench.pool.abort()


@both_loops
async def test_a_caller_who_gave_up_waiting_loses_no_connection() -> None:
    gate = asyncio.Event()
    async with Sink(dot=[Do(gate=gate)]) as sink, relay_to(sink, max_connections_per_host=1) as bench:
        first = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: sink.messages)
        gone = asyncio.create_task(bench.deliver())
        last = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        gone.cancel()
        gate.set()
        assert (await first).stored
        assert (await last).stored
        assert gone.cancelled()
        assert len(sink.peers) == 1


@both_loops
async def test_a_caller_cancelled_while_being_served_passes_it_on() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=1) as bench:
        connection = await bench.pool.acquire(asyncio.get_running_loop().time() + LONG_S)
        gone = asyncio.create_task(bench.deliver())
        last = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        bench.pool.release(connection)  # goes to `gone`, which does not run before it is cancelled
        gone.cancel()
        assert (await last).stored
        assert gone.cancelled()
        assert bench.connections == {"idle": 1}


@both_loops
async def test_a_failed_connection_frees_its_slot_for_who_waits() -> None:
    async with (
        Sink(banner=[say("554 5.7.1 No", "close")]) as sink,
        relay_to(sink, max_connections_per_host=1) as bench,
    ):
        first, second = await asyncio.gather(bench.deliver(), bench.deliver())
        assert first.error == "banner"
        assert second.stored


# --- cancellation --------------------------------------------------------------------------------------


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
        connection = await bench.pool.acquire(asyncio.get_running_loop().time() + LONG_S)
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


# --- large content -------------------------------------------------------------------------------------


async def turns(claim: Callable[[], object]) -> None:
    """Let the loop turn until the claim is true, or often enough to see that it does not become so."""
    for _ in range(1000):
        if claim():
            return
        await asyncio.sleep(0)


BLOCK = b"x" * 62 + b"\r\n"


class Generated:
    """Blocks that are made when they are asked for."""

    prefix = PREFIX
    is_stuffed = True

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.asked = 0
        self.size_bytes = len(PREFIX) + blocks * 65536

    def blocks(self) -> Iterator[bytes]:
        for _ in range(self._blocks):
            self.asked += 1
            yield BLOCK * 1024


@both_loops
async def test_ten_mebibytes_arrive_in_flat_memory() -> None:
    async with Sink(content_after=10**9) as sink, relay_to(sink) as bench:
        await bench.deliver()
        sink.messages.clear()
        gate = asyncio.Event()
        sink.steps["content"] = [Do(gate=gate)]
        sink._content_after = 100_000
        content = Generated(160)
        tracemalloc.start()
        try:
            delivery = asyncio.create_task(bench.deliver(content=content))
            await sink.until(lambda sink: sink.content_bytes)
            # The sink does not read on: the relay fills the kernel's buffers and waits.
            (connection,) = bench.pool._used
            await turns(lambda: connection._drained)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        asked = content.asked
        assert asked < 160
        await turns(lambda: False)
        assert content.asked == asked
        # the sink's own buffers are in it
        assert peak < 2 * 2**20
        gate.set()
        assert (await delivery).stored
        assert sink.messages[0].wire == PREFIX + BLOCK * (1024 * 160)


@both_loops
async def test_a_downstream_that_takes_nothing_is_a_timeout_without_a_dot() -> None:
    async with (
        Sink(content=Do(gate=asyncio.Event())) as sink,
        relay_to(sink, reply_timeout_s=SHORT_S, deliver_timeout_s=0.5) as bench,
    ):
        delivery = await bench.deliver(content=Generated(400))
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "timeout")
        assert sink.messages == []


class Slow(Generated):
    """Each block takes `block_s` of the loop's time, which stands still otherwise."""

    def __init__(self, blocks: int, time: LoopTime, block_s: float) -> None:
        super().__init__(blocks)
        self._time, self._block_s = time, block_s

    def blocks(self) -> Iterator[bytes]:
        for block in super().blocks():
            self._time.advance(self._block_s)
            yield block


@pytest.mark.parametrize(("block_s", "is_stored"), [(5.0, True), (6.1, False)])
async def test_content_that_keeps_moving_may_exceed_the_budget_but_not_for_ever(
    block_s: float, is_stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    time = LoopTime(loop)
    monkeypatch.setattr(loop, "time", time)
    async with (
        Sink() as sink,
        relay_to(sink, deliver_timeout_s=60.0, deliver_moving_timeout_s=240.0, reply_timeout_s=60.0) as bench,
    ):
        delivery = await bench.deliver(content=Slow(40, time, block_s))
        assert delivery.stored == is_stored
        assert delivery.error == ("" if is_stored else "timeout")
        assert len(sink.messages) == is_stored


@pytest.mark.parametrize(
    ("do", "reply", "error"),
    [
        (say("552 5.3.4 Too big", "hang"), "552 5.3.4 Too big", "refused"),
        (say("250 2.0.0 Stored already", "hang"), TROUBLE, "protocol"),
        (RESET, TROUBLE, "closed"),
    ],
)
@both_loops
async def test_trouble_in_the_middle_of_content_ends_it_without_a_dot(do: Do, reply: str, error: str) -> None:
    async with Sink(content=do, content_after=100_000) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver(content=Generated(400))
        assert (str(delivery.reply), delivery.error) == (reply, error)
        assert sink.messages == []


@both_loops
async def test_cancelled_in_the_middle_of_content_there_is_no_dot() -> None:
    gate = asyncio.Event()
    async with Sink(content=Do(gate=gate)) as sink, relay_to(sink) as bench:
        delivery = asyncio.create_task(bench.deliver(content=Generated(400)))
        await sink.until(lambda sink: sink.content_bytes)
        delivery.cancel()
        await asyncio.wait((delivery,))
        gate.set()
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.messages == []
        assert delivery.cancelled()


class Unreadable(Generated):
    def blocks(self) -> Iterator[bytes]:
        yield BLOCK
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("content", [Unreadable, lambda size: Mail((b"open line",), size=size * 65536)])
@both_loops
async def test_content_that_cannot_be_read_is_our_trouble(size: int, content: Any) -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        made = content(size)
        delivery = await bench.deliver(content=made)
        assert (delivery.reply, delivery.error) == (INTERNAL, "internal")
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.messages == []


@both_loops
async def test_plain_content_is_stuffed() -> None:
    plain = Mail((b".a\r", b"\n.", b"\r\n", b"..\r\n.\r\n"), is_stuffed=False)
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver(content=plain)).stored
        assert (await bench.deliver(content=Mail(plain.pieces, is_stuffed=False, size=10**6))).stored
        for message in sink.messages:
            assert unstuff(message.wire) == PREFIX + b"".join(plain.pieces)
        assert len(sink.messages) == 2


async def test_empty_content_is_a_message_too() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver(content=Mail((), b""))).stored
        assert (await bench.deliver(content=Mail((), b"", size=10**6))).stored
        assert [message.wire for message in sink.messages] == [b"", b""]


@given(st.lists(st.lists(st.sampled_from([b".", b"\r\n", b"\r\n.", b"x", b"\r"])).map(b"".join)))
def test_whole_and_pieces_are_the_same_and_end_with_one_dot(blocks: list[bytes]) -> None:
    body = b"".join(blocks)
    content = Mail((*blocks, b"\r\n"), is_stuffed=False)
    wire = whole(content)
    assert wire == b"".join(pieces(content)) + b".\r\n"
    assert unstuff(wire[:-3]) == PREFIX + body + b"\r\n"
    assert wire.find(b"\r\n.\r\n") == len(wire) - 5


# --- verify --------------------------------------------------------------------------------------------


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
    async with Sink() as sink:
        route = RouteSettings(
            "main", ("*",), (HostSettings("127.0.0.1", sink.port),), verify_recipients=False
        )
        async with relay_to(sink, routes=(route,)) as bench:
            with pytest.raises(StopIteration) as stop:
                bench.replies(envelope()).send(None)
            assert stop.value.value == (RECIPIENT_OK,)
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


# --- what is offered -----------------------------------------------------------------------------------

CAUTIOUS = Offer(eightbitmime=True, smtputf8=False, dsn=False, size=0)


@both_loops
async def test_the_offer_is_cautious_until_the_downstream_answered() -> None:
    async with Sink(extensions=("DSN", "SMTPUTF8", "SIZE 1000")) as sink, relay_to(sink) as bench:
        assert bench.relay.offer() == CAUTIOUS
        assert bench.relay.refusal("main", envelope(smtputf8=True, size_hint=10**9)) is None
        await bench.relay.start()
        await sink.until(lambda sink: sink.commands)
        await turns(lambda: bench.relay.offer() != CAUTIOUS)
        assert bench.relay.offer() == Offer(eightbitmime=False, smtputf8=True, dsn=True, size=1000)


@both_loops
async def test_the_probe_goes_on_until_there_is_an_answer() -> None:
    async with (
        Sink(banner=[say("554 5.7.1 No", "close"), CLOSE]) as sink,
        relay_to(sink, probe_min_s=0.001) as bench,
    ):
        await bench.relay.start()
        await sink.until(lambda sink: sink.commands)
        assert len(sink.peers) == 3
        assert bench.errors == {"banner": 2}
        assert {keys["step"] for keys in bench.failures} == {"probe"}


@both_loops
async def test_each_new_connection_teaches_what_is_offered() -> None:
    async with Sink(dot=say("250 2.0.0 Stored", "close")) as sink, relay_to(sink) as bench:
        await bench.deliver()
        assert bench.relay.offer() == Offer(eightbitmime=True, smtputf8=True, dsn=True, size=10**9)
        sink.extensions = ("SIZE",)
        await sink.until(lambda sink: not sink.open_peers)
        await bench.deliver()
        assert bench.relay.offer() == Offer(eightbitmime=False, smtputf8=False, dsn=False, size=0)


async def test_what_a_route_is_known_not_to_take_is_refused() -> None:
    async with Sink(extensions=("SIZE 1000",)) as sink, relay_to(sink) as bench:
        await bench.deliver()
        assert bench.relay.refusal("main", envelope(size_hint=1000)) is None
        assert bench.relay.refusal("main", envelope(size_hint=1001)) == ROUTE_TOO_BIG
        assert bench.relay.refusal("main", envelope(smtputf8=True)) == ROUTE_NO_SMTPUTF8


@both_loops
async def test_smtputf8_that_vanished_is_refused_at_rcpt_and_deferred_later() -> None:
    async with Sink(extensions=("PIPELINING",)) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver(smtputf8=True)
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "smtputf8")
        assert await bench.verify("b@example.org", smtputf8=True) == [str(ROUTE_NO_SMTPUTF8)]
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (await bench.deliver()).stored


# --- life ------------------------------------------------------------------------------------------------


@both_loops
async def test_a_closed_relay_defers() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await bench.deliver()
        await bench.relay.close()
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "busy")
        assert await bench.verify("b@example.org") == [TROUBLE]
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.commands[-1] == b"QUIT"


@both_loops
async def test_close_sends_home_who_waits_and_ends_the_probe() -> None:
    async with (
        Sink(banner=HANG) as sink,
        relay_to(sink, max_connections_per_host=1, drain_timeout_s=SHORT_S) as bench,
    ):
        await bench.relay.start()
        await sink.until(lambda sink: sink.peers)
        waiting = asyncio.create_task(bench.deliver())
        opening = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        await bench.relay.close()
        waiting.cancel()
        opening.cancel()
        await asyncio.wait((waiting, opening))


# --- routes ----------------------------------------------------------------------------------------------


def routed(*routes: RouteSettings) -> Bench:
    services = FakeServices()
    settings = RelaySettings("gw.example.org", routes)
    from gateway.adapters.relay import SmtpRelay

    relay = SmtpRelay(settings, clock=services.clock, log=services.log, metrics=services.metrics)
    return Bench(relay, services)


HOST = (HostSettings("192.0.2.1", 25),)


def test_the_closest_domain_decides_the_route() -> None:
    relay = routed(
        RouteSettings("rest", ("*",), HOST),
        RouteSettings("own", ("example.org",), HOST),
        RouteSettings("below", (".example.org",), HOST),
        RouteSettings("deep", (".deep.example.org", "x.example.org"), HOST),
    ).relay
    routes = {
        "a@example.org": "own",
        "a@b.example.org": "below",
        "a@b.c.example.org": "below",
        "a@deep.example.org": "below",
        "a@b.deep.example.org": "deep",
        "a@x.example.org": "deep",
        "a@y.x.example.org": "below",
        "a@example.net": "rest",
        "a@org": "rest",
    }
    assert {text: relay.route(mailbox(text)) for text in routes} == routes


def test_no_route_takes_what_no_route_names() -> None:
    relay = routed(RouteSettings("own", ("example.org",), HOST)).relay
    assert relay.route(mailbox("a@example.net")) is None
    assert relay.route(mailbox("a@b.example.org")) is None


def test_literals_go_the_common_way_and_postmaster_always_goes() -> None:
    from gateway.smtp.address import AddressLiteral, Mailbox

    literal = Mailbox("a", AddressLiteral.parse("[192.0.2.1]"))
    postmaster = Mailbox("postmaster", None)
    own = routed(RouteSettings("own", ("example.org",), HOST)).relay
    rest = routed(RouteSettings("own", ("example.org",), HOST), RouteSettings("rest", ("*",), HOST)).relay
    assert (own.route(literal), own.route(postmaster)) == (None, "own")
    assert (rest.route(literal), rest.route(postmaster)) == ("rest", "rest")


def test_settings_that_are_not_built_yet_are_refused() -> None:
    for routes in (
        (),
        (RouteSettings("a", ("*",), ()),),
        (RouteSettings("a", ("*",), HOST * 2),),
        (RouteSettings("a", ("*",), HOST), RouteSettings("a", ("example.org",), HOST)),
    ):
        with pytest.raises(RelaySettingsError):
            routed(*routes)
