"""The memory store: what goes first when it is full, and that no operation takes long."""

from __future__ import annotations

from gateway.adapters.store.memory import MemoryStore
from gateway.store import Keyspace
from tests.fakes import FakeClock

DAY_S = 86_400.0


def make(clock: FakeClock, max_bytes: int = 100_000) -> tuple[MemoryStore, Keyspace]:
    store = MemoryStore(clock.monotonic, max_bytes=max_bytes)
    return store, Keyspace(store, "")


async def test_a_flood_of_strangers_does_not_drive_out_who_passed(clock: FakeClock) -> None:
    store, keys = make(clock)
    for number in range(50):
        await keys.ask(keys.put(f"client{number}", b"5", ttl_s=35 * DAY_S))
    clock.advance(30 * DAY_S)
    for number in range(5000):
        await keys.ask(keys.put_if_absent(f"stranger{number}", b"1700000000", ttl_s=2 * DAY_S))
        clock.advance(1)
    assert store.evicted > 4000
    assert store.used_bytes <= 100_000
    for number in range(50):
        assert await keys.ask(keys.get(f"client{number}")) == b"5"
    # of the strangers the newest are left
    assert await keys.ask(keys.get("stranger4999")) is not None
    assert await keys.ask(keys.get("stranger0")) is None


async def test_who_is_seen_again_is_kept(clock: FakeClock) -> None:
    _, keys = make(clock)
    await keys.ask(keys.put("seen", b"1", ttl_s=2 * DAY_S))
    for number in range(5000):
        await keys.ask(keys.put(f"other{number}", b"1", ttl_s=2 * DAY_S))
        clock.advance(60)
        if number % 100 == 0:
            assert await keys.ask(keys.replace("seen", b"1", b"1", ttl_s=2 * DAY_S))
    assert await keys.ask(keys.get("seen")) == b"1"


async def test_what_has_ended_is_dropped_a_few_at_a_time(clock: FakeClock) -> None:
    store, keys = make(clock, max_bytes=10_000_000)
    for number in range(1000):
        await keys.ask(keys.put(f"k{number}", b"", ttl_s=10))
    clock.advance(3600)
    before = len(store)
    await keys.ask(keys.put("next", b"", ttl_s=10))
    assert before - 30 < len(store) < before
    for number in range(100):
        await keys.ask(keys.put(f"n{number}", b"", ttl_s=10))
    assert len(store) == 101


async def test_deleting_and_putting_again_takes_no_more_memory(clock: FakeClock) -> None:
    store, keys = make(clock)
    for _ in range(1000):
        await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
        await keys.ask(keys.delete("a"))
    assert sum(map(len, store._buckets.values())) == 1


async def test_an_entry_larger_than_all_is_alone(clock: FakeClock) -> None:
    store, keys = make(clock, max_bytes=100)
    await keys.ask(keys.put("a", b"x" * 1000, ttl_s=DAY_S))
    await keys.ask(keys.put("b", b"x" * 1000, ttl_s=DAY_S))
    assert len(store) == 1
