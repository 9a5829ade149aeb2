"""What every store promises, whatever is behind it: one suite for memory, SQLite, Redis, Sentinel and Cluster."""

from __future__ import annotations

import asyncio

import pytest

from gateway.services import Store
from gateway.store import MAX_VALUE_BYTES, Entry, Keyspace, NotACounterError
from tests.adapters.store.conftest import eventually

DAY_S = 86_400.0


async def test_an_entry_that_nobody_set_is_none(keys: Keyspace) -> None:
    assert await keys.ask(keys.get("a")) is None


@pytest.mark.parametrize("value", [b"", b"x", bytes(range(256)), b"\r\n", b"0", b"x" * MAX_VALUE_BYTES])
async def test_put_then_get_gives_the_same_octets(keys: Keyspace, value: bytes) -> None:
    await keys.ask(keys.put("a", value, ttl_s=DAY_S))
    assert await keys.ask(keys.get("a")) == value


@pytest.mark.parametrize(
    "key", ["", " ", "a b", "*", "{a}", "a'b\"c", "zoë@bücher.example", "\\", "a:b", "\n", "\U0001f4e7" * 20]
)
async def test_any_text_is_a_key(keys: Keyspace, key: str) -> None:
    await keys.ask(keys.put(key, b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.get(key)) == b"1"
    assert [entry.key for entry in (await keys.scan()).entries] in ([key], [])
    assert await _scanned(keys) == {key: b"1"}


async def test_put_overwrites(keys: Keyspace) -> None:
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    await keys.ask(keys.put("a", b"2", ttl_s=DAY_S))
    assert await keys.ask(keys.get("a")) == b"2"


async def test_put_if_absent_sets_once_and_tells_what_is_there(keys: Keyspace) -> None:
    assert await keys.ask(keys.put_if_absent("a", b"1", ttl_s=DAY_S)) is None
    assert await keys.ask(keys.put_if_absent("a", b"2", ttl_s=DAY_S)) == b"1"
    assert await keys.ask(keys.get("a")) == b"1"


async def test_replace_needs_the_old_value(keys: Keyspace) -> None:
    assert await keys.ask(keys.replace("a", b"", b"1", ttl_s=DAY_S)) is False
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.replace("a", b"2", b"3", ttl_s=DAY_S)) is False
    assert await keys.ask(keys.replace("a", b"1", b"\x00\xff", ttl_s=DAY_S)) is True
    assert await keys.ask(keys.replace("a", b"\x00\xff", b"", ttl_s=DAY_S)) is True
    assert await keys.ask(keys.get("a")) == b""


async def test_add_counts_from_zero_and_get_reads_digits(keys: Keyspace) -> None:
    assert await keys.ask(keys.add("a", ttl_s=DAY_S)) == 1
    assert await keys.ask(keys.add("a", 41, ttl_s=DAY_S)) == 42
    assert await keys.ask(keys.get("a")) == b"42"
    assert await keys.ask(keys.add("a", -50, ttl_s=DAY_S)) == -8
    assert await keys.ask(keys.get("a")) == b"-8"


async def test_add_goes_on_from_digits_that_were_put(keys: Keyspace) -> None:
    await keys.ask(keys.put("a", b"7", ttl_s=DAY_S))
    assert await keys.ask(keys.add("a", ttl_s=DAY_S)) == 8


@pytest.mark.parametrize(
    "value", [b"x", b"", b" 1", b"01", b"1.0", b"+1", b"1_0", b"9223372036854775808", b"--1", b"-"]
)
async def test_add_to_what_is_no_counter_changes_nothing(keys: Keyspace, value: bytes) -> None:
    await keys.ask(keys.put("a", value, ttl_s=DAY_S))
    with pytest.raises(NotACounterError):
        await keys.ask(keys.add("a", ttl_s=DAY_S))
    assert await keys.ask(keys.get("a")) == value


async def test_a_counter_does_not_leave_64_bits(keys: Keyspace) -> None:
    await keys.ask(keys.put("a", b"9223372036854775807", ttl_s=DAY_S))
    with pytest.raises(NotACounterError):
        await keys.ask(keys.add("a", ttl_s=DAY_S))


async def test_a_bucket_gives_what_it_holds_and_then_says_how_long_to_wait(keys: Keyspace) -> None:
    take = keys.take("a", 1000, capacity_s=3000)
    assert [await keys.ask(take) for _ in range(3)] == [0, 0, 0]
    wait_s = await keys.ask(take)
    assert 990 < wait_s <= 1000
    assert await keys.ask(take) <= wait_s, "who has to wait takes nothing"
    assert await keys.ask(keys.take("a", 500, capacity_s=3000)) <= wait_s - 500


async def test_a_bucket_fills_with_time_and_then_has_no_entry(keys: Keyspace) -> None:
    assert await keys.ask(keys.take("a", 0.05, capacity_s=0.05)) == 0
    assert 0 < await keys.ask(keys.take("a", 0.05, capacity_s=0.05)) <= 0.05

    async def is_full() -> bool:
        return await _scanned(keys) == {}

    await eventually(is_full, within_s=5, what="the bucket is full")
    assert await keys.ask(keys.take("a", 0.05, capacity_s=0.05)) == 0


async def test_what_is_given_back_to_a_bucket_can_be_taken_again(keys: Keyspace) -> None:
    take, give = keys.take("a", 1000, capacity_s=1000), keys.take("a", -1000, capacity_s=1000)
    assert await keys.ask(give) == 0, "a full bucket holds no more"
    assert [await keys.ask(take), await keys.ask(take) > 0] == [0, True]
    assert await keys.ask(give) == 0
    assert await _scanned(keys) == {}
    assert [await keys.ask(take), await keys.ask(take) > 0] == [0, True]


async def test_a_bucket_never_lacks_more_than_it_holds(keys: Keyspace) -> None:
    # as behind a clock that was set back
    await keys.ask(keys.put("a", b"", ttl_s=DAY_S))
    take = keys.take("a", 0.05, capacity_s=0.1)
    assert 0 < await keys.ask(take) <= 0.05

    async def has_one() -> bool:
        return await keys.ask(take) == 0

    await eventually(has_one, within_s=5, what="the bucket fills")


async def test_of_fifty_who_take_at_once_as_many_get_as_there_is(keys: Keyspace) -> None:
    waits = await asyncio.gather(*(keys.ask(keys.take("a", 100, capacity_s=1000)) for _ in range(50)))
    assert sum(wait_s == 0 for wait_s in waits) == 10


@pytest.mark.parametrize(("cost_s", "capacity_s"), [(0, 1), (0.0001, 1), (2, 1), (1, 367 * DAY_S), (-2, 1)])
async def test_a_bucket_that_cannot_be_is_told(keys: Keyspace, cost_s: float, capacity_s: float) -> None:
    with pytest.raises(ValueError, match="token"):
        keys.take("a", cost_s, capacity_s=capacity_s)


async def test_delete_tells_whether_there_was_one(keys: Keyspace) -> None:
    assert await keys.ask(keys.delete("a")) is False
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.delete("a")) is True
    assert await keys.ask(keys.delete("a")) is False
    assert await keys.ask(keys.get("a")) is None
    assert await keys.ask(keys.put_if_absent("a", b"2", ttl_s=DAY_S)) is None


async def test_what_is_asked_together_is_answered_in_order(keys: Keyspace) -> None:
    answers = await keys.ask_together(
        keys.put_if_absent("a", b"1", ttl_s=DAY_S), keys.add("b", 5, ttl_s=DAY_S), keys.get("c")
    )
    assert answers == (None, 5, None)
    assert await keys.ask_together(keys.get("a"), keys.get("b")) == (b"1", b"5")


async def test_nothing_is_asked(store: Store) -> None:
    assert [*await store.run(())] == []


async def test_entries_end(keys: Keyspace) -> None:
    await keys.ask_together(
        keys.put("put", b"1", ttl_s=0.02),
        keys.put_if_absent("absent", b"1", ttl_s=0.02),
        keys.add("add", 1, ttl_s=0.02),
    )
    await keys.ask(keys.put("replaced", b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.replace("replaced", b"1", b"2", ttl_s=0.02))

    async def are_gone() -> bool:
        return await _scanned(keys) == {}

    await eventually(are_gone, within_s=5, what="all four have ended")
    assert await keys.ask(keys.put_if_absent("absent", b"2", ttl_s=DAY_S)) is None
    assert await keys.ask(keys.add("add", ttl_s=DAY_S)) == 1
    assert await keys.ask(keys.delete("put")) is False


async def test_the_window_of_a_counter_is_not_moved_unless_renewed(keys: Keyspace) -> None:
    await keys.ask_together(keys.add("window", ttl_s=10), keys.add("renewed", ttl_s=10))
    await keys.ask_together(keys.add("window", ttl_s=DAY_S), keys.add("renewed", ttl_s=DAY_S, renew=True))
    ttl_s = {entry.key: entry.ttl_s for entry in await _entries(keys)}
    assert 5 < ttl_s["window"] <= 10
    assert DAY_S - 5 < ttl_s["renewed"] <= DAY_S


async def test_putting_again_begins_the_time_again(keys: Keyspace) -> None:
    await keys.ask_together(keys.put("a", b"1", ttl_s=10), keys.put("b", b"1", ttl_s=DAY_S))
    await keys.ask_together(keys.put("a", b"1", ttl_s=DAY_S), keys.put("b", b"1", ttl_s=10))
    ttl_s = {entry.key: entry.ttl_s for entry in await _entries(keys)}
    assert ttl_s["a"] > DAY_S - 5
    assert ttl_s["b"] <= 10


async def test_scan_finds_what_begins_with_the_prefix(keys: Keyspace) -> None:
    for key in ("a*", "a*1", "a1", "b", "ab"):
        await keys.ask(keys.put(key, key.encode(), ttl_s=DAY_S))
    assert await _scanned(keys, "a*") == {"a*": b"a*", "a*1": b"a*1"}
    assert await _scanned(keys, "c") == {}
    assert len(await _scanned(keys)) == 5


async def test_scan_goes_page_by_page_and_misses_nothing_that_stays(keys: Keyspace) -> None:
    wanted = {f"k{number}": b"%d" % number for number in range(300)}
    await keys.ask_together(*[keys.put(key, value, ttl_s=DAY_S) for key, value in wanted.items()])
    found: dict[str, bytes] = {}
    cursor, pages = "", 0
    while pages == 0 or cursor:
        page = await keys.scan("k", cursor, limit=50)
        found |= {entry.key: entry.value for entry in page.entries}
        cursor, pages = page.cursor, pages + 1
        # what happens meanwhile does no harm
        await keys.ask_together(
            keys.put(f"k{pages}", b"%d" % pages, ttl_s=2 * DAY_S), keys.put(f"x{pages}", b"", ttl_s=DAY_S)
        )
        assert pages < 10_000
    assert found == wanted


async def test_one_of_many_is_the_first(keys: Keyspace) -> None:
    """The same key from many tasks at once: each operation is atomic."""
    put = await asyncio.gather(
        *[keys.ask(keys.put_if_absent("put", b"%d" % number, ttl_s=DAY_S)) for number in range(50)]
    )
    assert put.count(None) == 1
    assert {each for each in put if each is not None} == {b"%d" % put.index(None)}
    counts = await asyncio.gather(*[keys.ask(keys.add("count", ttl_s=DAY_S)) for _ in range(50)])
    assert sorted(counts) == [*range(1, 51)]
    replaced = await asyncio.gather(
        *[keys.ask(keys.replace("count", b"50", b"x", ttl_s=DAY_S)) for _ in range(50)]
    )
    assert replaced.count(True) == 1
    deleted = await asyncio.gather(*[keys.ask(keys.delete("count")) for _ in range(50)])
    assert deleted.count(True) == 1


async def test_a_caller_that_gives_up_leaves_the_store_in_order(keys: Keyspace) -> None:
    tasks = [asyncio.create_task(keys.ask(keys.add("a", ttl_s=DAY_S))) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert len({each for each in done if isinstance(each, int)}) >= 10
    assert await keys.ask(keys.put_if_absent("b", b"1", ttl_s=DAY_S)) is None
    assert await keys.ask(keys.get("b")) == b"1"


async def _entries(keys: Keyspace, prefix: str = "") -> list[Entry]:
    entries: list[Entry] = []
    page = await keys.scan(prefix)
    entries += page.entries
    while page.cursor:
        page = await keys.scan(prefix, page.cursor)
        entries += page.entries
    return entries


async def _scanned(keys: Keyspace, prefix: str = "") -> dict[str, bytes]:
    return {entry.key: entry.value for entry in await _entries(keys, prefix)}
