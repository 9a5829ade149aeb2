"""Every kind of store, made anew for a test; the servers behind them are shared by the session.

The keys of a test begin with a prefix of its own, so tests do not see each other's.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.store.memory import MemoryStore
from gateway.adapters.store.redis import RedisStore
from gateway.adapters.store.redis_cluster import RedisClusterStore
from gateway.adapters.store.redis_url import Topology, parse_redis_url
from gateway.adapters.store.sqlite import SqliteStore
from gateway.services import Store
from gateway.store import Keyspace
from gateway.testing import FakeStore
from tests.e2e.redis import RedisCluster, RedisServer, SentinelGroup, started
from tests.fakes import FakeClock

_NUMBERS = itertools.count(1)
SLOW = [pytest.mark.e2e, pytest.mark.full]

OpenStore = Callable[[str], Any]


def redis_store(url: str, timeout_s: float = 2.0) -> RedisStore | RedisClusterStore:
    """The store for a URL of Redis, as the worker makes it."""
    parsed = parse_redis_url(url)
    kind = RedisClusterStore if parsed.topology is Topology.CLUSTER else RedisStore
    return kind(parsed, timeout_s=timeout_s)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    yield from started(RedisServer)


@pytest.fixture(scope="session")
def sentinel_group() -> Iterator[SentinelGroup]:
    group = SentinelGroup()
    yield group
    group.close()


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    cluster = RedisCluster()
    yield cluster
    cluster.close()


@asynccontextmanager
async def opened_store(kind: str, request: pytest.FixtureRequest, directory: Path) -> AsyncIterator[Store]:
    """A store of this kind, closed at the end."""
    match kind:
        case "fake":
            yield FakeStore(_SystemClock())
        case "memory":
            yield MemoryStore(time.monotonic, max_bytes=2**20)
        case "sqlite":
            sqlite = SqliteStore(str(directory / "state.db"), time.time, max_bytes=2**24)
            sqlite.open()
            yield sqlite
            await sqlite.close()
        case _:
            fixture = {"redis": "redis_server", "sentinel": "sentinel_group", "cluster": "redis_cluster"}[
                kind
            ]
            redis = redis_store(request.getfixturevalue(fixture).url)
            yield redis
            await redis.close()


KINDS = [
    "fake",
    "memory",
    "sqlite",
    pytest.param("redis", marks=pytest.mark.e2e),
    pytest.param("sentinel", marks=SLOW),
    pytest.param("cluster", marks=SLOW),
]


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Each kind of store in turn."""
    async with opened_store(request.param, request, tmp_path) as made:
        yield made


@pytest.fixture
def prefix() -> str:
    """What the keys of this test begin with."""
    return f"mxgate:test:{os.getpid()}-{next(_NUMBERS)}-{time.time_ns()}:"


@pytest.fixture
def keys(store: Store, prefix: str) -> Keyspace:
    """The part of the store that is this test's."""
    return Keyspace(store, prefix)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def eventually(condition: Callable[[], Awaitable[bool]], *, within_s: float, what: str) -> None:
    """Return when the condition is true; AssertionError naming `what` when it is not within the time."""
    import asyncio

    deadline = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


class _SystemClock:
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
