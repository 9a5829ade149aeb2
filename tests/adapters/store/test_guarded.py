"""The guard: deadline, breaker, what happens in an outage, and what is told about it. The store is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from gateway.adapters.store.guarded import PROBE_EVERY_S, GuardedStore, StoreMetrics
from gateway.policy import OnError
from gateway.services import Instruments
from gateway.store import Keyspace, NotACounterError, Operation, Page, StoreDownError, StoreError
from gateway.testing import FakeStore
from tests.fakes import FakeClock, FakeLog, FakeMetrics, LoopTime

TIMEOUT_S = 0.1
TTL_S = 1000.0


class ScriptedStore(FakeStore):
    """Hangs while `hangs` is set, and fails for keys with one of `lost` in them."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.hangs = False
        self.lost: tuple[str, ...] = ()
        self.calls = 0

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if any(lost in each.key for each in operations for lost in self.lost):
            raise StoreError("connect", "refused")
        return await super().run(operations)

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        if self.hangs:
            await asyncio.Event().wait()
        return await super().scan(prefix, cursor, limit)


class World:
    """A guard around a scripted store, on a clock and a loop's time that the test owns."""

    def __init__(self, time: LoopTime, on_outage: OnError | None) -> None:
        self.clock = FakeClock()
        self.log = FakeLog()
        self.metrics = FakeMetrics()
        self.store = ScriptedStore(self.clock)
        self.time = time
        self.guard = GuardedStore(
            self.store,
            name="redis",
            timeout_s=TIMEOUT_S,
            on_outage=on_outage,
            probe_prefix="mxgate:",
            instruments=Instruments(self.clock, self.log, self.metrics),
            metrics=StoreMetrics(self.metrics),
        )
        self.keys = Keyspace(self.guard, "mxgate:greylist:")

    async def pass_time(self, seconds: float) -> None:
        """Let so much time pass, and whoever waited for it run."""
        await turns()
        self.clock.advance(seconds)
        self.time.advance(seconds)
        await turns()

    async def fail(self, times: int = 3) -> None:
        """The store refuses so many questions."""
        self.store.error = StoreError("connect", "refused")
        for _ in range(times):
            with suppress(StoreDownError):
                await self.keys.ask(self.keys.get("x"))

    async def recover(self) -> None:
        """The store is back, and a probe finds out."""
        self.store.error = None
        self.store.hangs = False
        self.store.lost = ()
        await self.pass_time(PROBE_EVERY_S)

    def told(self) -> list[str]:
        return [line.event for line in self.log.lines]


async def turns() -> None:
    """Some turns of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def world(
    monkeypatch: pytest.MonkeyPatch, on_outage: OnError | None = None, *, start: bool = True
) -> AsyncIterator[World]:
    loop = asyncio.get_running_loop()
    time = LoopTime(loop)
    monkeypatch.setattr(loop, "time", time)
    made = World(time, on_outage)
    if start:
        await made.guard.start()
    yield made
    await made.guard.close()


async def test_what_the_store_answers_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        assert await w.keys.ask(w.keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
        assert await w.keys.ask(w.keys.get("a")) == b"1"
        assert w.store.entries["mxgate:greylist:a"] == b"1"
        assert w.metrics["mxgate_store_operations_total", "get", "store"] == 1
        assert len(w.metrics.observed[("mxgate_store_duration_seconds",)]) == 2
        assert w.guard.state() == {"kind": "redis", "up": True, "last_error": ""}
        assert w.told() == []


async def test_a_question_has_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch, OnError.DEFER) as w:
        w.store.hangs = True
        question = asyncio.ensure_future(w.keys.ask(w.keys.get("a")))
        await w.pass_time(TIMEOUT_S * 0.9)
        assert not question.done()
        await w.pass_time(TIMEOUT_S * 0.2)
        with pytest.raises(StoreDownError, match="timeout"):
            await question
        assert w.metrics["mxgate_store_errors_total", "timeout"] == 1


@pytest.mark.parametrize("on_outage", [OnError.CONTINUE, OnError.DEFER])
async def test_the_error_says_what_the_operator_wants(
    monkeypatch: pytest.MonkeyPatch, on_outage: OnError
) -> None:
    async with world(monkeypatch, on_outage) as w:
        w.store.error = StoreError("full", "OOM")
        for _ in range(5):  # the same with the breaker open
            with pytest.raises(StoreDownError, match="full") as raised:
                await w.keys.ask(w.keys.put("a", b"1", ttl_s=TTL_S))
            assert raised.value.on_outage is on_outage
        assert w.metrics["mxgate_store_operations_total", "put", "nobody"] == 5
        assert w.metrics["mxgate_store_errors_total", "full"] == 3


async def test_three_failures_in_a_row_open_the_breaker_and_nothing_is_asked_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as w:
        await w.fail(2)
        assert w.told() == []
        await w.fail(1)
        assert w.told() == ["store.down"]
        assert w.log.lines[0].keys == {
            "store": "redis",
            "reason": "connect",
            "error": "connect: refused",
            "on_outage": "local",
        }
        assert w.metrics["mxgate_store_outage"] == 1
        assert w.guard.state() == {"kind": "redis", "up": False, "last_error": "connect"}
        calls = w.store.calls
        await w.fail(10)
        assert w.store.calls == calls
        assert w.told() == ["store.down"]


async def test_single_failures_among_many_answers_do_not_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        for _ in range(20):
            await w.fail(1)
            w.store.error = None
            for _ in range(10):
                await w.keys.ask(w.keys.get("a"))
        assert w.told() == []


async def test_one_failure_in_five_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when one shard of a cluster is lost."""
    async with world(monkeypatch) as w:
        w.store.lost = ("lost",)
        for _ in range(10):
            for key in ("a", "b", "c", "d", "lost"):
                await w.keys.ask(w.keys.get(key))
        assert w.told() == ["store.down"]
        # the probe writes beside the keys that failed: the healthy shards do not count
        w.store.lost = ("lost",)
        await w.pass_time(PROBE_EVERY_S)
        assert w.told() == ["store.down"]
        await w.recover()
        assert w.told() == ["store.down", "store.up"]


async def test_it_recovers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.fail()
        for _ in range(6):
            await w.pass_time(PROBE_EVERY_S)
        assert w.metrics["mxgate_store_outage"] == 1
        await w.recover()
        assert w.metrics["mxgate_store_outage"] == 0
        assert w.told() == ["store.down", "store.up"]
        assert w.log.lines[1].keys == {"store": "redis", "duration_ms": 3500}
        assert w.guard.state()["up"] is True
        # and begins to count from none
        await w.fail(2)
        assert w.told() == ["store.down", "store.up"]


async def test_a_store_that_only_reads_stays_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.fail()
        w.store.error = None
        w.store.lost = ("probe:",)  # what writes
        await w.pass_time(PROBE_EVERY_S)
        assert w.guard.state()["up"] is False


async def test_a_store_that_answers_too_late_stays_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.fail()
        w.store.error = None
        w.store.hangs = True
        await w.pass_time(PROBE_EVERY_S)
        await w.pass_time(2.0)
        await w.pass_time(PROBE_EVERY_S)
        assert w.guard.state()["up"] is False
        await w.pass_time(2.0)
        await w.recover()
        assert w.guard.state()["up"] is True


async def test_it_starts_without_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch, start=False) as w:
        w.store.error = StoreError("connect", "refused")
        await w.guard.start()
        assert w.told() == ["store.down"]
        assert await w.keys.ask(w.keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
        await w.recover()
        assert w.told() == ["store.down", "store.up"]


async def test_an_error_of_the_policy_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.keys.ask(w.keys.put("a", b"x", ttl_s=TTL_S))
        for _ in range(10):
            with pytest.raises(NotACounterError):
                await w.keys.ask(w.keys.add("a", ttl_s=TTL_S))
        assert w.told() == []


# --- on_outage = "local" ------------------------------------------------------------------------------


async def test_in_an_outage_the_worker_remembers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.fail()
        assert await w.keys.ask(w.keys.put_if_absent("a", b"1", ttl_s=TTL_S)) is None
        assert await w.keys.ask(w.keys.put_if_absent("a", b"2", ttl_s=TTL_S)) == b"1"
        assert await w.keys.ask(w.keys.add("n", 2, ttl_s=TTL_S)) == 2
        assert w.metrics["mxgate_store_operations_total", "put_if_absent", "local"] == 2
        assert [key for key in w.store.entries if "greylist" in key] == []


async def test_in_an_outage_it_knows_what_went_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        keys = w.keys
        await w.store.run([keys.put("of another worker", b"5", ttl_s=TTL_S)])
        await keys.ask_together(
            keys.put("put", b"1", ttl_s=TTL_S),
            keys.put_if_absent("absent", b"1", ttl_s=TTL_S),
            keys.put_if_absent("of another worker", b"9", ttl_s=TTL_S),
            keys.get("of another worker"),
            keys.put("replaced", b"1", ttl_s=TTL_S),
            keys.replace("replaced", b"1", b"2", ttl_s=TTL_S),
            keys.replace("put", b"7", b"8", ttl_s=TTL_S),
            keys.put("gone", b"1", ttl_s=TTL_S),
            keys.delete("gone"),
            keys.add("count", 3, ttl_s=TTL_S),
            keys.add("count", 4, ttl_s=TTL_S),
        )
        await w.fail()
        known = {
            key: await keys.ask(keys.get(key)) for key in ("absent", "of another worker", "replaced", "count")
        }
        assert known == {"absent": b"1", "of another worker": b"5", "replaced": b"2", "count": b"7"}
        # a value that was not the one that was thought is not known any more
        assert await keys.ask(keys.get("put")) is None
        assert await keys.ask(keys.get("gone")) is None


async def test_the_window_of_a_counter_ends_when_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.keys.ask(w.keys.add("n", ttl_s=100))
        await w.pass_time(60)
        assert await w.keys.ask(w.keys.add("n", ttl_s=100)) == 2
        await w.fail()
        assert await w.keys.ask(w.keys.get("n")) == b"2"
        await w.pass_time(60)
        assert await w.keys.ask(w.keys.get("n")) is None


async def test_scan_tells_an_outage_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as w:
        await w.keys.ask(w.keys.put("a", b"1", ttl_s=TTL_S))
        assert [entry.key for entry in (await w.keys.scan()).entries] == ["a"]
        w.store.hangs = True
        page = asyncio.ensure_future(w.keys.scan())
        await w.pass_time(10)
        with pytest.raises(StoreError, match="timeout"):
            await page
        w.store.hangs = False
        await w.fail()
        with pytest.raises(StoreError, match="connect"):
            await w.keys.scan()
