"""Stores on a fake clock against the model: whatever is asked in whatever order, they answer alike."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.adapters.store.memory import MemoryStore
from gateway.adapters.store.sqlite import SqliteStore
from gateway.services import Store
from gateway.store import Keyspace, NotACounterError, Operation
from gateway.testing import FakeStore
from tests.fakes import FakeClock

MAKER = Keyspace(FakeStore(FakeClock()), "p:")
KEYS = st.sampled_from(["a", "b", "c", "ä"])
VALUES = st.sampled_from([b"", b"1", b"-7", b"x", b"\0\xff"])
# to the second: what SQLite rounds to the millisecond must not differ
TTLS = st.sampled_from([1.0, 30.0, 90.0, 3600.0, 35 * 86_400.0])

OPERATIONS: st.SearchStrategy[Operation[object]] = st.one_of(
    st.builds(MAKER.get, KEYS),
    st.builds(MAKER.put, KEYS, VALUES, ttl_s=TTLS),
    st.builds(MAKER.put_if_absent, KEYS, VALUES, ttl_s=TTLS),
    st.builds(MAKER.replace, KEYS, VALUES, VALUES, ttl_s=TTLS),
    st.builds(MAKER.add, KEYS, st.integers(-5, 5), ttl_s=TTLS, renew=st.booleans()),
    st.builds(
        MAKER.take, KEYS, st.sampled_from([-36.0, 36.0, 72.0]), capacity_s=st.sampled_from([72.0, 720.0])
    ),
    st.builds(MAKER.delete, KEYS),
)
STEPS = st.lists(st.one_of(OPERATIONS, st.sampled_from([0.0, 0.5, 1.0, 29.0, 61.0, 4000.0])), max_size=60)


async def answers(store: Store, clock: FakeClock, steps: list[Operation[object] | float]) -> list[object]:
    """Every answer, and what is there at the end."""
    given: list[object] = []
    for each in steps:
        if isinstance(each, float):
            clock.advance(each)
            continue
        try:
            given += await store.run([each])
        except NotACounterError:
            given.append(NotACounterError)
    entries = []
    cursor, is_first = "", True
    while cursor or is_first:
        page = await store.scan("p:", cursor, 2)
        entries += [(key, value, round(ttl_s, 2)) for key, value, ttl_s in page.entries]
        cursor, is_first = page.cursor, False
    return [*given, sorted(entries)]


@given(STEPS)
def test_memory_is_as_the_model(steps: list[Operation[object] | float]) -> None:
    async def both() -> None:
        clock, other = FakeClock(), FakeClock()
        memory = MemoryStore(clock.monotonic, max_bytes=10_000_000)
        assert await answers(memory, clock, steps) == await answers(FakeStore(other), other, steps)

    asyncio.run(both())


@settings(max_examples=50)
@given(STEPS)
def test_sqlite_is_as_the_model(steps: list[Operation[object] | float]) -> None:
    async def both(directory: str) -> None:
        clock, other = FakeClock(), FakeClock()
        sqlite = SqliteStore(str(Path(directory, "state.db")), clock.now, max_bytes=10_000_000)
        sqlite.open()
        try:
            assert await answers(sqlite, clock, steps) == await answers(FakeStore(other), other, steps)
        finally:
            await sqlite.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(both(directory))


@given(st.lists(st.one_of(OPERATIONS, st.sampled_from([1.0, 61.0, 4000.0])), max_size=200))
def test_memory_counts_its_octets_right_and_forgets_what_ended(
    steps: list[Operation[object] | float],
) -> None:
    clock = FakeClock()
    memory = MemoryStore(clock.monotonic, max_bytes=800)
    for each in steps:
        if isinstance(each, float):
            clock.advance(each)
        else:
            with suppress(NotACounterError):
                memory.do(each)
        assert memory.used_bytes <= 800
        placed = sorted(key for bucket in memory._buckets.values() for key in bucket)
        assert placed == sorted(memory._entries)
        assert set(memory._order) == set(memory._buckets)
    expected = sum(160 + len(key) + len(packed) for key, packed in memory._entries.items())
    assert memory.used_bytes == expected
    clock.advance(40 * 86_400)
    for number in range(20):
        memory.do(MAKER.put(f"new{number}", b"", ttl_s=1.0))
    assert all(key.startswith("p:new") for key in memory._entries)
