"""Names of downstreams: how often they are resolved, which address is next, what becomes of connections to old ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.adapters.relay import HostSettings
from tests.adapters.relaykit import TROUBLE, relay_to
from tests.adapters.sink import CLOSE, HANG, Do, Sink
from tests.e2e.net import free_port
from tests.fakes import LoopTime

NAME = "mta.example.org"


class Zone:
    """What the system answers for NAME; `gate` holds the answer back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses: tuple[str, ...] = addresses
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "getaddrinfo", self._answer)
        self.time = LoopTime(loop)
        monkeypatch.setattr(loop, "time", self.time)
        self._loop = loop

    async def _answer(self, host: str, port: int, **keys: Any) -> Any:
        if host != NAME:
            return await type(self._loop).getaddrinfo(self._loop, host, port, **keys)
        self.asked += 1
        await self.gate.wait()
        if not self.addresses:
            raise OSError(-3, "Temporary failure in name resolution")
        return [(2, 1, 6, "", (address, port)) for address in self.addresses]


def named(sink: Sink) -> HostSettings:
    return HostSettings(NAME, sink.port)


async def test_connections_start_at_the_next_address_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch, "127.0.0.1", "127.0.0.2")
    async with (
        Sink(port=free_port()) as one,
        Sink(address="127.0.0.2", port=one.port) as two,
        relay_to(one, host=named(one)) as bench,
    ):
        deliveries = await asyncio.gather(*(bench.deliver() for _ in range(4)))
        assert all(delivery.stored for delivery in deliveries)
        assert (len(one.peers), len(two.peers)) == (2, 2)
        assert zone.asked == 1


@pytest.mark.parametrize("banner", [None, CLOSE], ids=["refuses", "closes"])
async def test_an_address_that_fails_is_tried_last_until_the_next_answer(
    banner: Do | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = Zone(monkeypatch, "127.0.0.1", "127.0.0.2")
    async with Sink(port=free_port()) as well, Sink(address="127.0.0.2", port=well.port) as ill:
        if banner is None:
            await ill.__aexit__(None, None, None)
        else:
            ill.steps["banner"] = banner
        async with relay_to(well, host=named(well)) as bench:
            deliveries = await asyncio.gather(*(bench.deliver() for _ in range(4)))
            assert all(delivery.stored for delivery in deliveries)
            seen = len(ill.peers)
            bench.pool.dismiss()
            assert all(d.stored for d in await asyncio.gather(*(bench.deliver() for _ in range(2))))
            assert len(ill.peers) == seen
            # the host as a whole is well
            assert bench.up == [True]
            assert bench.errors == {}
            assert zone.asked == 1
        if banner is None:
            await ill.__aenter__()


async def test_addresses_that_hang_share_the_time_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3")
    async with (
        Sink(banner=HANG) as one,
        Sink(banner=HANG, address="127.0.0.2", port=one.port) as two,
        Sink(address="127.0.0.3", port=one.port) as three,
        relay_to(one, host=named(one), connect_timeout_s=10.0, deliver_timeout_s=100.0) as bench,
    ):
        delivery = asyncio.create_task(bench.deliver())
        begun = zone.time()
        while not delivery.done():
            zone.time.advance(0.01)
            await asyncio.sleep(0)
        # ten seconds to connect and ten to greet
        assert 19 < zone.time() - begun < 21
        assert len(two.peers) == 1
        assert (await delivery).error == "banner"
        assert bench.up == [False]
        # the next attempt begins with the third
        assert three.peers == []
        assert (await bench.deliver()).stored
        assert len(three.peers) == 1


async def test_a_name_is_resolved_anew_after_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch, "127.0.0.1")
    async with (
        Sink(port=free_port()) as one,
        Sink(address="127.0.0.2", port=one.port) as two,
        relay_to(one, host=named(one), idle_timeout_s=1.0) as bench,
    ):
        assert (await bench.deliver()).stored
        zone.addresses = ("127.0.0.2",)
        zone.time.advance(29.9)
        await one.until(lambda sink: not sink.open_peers)
        assert (await bench.deliver()).stored
        zone.time.advance(0.1)
        # still idle, but what it leads to is not known to be wrong yet
        assert (await bench.deliver()).stored
        assert (len(one.messages), len(two.messages), zone.asked) == (3, 0, 1)
        bench.pool.dismiss()
        assert (await bench.deliver()).stored
        assert (len(one.messages), len(two.messages), zone.asked) == (3, 1, 2)


async def test_a_connection_to_an_address_that_is_gone_retires_at_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zone = Zone(monkeypatch, "127.0.0.1")
    gate = asyncio.Event()
    async with (
        Sink(dot=Do(gate=gate)) as old,
        Sink(address="127.0.0.2", port=old.port) as new,
        relay_to(old, host=named(old), final_timeout_s=100.0) as bench,
    ):
        held = asyncio.create_task(bench.deliver())
        await old.until(lambda sink: sink.messages)
        zone.addresses = ("127.0.0.2",)
        zone.time.advance(30)
        assert (await bench.deliver()).stored
        gate.set()
        assert (await held).stored
        await old.until(lambda sink: not sink.open_peers)
        assert old.commands[-1] == b"QUIT"
        assert bench.connections == {"idle": 1}
        assert len(new.open_peers) == 1


async def test_when_every_address_fails_the_next_attempt_resolves_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zone = Zone(monkeypatch, "127.0.0.1", "127.0.0.3")
    async with Sink(port=free_port()) as gone, Sink(address="127.0.0.2", port=gone.port) as new:
        await gone.__aexit__(None, None, None)
        async with relay_to(new, host=named(new)) as bench:
            delivery = await bench.deliver()
            assert (str(delivery.reply), delivery.error) == (TROUBLE, "connect")
            zone.addresses = ("127.0.0.2",)
            assert (await bench.deliver()).stored
            assert zone.asked == 2
        await gone.__aenter__()


async def test_many_who_wait_ask_once_and_who_gives_up_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch, "127.0.0.1")
    zone.gate.clear()
    async with Sink() as sink, relay_to(sink, host=named(sink)) as bench:
        gone, *rest = [asyncio.create_task(bench.deliver()) for _ in range(5)]
        for _ in range(10):
            await asyncio.sleep(0)
        gone.cancel()
        zone.gate.set()
        assert all(delivery.stored for delivery in await asyncio.gather(*rest))
        assert zone.asked == 1


async def test_a_name_that_does_not_resolve_in_time_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch, "127.0.0.1")
    zone.gate.clear()
    async with Sink() as sink, relay_to(sink, host=named(sink), connect_timeout_s=10.0) as bench:
        delivery = asyncio.create_task(bench.deliver())
        for _ in range(10):
            await asyncio.sleep(0)
        zone.time.advance(10)
        assert (await delivery).error == "connect"
        assert "cannot resolve" in bench.failures[0]["detail"]
        assert bench.up == [False]


async def test_a_failed_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch)
    async with Sink() as sink, relay_to(sink, host=named(sink)) as bench:
        assert (await bench.deliver()).error == "connect"
        zone.addresses = ("127.0.0.1",)
        assert (await bench.deliver()).stored
        assert zone.asked == 2


async def test_an_address_needs_no_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(monkeypatch)
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver()).stored
        assert zone.asked == 0
