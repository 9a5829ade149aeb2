"""A guarded store on a real Redis that is ill in every way that we know of, asked 50 times a second.

Whatever it has: every question is answered within 300 ms, in the mode that the operator chose; the gauge tells; and
within 5 s after the repair the store is used again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from gateway.adapters.store.guarded import GuardedStore, StoreMetrics
from gateway.policy import OnError
from gateway.services import Instruments
from gateway.store import Keyspace, StoreDownError
from tests.adapters.store.conftest import eventually, redis_store
from tests.adapters.store.faulty import Fault, FaultyProxy, faulty_proxy
from tests.e2e.redis import RedisCluster, RedisServer, SentinelGroup
from tests.fakes import FakeLog, FakeMetrics

pytestmark = pytest.mark.e2e

TTL_S = 600.0
RATE = 50
WORST_S = 0.3
REPAIRED_WITHIN_S = 5.0


class _Clock:
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class Gateway:
    """What of a worker matters here: the guard, and traffic on it."""

    def __init__(self, url: str, on_outage: OnError | None) -> None:
        self.log = FakeLog()
        self.metrics = FakeMetrics()
        self.store = redis_store(url, timeout_s=0.1)
        self.on_outage = on_outage
        self.guard = GuardedStore(
            self.store,
            name="redis",
            timeout_s=0.1,
            on_outage=on_outage,
            probe_prefix="mxgate:",
            instruments=Instruments(_Clock(), self.log, self.metrics),
            metrics=StoreMetrics(self.metrics),
        )
        self.keys = Keyspace(self.guard, f"mxgate:faults-{time.time_ns()}:")
        self.took: list[float] = []
        self.asked = 0

    def is_down(self) -> bool:
        return self.metrics["mxgate_store_outage"] == 1

    async def ask(self) -> None:
        """What a greylist asks at RCPT."""
        self.asked += 1
        begun = time.perf_counter()
        try:
            await self.keys.ask_together(
                self.keys.put_if_absent(f"triplet{self.asked}", b"1", ttl_s=TTL_S), self.keys.get("client")
            )
        except StoreDownError as exc:
            assert exc.on_outage is self.on_outage  # noqa: PT017 - only the modes that raise get here
        self.took.append(time.perf_counter() - begun)

    async def traffic(self) -> None:
        """50 questions a second, none waits for another."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self.ask())
                await asyncio.sleep(1 / RATE)

    async def until(self, is_down: bool, within_s: float, what: str) -> None:
        async def as_wanted() -> bool:
            return self.is_down() is is_down

        await eventually(as_wanted, within_s=within_s, what=what)

    def assert_quick(self) -> None:
        """The 99th percentile; the loop of a busy machine may stop for a moment."""
        took = sorted(self.took)
        assert took[int(len(took) * 0.99)] < WORST_S, took[-5:]


@asynccontextmanager
async def gateway(url: str, on_outage: OnError | None = None) -> AsyncIterator[Gateway]:
    """One with traffic."""
    made = Gateway(url, on_outage)
    await made.guard.start()
    traffic = asyncio.create_task(made.traffic())
    try:
        yield made
    finally:
        traffic.cancel()
        await asyncio.wait([traffic])
        await made.guard.close()
        await made.store.close()
        if not traffic.cancelled():
            traffic.result()


async def assert_outage_is_survived(gate: Gateway) -> None:
    """To be entered while the store is ill: the gauge flips, and questions are answered meanwhile."""
    await gate.until(True, 3, "the gauge tells of the outage")
    asked = gate.asked

    async def goes_on() -> bool:
        return gate.asked > asked + 40

    await eventually(goes_on, within_s=5, what="questions go on")
    assert gate.is_down()


async def assert_normal_again(gate: Gateway, within_s: float = REPAIRED_WITHIN_S) -> None:
    """To be entered right after the repair."""
    await gate.until(False, within_s, "the store is used again")
    before = gate.metrics["mxgate_store_operations_total", "get", "store"]

    async def counts() -> bool:
        return gate.metrics["mxgate_store_operations_total", "get", "store"] > before + 5

    await eventually(counts, within_s=2, what="the store answers")
    gate.assert_quick()


@contextmanager
def own_server(*options: str) -> Iterator[RedisServer]:
    server = RedisServer(*options)
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def proxied(server: RedisServer) -> AsyncIterator[FaultyProxy]:
    async with faulty_proxy(server.address) as proxy:
        yield proxy


@pytest.mark.parametrize("on_outage", [None, OnError.CONTINUE, OnError.DEFER])
@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.SLOW, Fault.GARBAGE, Fault.CLOSE])
async def test_between_us_and_redis(
    redis_server: RedisServer, fault: Fault, on_outage: OnError | None
) -> None:
    async with proxied(redis_server) as proxy, gateway(proxy.url, on_outage) as gate:
        await assert_normal_again(gate)
        proxy.fault = fault
        await assert_outage_is_survived(gate)
        proxy.fault = Fault.NONE
        await assert_normal_again(gate)
        by = "local" if on_outage is None else "nobody"
        assert gate.metrics["mxgate_store_operations_total", "get", by] > 20


async def test_refused(redis_server: RedisServer) -> None:
    async with proxied(redis_server) as proxy, gateway(proxy.url) as gate:
        await assert_normal_again(gate)
        await proxy.stop()
        await assert_outage_is_survived(gate)
        assert gate.guard.state()["last_error"] == "connect"
        await proxy.start()
        await assert_normal_again(gate)


async def test_not_there_at_the_start(redis_server: RedisServer) -> None:
    async with proxied(redis_server) as proxy:
        await proxy.stop()
        async with gateway(proxy.url) as gate:
            assert gate.is_down()
            await assert_outage_is_survived(gate)
            await proxy.start()
            await assert_normal_again(gate)


async def test_killed_and_started_again() -> None:
    with own_server() as server:
        async with gateway(server.url) as gate:
            await assert_normal_again(gate)
            server.kill()
            await assert_outage_is_survived(gate)
            await asyncio.to_thread(server.start)
            await assert_normal_again(gate)


async def test_restarted_at_once_costs_no_outage() -> None:
    """An idle connection that the server closed is replaced before it is used."""
    with own_server() as server:
        store = redis_store(server.url)
        keys = Keyspace(store, "mxgate:t:")
        for _ in range(3):
            assert await keys.ask(keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
            server.kill()
            await asyncio.to_thread(server.start)
        await store.close()


async def test_frozen() -> None:
    with own_server() as server:
        async with gateway(server.url) as gate:
            await assert_normal_again(gate)
            with server.frozen():
                await assert_outage_is_survived(gate)
            await assert_normal_again(gate)


async def test_read_only(redis_server: RedisServer) -> None:
    """A replica, as an old master is after a failover."""
    with own_server() as server:
        async with gateway(server.url) as gate:
            await assert_normal_again(gate)
            server.ask("REPLICAOF", redis_server.address[0], redis_server.port)
            await assert_outage_is_survived(gate)
            assert gate.guard.state()["last_error"] == "read_only"
            server.ask("REPLICAOF", "NO", "ONE")
            await assert_normal_again(gate)


async def test_out_of_memory() -> None:
    with own_server("maxmemory 100mb", "maxmemory-policy noeviction") as server:
        async with gateway(server.url) as gate:
            await assert_normal_again(gate)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            await assert_outage_is_survived(gate)
            assert gate.guard.state()["last_error"] == "full"
            server.ask("CONFIG", "SET", "maxmemory", "100mb")
            await assert_normal_again(gate)


async def test_loading(tmp_path: Path) -> None:
    """A server that reads its file for long after its start."""
    with own_server("enable-debug-command yes") as server:
        for begin in range(0, 20_000, 2000):
            words = [word for number in range(begin, begin + 2000) for word in (f"k{number}", "v")]
            server.ask("MSET", *words)
        server.ask("SAVE")
        async with gateway(server.url) as gate:
            await assert_normal_again(gate)
            server.ask("CONFIG", "SET", "key-load-delay", "1000")  # 20,000 keys: 20 s, unless it is set back
            # it reads the file again and answers LOADING meanwhile
            reload = asyncio.create_task(asyncio.to_thread(_reload, server))
            await assert_outage_is_survived(gate)
            assert gate.guard.state()["last_error"] in ("loading", "timeout", "connect")
            server.kill()
            await reload
            await asyncio.to_thread(server.start)
            await assert_normal_again(gate)


def _reload(server: RedisServer) -> None:
    try:
        server.ask("DEBUG", "RELOAD", "NOSAVE")
    except OSError:
        return


async def test_wrong_password() -> None:
    with own_server("requirepass secret") as server:
        async with gateway(server.url) as gate:
            await assert_outage_is_survived(gate)
            assert gate.guard.state()["last_error"] in ("auth", "error")
            line = gate.log.lines[0]
            assert "secret" not in str(line.keys)


@pytest.mark.full
async def test_sentinel_fails_over(sentinel_group: SentinelGroup) -> None:
    """The master is killed in the middle; within 5 s after the sentinels agree about another one it is used."""
    async with gateway(sentinel_group.url) as gate:
        await assert_normal_again(gate)
        old = await asyncio.to_thread(sentinel_group.master)
        await gate.keys.ask(gate.keys.put("before", b"1", ttl_s=TTL_S))
        old.kill()
        await assert_outage_is_survived(gate)

        def named() -> bool:
            return sentinel_group.master() is not old

        async def failed_over() -> bool:
            return await asyncio.to_thread(named)

        await eventually(failed_over, within_s=30, what="the sentinels named another master")
        await assert_normal_again(gate)
        assert await gate.keys.ask(gate.keys.get("before")) == b"1"
        await asyncio.to_thread(old.start)


@pytest.mark.full
async def test_cluster_fails_over(redis_cluster: RedisCluster) -> None:
    """A master is killed in the middle: its part of the keys is out of reach until its replica has taken over."""
    async with gateway(redis_cluster.url) as gate:
        await assert_normal_again(gate)
        old = redis_cluster.masters()[0]
        masters = {each.port for each in redis_cluster.masters()}
        await gate.keys.ask_together(
            *[gate.keys.put(f"before{number}", b"1", ttl_s=TTL_S) for number in range(30)]
        )
        old.kill()

        async def failed_over() -> bool:
            alive = await asyncio.to_thread(redis_cluster.masters)
            return len(alive) == 3 and {each.port for each in alive} != masters

        await eventually(failed_over, within_s=30, what="a replica took over")
        await assert_normal_again(gate)
        assert gate.metrics["mxgate_store_operations_total", "get", "local"] > 0
        found = await gate.keys.ask_together(*[gate.keys.get(f"before{number}") for number in range(30)])
        assert set(found) == {b"1"}
        await asyncio.to_thread(old.start)


@pytest.mark.full
async def test_a_cluster_that_moves_its_slots_is_followed(redis_cluster: RedisCluster) -> None:
    """Slots go to another master by a failover that somebody asks for: nothing is lost, nothing fails."""
    store = redis_store(redis_cluster.url)
    keys = Keyspace(store, f"mxgate:moved-{time.time_ns()}:")
    await keys.ask_together(*[keys.put(f"k{number}", b"1", ttl_s=TTL_S) for number in range(60)])
    replica = next(each for each in redis_cluster.nodes if each not in redis_cluster.masters())
    assert replica.ask("CLUSTER", "FAILOVER").startswith("+OK")

    async def is_master() -> bool:
        return replica in await asyncio.to_thread(redis_cluster.masters)

    await eventually(is_master, within_s=20, what="the replica is master")
    found = await keys.ask_together(*[keys.get(f"k{number}") for number in range(60)])
    assert set(found) == {b"1"}
    assert await keys.ask(keys.add("n", ttl_s=TTL_S)) == 1
    await store.close()
