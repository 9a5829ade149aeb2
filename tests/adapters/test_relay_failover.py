"""Several downstreams: which one gets the mail, what makes a host go down and come up again, what follows trouble."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from gateway.adapters.relay import HostSettings, TlsMode
from tests.adapters.relaykit import SHORT_S, TROUBLE, both_loops, host_of, relay_to, turns
from tests.adapters.sink import CLOSE, EXTENSIONS, HANG, OK, Do, Sink, say

NEVER: dict[str, Any] = {"probe_min_s": 1000.0, "probe_max_s": 1000.0}
SOON: dict[str, Any] = {"probe_min_s": 0.001, "probe_max_s": 0.01}
# Long enough for a loaded machine to connect and greet.
HANG_S = 0.3


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port where connections are never established."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# --- the next one is tried ---------------------------------------------------------------------------

UNREACHABLE: list[tuple[str, dict[str, Any], str]] = [
    ("banner", {"banner": HANG}, "banner"),
    ("banner refused", {"banner": say("554 5.3.2 No", "close")}, "banner"),
    ("banner garbage", {"banner": say("hello")}, "banner"),
    ("banner close", {"banner": CLOSE}, "banner"),
    ("ehlo", {"ehlo": HANG}, "ehlo"),
    ("ehlo refused", {"ehlo": say("421 4.3.2 No", "close")}, "ehlo"),
    ("ehlo garbage", {"ehlo": say("hello")}, "ehlo"),
    ("tls", {}, "tls"),
]


@pytest.mark.parametrize(("name", "steps", "error"), UNREACHABLE, ids=[name for name, _, _ in UNREACHABLE])
@both_loops
async def test_the_next_host_takes_over_from_one_that_is_of_no_use(
    name: str, steps: dict[str, Any], error: str
) -> None:
    async with Sink(**steps) as ill, Sink() as well:
        tls = {"tls": TlsMode.ENCRYPT} if error == "tls" else {}
        groups = ((host_of(ill, **tls),), (host_of(well),))
        async with relay_to(ill, groups=groups, connect_timeout_s=HANG_S) as bench:
            assert (await bench.deliver()).stored
            assert bench.up == [False, True]
            assert bench.errors == {error: 1}
            assert [(line["host"], line["error"]) for line in bench.logged("relay.host_down")] == [
                (bench.hosts[0].name, error)
            ]
            # nothing failed for the mail
            assert bench.failures == []
            peers = len(ill.peers)
            assert (await bench.deliver()).stored
            assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
            assert len(ill.peers) == peers
            assert len(well.messages) == 2


@both_loops
async def test_the_next_host_takes_over_from_one_that_refuses_connections() -> None:
    async with Sink() as first, Sink() as second, relay_to([[first], [second]]) as bench:
        assert (await bench.deliver()).stored
        await first.__aexit__(None, None, None)
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (await bench.deliver()).stored
        assert (len(first.messages), len(second.messages)) == (1, 1)
        assert bench.up == [False, True]
        assert bench.errors == {"connect": 1}
        await first.__aenter__()


@both_loops
async def test_the_next_host_takes_over_from_one_that_never_connects() -> None:
    with full_backlog() as port:
        async with Sink() as well:
            groups = ((HostSettings("127.0.0.1", port),), (host_of(well),))
            async with relay_to(well, groups=groups, connect_timeout_s=HANG_S) as bench:
                begun = asyncio.get_running_loop().time()
                assert (await bench.deliver()).stored
                assert HANG_S * 0.9 < asyncio.get_running_loop().time() - begun < 10 * HANG_S
                assert bench.up == [False, True]
                assert bench.errors == {"connect": 1}


@both_loops
async def test_a_host_without_time_to_answer_is_not_taken_for_dead() -> None:
    async with (
        Sink(banner=HANG) as first,
        Sink(banner=HANG) as second,
        relay_to([[first], [second]], connect_timeout_s=1.0, deliver_timeout_s=1.2) as bench,
    ):
        assert str((await bench.deliver()).reply) == TROUBLE
        assert bench.up == [False, True]
        assert (len(first.peers), len(second.peers)) == (1, 1)


@both_loops
async def test_when_nobody_is_up_all_are_tried_in_order_of_preference() -> None:
    async with (
        Sink(banner=[CLOSE, CLOSE]) as first,
        Sink(banner=[CLOSE]) as second,
        relay_to([[first], [second]], **NEVER) as bench,
    ):
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "banner")
        assert bench.up == [False, False]
        assert [keys["host"] for keys in bench.failures] == [bench.hosts[1].name]
        assert (await bench.deliver()).stored
        assert bench.up == [False, True]
        assert (len(first.peers), len(second.messages)) == (2, 1)
        assert [line["host"] for line in bench.logged("relay.host_up")] == [bench.hosts[1].name]


@both_loops
async def test_a_single_host_that_is_down_is_tried_with_each_message() -> None:
    async with Sink(banner=[CLOSE]) as sink, relay_to(sink) as bench:
        assert str((await bench.deliver()).reply) == TROUBLE
        assert bench.up == [False]
        assert (await bench.deliver()).stored
        assert bench.up == [True]


@both_loops
async def test_who_waited_for_a_host_that_goes_down_is_served_by_another() -> None:
    gate = asyncio.Event()
    async with (
        Sink(banner=Do(b"", "close", gate)) as first,
        Sink() as second,
        relay_to([[first], [second]], max_connections_per_host=1, **NEVER) as bench,
    ):
        deliveries = [asyncio.create_task(bench.deliver()) for _ in range(3)]
        await first.until(lambda sink: sink.peers)
        gate.set()
        assert all(delivery.stored for delivery in await asyncio.gather(*deliveries))
        assert (len(first.peers), len(second.messages)) == (1, 3)
        assert bench.errors == {"banner": 1}


# --- preference and balance --------------------------------------------------------------------------


@both_loops
async def test_the_first_group_gets_everything_while_one_of_it_is_up() -> None:
    async with Sink() as one, Sink() as other, Sink() as spare, relay_to([[one, other], [spare]]) as bench:
        await asyncio.gather(*(bench.deliver() for _ in range(10)))
        assert (len(one.messages), len(other.messages), len(spare.peers)) == (5, 5, 0)
        bench.hosts[0].is_up = False
        for _ in range(3):
            await bench.deliver()
        assert (len(one.messages), len(other.messages), len(spare.peers)) == (5, 8, 0)


@both_loops
async def test_the_least_used_host_of_a_group_is_next() -> None:
    gate = asyncio.Event()
    async with Sink(dot=Do(gate=gate)) as slow, Sink() as fast, relay_to([[slow, fast]]) as bench:
        held = [asyncio.create_task(bench.deliver()) for _ in range(2)]
        await slow.until(lambda sink: sink.messages)
        for _ in range(5):
            assert (await bench.deliver()).stored
        assert len(slow.messages) == 1
        gate.set()
        assert all(delivery.stored for delivery in await asyncio.gather(*held))
        assert len(fast.messages) == 6


@both_loops
async def test_hosts_that_are_used_alike_take_turns() -> None:
    async with Sink() as one, Sink() as two, Sink() as three, relay_to([[one, two, three]]) as bench:
        for _ in range(9):
            assert (await bench.deliver()).stored
        assert [len(sink.messages) for sink in (one, two, three)] == [3, 3, 3]
        assert [len(sink.peers) for sink in (one, two, three)] == [1, 1, 1]


# --- health ------------------------------------------------------------------------------------------


@both_loops
async def test_a_host_that_is_down_is_probed_and_used_again() -> None:
    async with Sink() as first, Sink() as second, relay_to([[first], [second]], **SOON) as bench:
        await bench.start()
        await first.__aexit__(None, None, None)
        assert (await bench.deliver()).stored
        assert len(second.messages) == 1
        await bench.until(lambda: bench.up == [False, True])
        await bench.until(lambda: len(bench.failures) >= 2)
        assert {(keys["step"], keys["error"]) for keys in bench.failures} == {("probe", "connect")}
        async with first:
            await bench.until(lambda: bench.up == [True, True])
            assert (await bench.deliver()).stored
            assert (len(first.messages), len(second.messages)) == (1, 1)
            assert len(bench.logged("relay.host_down")) == len(bench.logged("relay.host_up")) == 1
        await first.__aenter__()


async def test_probes_become_rarer_and_start_anew_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    pauses: list[float] = []
    later = loop.call_later

    def call_later(delay: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
        if "_begin_probe" not in str(callback):
            return later(delay, callback, *args)
        pauses.append(delay)
        return later(0, callback, *args)

    monkeypatch.setattr(loop, "call_later", call_later)
    async with (
        Sink(banner=[*[CLOSE] * 7, OK, CLOSE]) as sink,
        relay_to(sink, probe_min_s=1.0, probe_max_s=30.0, idle_timeout_s=SHORT_S) as bench,
    ):
        await bench.start()
        await bench.until(lambda: bench.up == [True])
        assert pauses == [1, 2, 4, 8, 16, 30, 30]
        await sink.until(lambda sink: not sink.open_peers)
        assert not (await bench.deliver()).stored
        await bench.until(lambda: bench.up == [True])
        assert pauses[7:] == [1]


@both_loops
async def test_idle_connections_of_a_host_that_goes_down_are_closed() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        await asyncio.gather(*(bench.deliver() for _ in range(3)))
        assert bench.connections == {"idle": 3}
        used = bench.pool.take(None)
        sink.steps["banner"] = CLOSE
        deadline = asyncio.get_running_loop().time() + 10
        with pytest.raises(Exception, match="closed"):
            await bench.pool.acquire(None, deadline, fresh=True)
        assert bench.up == [False]
        assert bench.connections == {"in_use": 1}
        await sink.until(lambda sink: len(sink.open_peers) == 1)
        assert used is not None
        bench.pool.release(used)
        assert bench.connections == {"idle": 1}


@pytest.mark.parametrize(
    ("step", "do", "error"),
    [
        ("mail", say("garbage"), "protocol"),
        ("rcpt", CLOSE, "closed"),
        ("data", HANG, "timeout"),
        ("dot", CLOSE, "final_lost"),
        ("dot", HANG, "final_lost"),
    ],
)
@both_loops
async def test_trouble_in_a_dialogue_starts_one_probe_that_decides(step: str, do: Do, error: str) -> None:
    gate = asyncio.Event()
    steps: dict[str, Any] = {step: do}
    async with (
        Sink(**steps) as sink,
        relay_to(sink, reply_timeout_s=HANG_S, final_timeout_s=HANG_S, **NEVER) as bench,
    ):
        await bench.start()
        # each delivery opens a connection of its own, and the probe behind them one more, which waits
        sink.steps["banner"] = [OK, OK, Do(gate=gate)]
        assert bench.pool.take(None) is not None
        deliveries = await asyncio.gather(bench.deliver(), bench.deliver())
        assert {delivery.error for delivery in deliveries} == {error}
        await sink.until(lambda sink: len(sink.peers) == 4)
        assert bench.up == [True]
        await turns(lambda: False)
        assert len(sink.peers) == 4
        gate.set()
        await bench.probed()
        await sink.until(lambda sink: sink.commands.count(b"EHLO gw.example.org") == 4)
        assert bench.errors == {error: 2}


@both_loops
async def test_a_probe_that_fails_after_trouble_takes_the_host_down() -> None:
    async with Sink(rcpt=CLOSE) as sink, relay_to(sink, **NEVER) as bench:
        await bench.start()
        sink.steps["banner"] = CLOSE
        assert (await bench.deliver()).error == "closed"
        await bench.until(lambda: bench.up == [False])
        (down,) = bench.logged("relay.host_down")
        assert (down["route"], down["host"], down["error"]) == ("main", bench.hosts[0].name, "banner")


@both_loops
async def test_refusals_are_no_trouble() -> None:
    async with Sink(mail=say("451 4.3.0 Later")) as sink, relay_to(sink) as bench:
        await bench.start()
        await bench.deliver()
        await turns(lambda: False)
        assert len(sink.peers) == 1
        assert bench.up == [True]


@both_loops
async def test_the_probe_does_not_exceed_the_limit_and_goes_first() -> None:
    gate = asyncio.Event()
    async with (
        Sink(dot=[say("what"), Do(gate=gate)]) as sink,
        relay_to(sink, max_connections_per_host=1, **NEVER) as bench,
    ):
        await bench.start()
        first = asyncio.create_task(bench.deliver())
        second = asyncio.create_task(bench.deliver())
        assert (await first).error == "final_lost"
        await sink.until(lambda sink: len(sink.messages) == 2)
        gate.set()
        assert (await second).stored
        await bench.probed()
        assert max(len(sink.open_peers), 1) == 1
        assert bench.up == [True]


# --- a connection that was used up -------------------------------------------------------------------


@both_loops
async def test_a_reused_connection_that_hangs_is_replaced_by_one_of_another_host() -> None:
    async with (
        Sink(mail=[OK, HANG]) as first,
        Sink() as second,
        relay_to([[first], [second]], connect_timeout_s=HANG_S, **NEVER) as bench,
    ):
        await bench.start()
        assert (await bench.deliver()).stored
        first.steps["banner"] = HANG
        begun = asyncio.get_running_loop().time()
        assert (await bench.deliver()).stored
        assert asyncio.get_running_loop().time() - begun < 10 * HANG_S
        assert (len(first.messages), len(second.messages)) == (1, 1)
        # one mail has found out, the next ones go round it while the probe is under way
        assert (await bench.deliver()).stored
        assert (len(first.peers), len(second.messages)) == (2, 2)
        assert [keys["error"] for keys in bench.failures] == ["timeout"]
        # trouble has started a probe, and that one finds the host down
        await bench.until(lambda: bench.up == [False, True])
        assert bench.errors == {"timeout": 1, "banner": 1}


@both_loops
async def test_a_reused_connection_that_hangs_is_replaced_at_a_single_host_too() -> None:
    async with Sink(mail=[OK, HANG]) as sink, relay_to(sink, connect_timeout_s=HANG_S) as bench:
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 2
        assert bench.errors == {"timeout": 1}


@both_loops
async def test_a_verification_that_hangs_on_a_reused_connection_is_repeated_elsewhere() -> None:
    async with (
        Sink(mail=[OK, HANG]) as first,
        Sink() as second,
        relay_to([[first], [second]], connect_timeout_s=HANG_S) as bench,
    ):
        assert (await bench.deliver()).stored
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (len(first.peers), len(second.peers)) == (1, 1)


@both_loops
async def test_once_a_reply_has_come_the_others_have_the_time_of_a_reply() -> None:
    gate = asyncio.Event()
    async with Sink(rcpt=[OK, Do(gate=gate)]) as sink, relay_to(sink, connect_timeout_s=HANG_S) as bench:
        assert (await bench.deliver()).stored
        slow = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: len(sink.commands) > 4)
        await asyncio.wait((slow,), timeout=2 * HANG_S)
        assert not slow.done()
        gate.set()
        assert (await slow).stored
        assert len(sink.peers) == 1


@both_loops
async def test_the_first_reply_of_a_fresh_connection_has_the_time_of_a_reply() -> None:
    gate = asyncio.Event()
    async with Sink(mail=Do(gate=gate)) as sink, relay_to(sink, connect_timeout_s=HANG_S) as bench:
        slow = asyncio.create_task(bench.deliver())
        await sink.until(lambda sink: len(sink.commands) > 1)
        await asyncio.wait((slow,), timeout=2 * HANG_S)
        assert not slow.done()
        gate.set()
        assert (await slow).stored


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@pytest.mark.parametrize("do", [CLOSE, say("421 4.3.2 Bye", "close")])
@both_loops
async def test_a_fresh_connection_that_ends_is_replaced_by_one_of_another_host(
    do: Do, pipelining: bool
) -> None:
    extensions = EXTENSIONS if pipelining else ()
    async with (
        Sink(extensions=extensions, mail=do) as first,
        Sink(extensions=extensions) as second,
        relay_to([[first], [second]]) as bench,
    ):
        assert (await bench.deliver()).stored
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (len(first.peers), len(second.messages)) == (2, 1)
        assert bench.errors == ({"closed": 2} if do is CLOSE else {})


@both_loops
async def test_where_every_host_ends_it_the_client_comes_again() -> None:
    async with Sink(mail=CLOSE) as one, Sink(mail=CLOSE) as other, relay_to([[one, other]]) as bench:
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "closed")
        assert (len(one.peers), len(other.peers)) == (1, 1)
        assert bench.errors == {"closed": 2}


@both_loops
async def test_where_the_other_host_cannot_be_reached_either_the_client_comes_again() -> None:
    async with (
        Sink(mail=CLOSE) as first,
        Sink(banner=CLOSE) as second,
        relay_to([[first], [second]]) as bench,
    ):
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "banner")
        # what each attempt met is told
        assert [(keys["host"], keys["error"]) for keys in bench.failures] == [
            (bench.hosts[0].name, "closed"),
            (bench.hosts[1].name, "banner"),
        ]
        assert bench.up == [True, False]
        assert (len(first.peers), len(second.peers)) == (1, 1)


@pytest.mark.parametrize("do", [CLOSE, HANG, say("what"), say("421 4.3.2 Bye", "close")])
@pytest.mark.parametrize("step", ["content", "dot"])
@both_loops
async def test_nothing_goes_to_another_host_once_content_was_sent(step: str, do: Do) -> None:
    steps: dict[str, Any] = {step: do}
    async with (
        Sink(**steps) as first,
        Sink() as second,
        relay_to([[first], [second]], final_timeout_s=HANG_S) as bench,
    ):
        delivery = await bench.deliver()
        assert delivery.reply.is_transient
        assert not delivery.stored
        assert second.peers == []


# --- what is shown -----------------------------------------------------------------------------------


@both_loops
async def test_the_state_names_each_host_and_its_last_error() -> None:
    async with (
        Sink(banner=CLOSE) as first,
        Sink(rcpt=[OK, CLOSE]) as second,
        relay_to([[first], [second]]) as bench,
    ):
        assert (await bench.deliver()).stored
        one, other = (host.name for host in bench.hosts)
        ill = {"host": one, "up": False, "in_use": 0, "idle": 0, "last_error": "banner"}
        well = {"host": other, "up": True, "in_use": 0, "idle": 1, "last_error": ""}
        assert bench.relay.state() == {"routes": [{"name": "main", "hosts": [ill, well]}]}
        await bench.deliver()
        well |= {"idle": 0, "last_error": "closed"}
        assert bench.relay.state() == {"routes": [{"name": "main", "hosts": [ill, well]}]}
