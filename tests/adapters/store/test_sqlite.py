"""The SQLite store: its file, what it survives, how it stays small."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.adapters.store.sqlite import SqliteStore
from gateway.store import Keyspace, StoreError
from tests.fakes import FakeClock

ROOT = Path(__file__).parents[3]
DAY_S = 86_400.0


def make(path: Path, clock: FakeClock, max_bytes: int = 2**24) -> SqliteStore:
    store = SqliteStore(str(path), clock.now, max_bytes=max_bytes)
    store.open()
    return store


async def test_it_is_kept_over_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    for expected in (None, b"1", b"1"):
        store = make(tmp_path / "state.db", clock)
        keys = Keyspace(store, "")
        assert await keys.ask(keys.put_if_absent("a", b"1", ttl_s=DAY_S)) == expected
        await store.close()


OPENS = """
import asyncio, sys, time
from gateway.adapters.store.sqlite import SqliteStore

async def main():
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(40):
        store = SqliteStore(f"{sys.argv[1]}/{number}.db", time.time, max_bytes=2**24)
        store.open()
        await store.close()

asyncio.run(main())
"""


@pytest.mark.e2e
def test_many_may_make_the_same_file_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENS, str(tmp_path)]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(6)
    ]
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    errors = [each.communicate(timeout=60)[1] for each in running]
    assert errors == [""] * len(running)


async def test_only_its_owner_can_read_it(tmp_path: Path, clock: FakeClock) -> None:
    store = make(tmp_path / "state.db", clock)
    keys = Keyspace(store, "")
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    files = [f"{tmp_path}/state.db{suffix}" for suffix in ("", "-wal", "-shm")]
    assert {stat.S_IMODE(os.stat(file).st_mode) for file in files} == {0o600}  # noqa: PTH116 - no I/O in a loop that matters
    await store.close()


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "nowhere" / "state.db"
    with pytest.raises(StoreError, match=f"connect: {path}: No such file or directory"):
        make(path, clock)


async def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"precious" * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        make(path, clock)
    assert path.read_bytes() == b"precious" * 1000
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE entries (precious)")
    other.close()
    with pytest.raises(StoreError, match="not a store of mxgate"):
        make(path, clock)


async def test_what_has_ended_is_pruned(tmp_path: Path, clock: FakeClock) -> None:
    store = make(tmp_path / "state.db", clock)
    keys = Keyspace(store, "")
    await keys.ask_together(*[keys.put(f"k{number}", b"", ttl_s=10) for number in range(1000)])
    clock.advance(11)
    for _ in range(8):
        await keys.ask(keys.get("x"))
    await store.close()
    with sqlite3.connect(tmp_path / "state.db") as database:
        assert database.execute("SELECT count(*) FROM entries").fetchone() == (0,)
    database.close()


async def test_the_file_stays_small_and_the_nearest_end_goes_first(tmp_path: Path, clock: FakeClock) -> None:
    limit = 2**20
    store = make(tmp_path / "state.db", clock, limit)
    keys = Keyspace(store, "")
    await keys.ask_together(*[keys.put(f"client{number}", b"5", ttl_s=35 * DAY_S) for number in range(50)])
    clock.advance(30 * DAY_S)
    for begin in range(0, 20_000, 250):
        await keys.ask_together(
            *[
                keys.put_if_absent(f"{number:050}", b"1700000000", ttl_s=2 * DAY_S)
                for number in range(begin, begin + 250)
            ]
        )
        clock.advance(2)
    clients = await keys.ask_together(*[keys.get(f"client{number}") for number in range(50)])
    assert set(clients) == {b"5"}
    assert await keys.ask(keys.get(f"{0:050}")) is None
    assert await keys.ask(keys.get(f"{19_999:050}")) is not None
    await store.close()
    assert (tmp_path / "state.db").stat().st_size <= limit


async def test_a_full_file_is_an_error_once_and_then_has_room(tmp_path: Path, clock: FakeClock) -> None:
    store = make(tmp_path / "state.db", clock, 64 * 4096)
    keys = Keyspace(store, "")
    # more at once than the file takes
    with pytest.raises(StoreError, match="full"):
        await keys.ask_together(*[keys.put(f"{number}", b"x" * 4000, ttl_s=DAY_S) for number in range(100)])
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.get("a")) == b"1"
    await store.close()


async def test_a_locked_file_is_a_timeout_and_harms_nothing(tmp_path: Path, clock: FakeClock) -> None:
    store = make(tmp_path / "state.db", clock)
    keys = Keyspace(store, "")
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="timeout: database is locked"):
        await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    # reading needs no lock
    assert await keys.ask(keys.get("a")) is None
    other.execute("ROLLBACK")
    other.close()
    await keys.ask(keys.put("a", b"1", ttl_s=DAY_S))
    assert await keys.ask(keys.get("a")) == b"1"
    await store.close()


@pytest.mark.e2e
def test_a_worker_that_is_killed_while_it_writes_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    writer = (
        "import asyncio, time\n"
        "from gateway.adapters.store.sqlite import SqliteStore\n"
        "from gateway.store import Keyspace\n"
        "async def main():\n"
        f"    store = SqliteStore({str(path)!r}, time.time, max_bytes=2**24)\n"
        "    store.open()\n"
        "    keys = Keyspace(store, '')\n"
        "    number = 0\n"
        "    while True:\n"
        "        total = await keys.ask(keys.add('sum', ttl_s=86400))\n"
        "        print(total, flush=True)\n"
        "asyncio.run(main())\n"
    )
    last = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", writer], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= last + 200:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            told = [int(line) for line in [line, *process.stdout] if line.endswith(b"\n")]
        last = told[-1]
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (value,) = database.execute("SELECT value FROM entries WHERE key = 'sum'").fetchone()
        database.close()
        # what was answered is there; one more may have been written
        assert int(value) in (last, last + 1)
        last = int(value)


async def test_many_ask_at_once_and_the_loop_goes_on(tmp_path: Path, clock: FakeClock) -> None:
    store = make(tmp_path / "state.db", clock)
    keys = Keyspace(store, "")
    sums = await asyncio.gather(*[keys.ask(keys.add("n", ttl_s=DAY_S)) for _ in range(2000)])
    assert sorted(sums) == [*range(1, 2001)]
    await store.close()
