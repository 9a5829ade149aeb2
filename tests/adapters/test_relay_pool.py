"""The pool: how many connections there are, who waits, and how the relay ends."""

from __future__ import annotations

import asyncio

from tests.adapters.relaykit import (
    LONG_S,
    SESSION,
    SHORT_S,
    TROUBLE,
    both_loops,
    relay_to,
)
from tests.adapters.sink import HANG, Do, Sink, say

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
            assert sum(bench.services.metrics.of("mxgate_relay_waiting").values()) == 4
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
async def test_a_caller_who_gives_up_in_the_same_moment_is_passed_over() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=1) as bench:
        connection = await bench.pool.acquire(SESSION, asyncio.get_running_loop().time() + LONG_S)
        gone = asyncio.create_task(bench.deliver())
        last = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        gone.cancel()
        bench.pool.release(connection)
        assert (await last).stored
        assert gone.cancelled()
        assert len(sink.peers) == 1


@both_loops
async def test_a_caller_cancelled_while_being_served_passes_it_on() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=1) as bench:
        connection = await bench.pool.acquire(SESSION, asyncio.get_running_loop().time() + LONG_S)
        gone = asyncio.create_task(bench.deliver())
        last = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        bench.pool.release(connection)  # goes to `gone`, which does not run before it is cancelled
        gone.cancel()
        assert (await last).stored
        assert gone.cancelled()
        assert bench.connections == {"idle": 1}


@both_loops
async def test_a_fresh_connection_takes_the_place_of_the_one_that_idled_longest() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=2) as bench:
        deadline = asyncio.get_running_loop().time() + LONG_S
        first = await bench.pool.acquire(SESSION, deadline)
        second = await bench.pool.acquire(SESSION, deadline)
        bench.pool.release(first)
        bench.pool.release(second)
        third = await bench.pool.acquire(SESSION, deadline, fresh=True)
        assert third not in (first, second)
        assert bench.pool.take(SESSION) is second
        assert first.trouble
        bench.pool.release(third)
        bench.pool.release(second)


@both_loops
async def test_a_slot_that_came_too_late_goes_to_the_next() -> None:
    async with Sink() as sink, relay_to(sink, max_connections_per_host=1) as bench:
        connection = await bench.pool.acquire(SESSION, asyncio.get_running_loop().time() + LONG_S)
        gone = asyncio.create_task(bench.deliver())
        last = asyncio.create_task(bench.deliver())
        await asyncio.sleep(0)
        bench.pool.discard(connection)  # its slot goes to `gone`, which does not run before it is cancelled
        gone.cancel()
        assert (await last).stored
        assert gone.cancelled()
        assert len(sink.peers) == 2


@both_loops
async def test_a_failed_connection_frees_its_slot_for_who_waits() -> None:
    async with (
        Sink(banner=[say("554 5.7.1 No", "close")]) as sink,
        relay_to(sink, max_connections_per_host=1) as bench,
    ):
        first, second = await asyncio.gather(bench.deliver(), bench.deliver())
        assert first.error == "banner"
        assert second.stored


# --- life --------------------------------------------------------------------------------------------


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
