"""What the stores cost: operations a second, latency with one and with fifty questions in flight, octets per entry.

One question is what a greylist asks at RCPT: the triplet (`put_if_absent`) and the client (`get`) together. The guard
with its deadline is around all but `memory:`, as in a worker. Redis is a server of its own on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from statistics import quantiles

from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.store.guarded import GuardedStore, StoreMetrics
from gateway.adapters.store.memory import MemoryStore
from gateway.adapters.store.redis import RedisStore
from gateway.adapters.store.redis_url import parse_redis_url
from gateway.adapters.store.sqlite import SqliteStore
from gateway.services import Instruments, Store
from gateway.store import Keyspace
from tests.e2e.redis import RedisServer
from tests.fakes import FakeLog

TTL_S = 2 * 86_400.0
IN_FLIGHT = (1, 50)
KINDS = ("memory", "sqlite", "redis")


class _Clock:
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


def triplet(number: int) -> str:
    """A key as a greylist has it: network, reverse-path and recipient."""
    return f"203.0.{number % 256}.0/24|newsletter-{number}@lists.example.org|user-{number % 997}@example.net"


@contextlib.asynccontextmanager
async def opened(kind: str, max_bytes: int = 2**30) -> AsyncIterator[tuple[Store, Callable[[], int]]]:
    """A store, and what tells how many octets it takes."""
    if kind == "memory":
        memory = MemoryStore(time.monotonic, max_bytes=max_bytes)
        yield memory, _resident_bytes
        return
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "state.db")
            sqlite = SqliteStore(str(file), time.time, max_bytes=max_bytes)
            sqlite.open()
            yield _guarded(kind, sqlite), lambda: sum(each.stat().st_size for each in file.parent.iterdir())
            await sqlite.close()
        return
    server = RedisServer()
    try:
        redis = RedisStore(parse_redis_url(server.url), timeout_s=0.5)
        yield _guarded(kind, redis), lambda: _used_memory(server)
        await redis.close()
    finally:
        server.close()


def _guarded(kind: str, store: Store) -> GuardedStore:
    metrics = ProcessMetrics()
    return GuardedStore(
        store,
        name=kind,
        # of a machine that is busy no question may fail: its entry would not be there
        timeout_s=5.0,
        on_outage=None,
        probe_prefix="mxgate:",
        instruments=Instruments(_Clock(), FakeLog(), metrics),
        metrics=StoreMetrics(metrics),
    )


async def latency(kind: str, in_flight: int, questions: int) -> tuple[float, float, float, float]:
    """Questions a second, CPU us of this process for one, and the median and 99th percentile of their latency in us."""
    async with opened(kind) as (store, _):
        keys = Keyspace(store, "mxgate:greylist:")
        took: list[float] = []
        numbers: Iterator[int] = iter(range(questions))

        async def ask() -> None:
            for number in numbers:
                begun = time.perf_counter()
                await keys.ask_together(
                    keys.put_if_absent(triplet(number), b"1700000000", ttl_s=TTL_S),
                    keys.get("203.0.113.0/24"),
                )
                took.append(time.perf_counter() - begun)

        begun, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(ask())
        elapsed, cpu = time.perf_counter() - begun, time.process_time() - cpu
    percentiles = quantiles(took, n=100)
    return questions / elapsed, cpu / questions * 1e6, percentiles[49] * 1e6, percentiles[98] * 1e6


async def bytes_per_entry(kind: str, entries: int) -> float:
    """Octets that an entry takes, with `entries` of them."""
    async with opened(kind) as (store, taken):
        keys = Keyspace(store, "mxgate:greylist:")
        gc.collect()
        before = taken()
        for begin in range(0, entries, 500):
            await keys.ask_together(
                *[
                    keys.put(triplet(number), b"1700000000", ttl_s=TTL_S + number % 86_400)
                    for number in range(begin, min(begin + 500, entries))
                ]
            )
        return (taken() - before) / entries


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _used_memory(server: RedisServer) -> int:
    info = server.ask("INFO", "memory")
    return int(info.partition("used_memory:")[2].split()[0])


def main(arguments: list[str]) -> None:
    """Print the table; `--quick` for a look."""
    questions, entries = (2_000, 20_000) if "--quick" in arguments else (50_000, 1_000_000)
    run = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - optional

        run = uvloop.run
    print(f"{'store':8} {'in flight':>9} {'questions/s':>12} {'CPU us':>8} {'p50 us':>8} {'p99 us':>8}")
    for kind in KINDS:
        for in_flight in IN_FLIGHT:
            rate, cpu, p50, p99 = run(latency(kind, in_flight, questions))
            print(f"{kind:8} {in_flight:9} {rate:12.0f} {cpu:8.1f} {p50:8.0f} {p99:8.0f}")
    for kind in KINDS:
        print(f"{kind:8} {run(bytes_per_entry(kind, entries)):6.0f} octets per entry with {entries:,}")
