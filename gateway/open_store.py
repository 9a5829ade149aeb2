"""The store of one worker: which kind `[state] url` asks for, opened when a planned policy needs it.

Called by the worker: a file that cannot be used stops the start, a server that does not answer does not. Commands of
policies open the same store by themselves, without a guard: what fails is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gateway.adapters.store.guarded import GuardedStore, StoreMetrics
from gateway.adapters.store.memory import MemoryStore
from gateway.adapters.store.sqlite import SqliteStore
from gateway.config import Config
from gateway.config.model import OnOutage, State
from gateway.policy import OnError, Policy
from gateway.services import Instruments, Store
from gateway.store import Keyspace, NoStore, StoreError

T = TypeVar("T")

_ON_OUTAGE = {OnOutage.LOCAL: None, OnOutage.CONTINUE: OnError.CONTINUE, OnOutage.DEFER: OnError.DEFER}


class WorkerStore:
    """The store as `state` has it, if one of `policies` needs one, or the gateway itself does (`is_needed`)."""

    def __init__(
        self,
        state: State,
        policies: Iterable[type[Policy[Any]]],
        instruments: Instruments,
        *,
        is_needed: bool = False,
    ) -> None:
        self._state = state
        self._instruments = instruments
        self._metrics = StoreMetrics(instruments.metrics)
        self._open: Callable[[], None] | None = None
        self._close: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._guard: GuardedStore | None = None
        self._store: Store | None = None
        if is_needed or any(policy.needs_store for policy in policies):
            self._make()

    def for_policy(self, policy: type[Policy[Any]]) -> Keyspace:
        """The policy's own part of the store."""
        if self._store is None or not policy.needs_store:
            return Keyspace(NoStore(), "")
        return self.part(policy.name)

    def part(self, name: str) -> Keyspace:
        """The part of this name; only where a store is needed."""
        assert self._store is not None
        return Keyspace(self._store, f"{self._state.key_prefix}{name}:")

    async def start(self) -> None:
        """Open it. Raises StoreError for a file that cannot be used."""
        if self._open is not None:
            self._open()
        if self._guard is not None:
            await self._guard.start()

    async def close(self) -> None:
        if self._guard is not None:
            await self._guard.close()
        if self._close is not None:
            await self._close()

    def detail(self) -> Mapping[str, object] | None:
        """What /readyz shows of it; None where none is needed."""
        if self._guard is not None:
            return self._guard.state()
        return None if self._store is None else {"kind": "memory", "up": True, "last_error": ""}

    def _make(self) -> None:
        state, clock = self._state, self._instruments.clock
        scheme, _, rest = state.url.partition(":")
        match scheme:
            case "memory":
                # it is always in reach
                self._store = MemoryStore(clock.monotonic, max_bytes=state.max_bytes)
                return
            case "sqlite":
                sqlite = SqliteStore(rest.removeprefix("//"), clock.now, max_bytes=state.max_bytes)
                self._open, self._close = sqlite.open, sqlite.close
                store: Store = sqlite
            case _:
                store = self._make_redis()
        self._store = self._guard = GuardedStore(
            store,
            name=scheme,
            timeout_s=state.timeout_s,
            on_outage=_ON_OUTAGE[state.on_outage],
            probe_prefix=state.key_prefix,
            instruments=self._instruments,
            metrics=self._metrics,
        )

    def _make_redis(self) -> Store:
        redis, self._close = _redis(self._state.url, self._state.timeout_s)
        return redis


class CommandStore:
    """For a command of a policy: its part of the store that the gateway of this configuration works on."""

    _TIMEOUT_S = 5.0
    """For one batch of commands; an operator may wait longer than mail."""

    def __init__(self, config: Config, policy: str) -> None:
        self._state = config.state
        self._prefix = f"{config.state.key_prefix}{policy}:"

    def run(self, use: Callable[[Keyspace], Awaitable[T]]) -> T:
        """What `use` makes of the store. Raises StoreError, also for `memory:`, which nobody else can see."""
        return asyncio.run(self._run(use))

    async def _run(self, use: Callable[[Keyspace], Awaitable[T]]) -> T:
        store, close = self._opened()
        try:
            return await use(Keyspace(store, self._prefix))
        except TimeoutError as exc:
            raise StoreError("timeout") from exc
        finally:
            await close()

    def _opened(self) -> tuple[Store, Callable[[], Coroutine[Any, Any, None]]]:
        scheme, _, rest = self._state.url.partition(":")
        if scheme == "memory":
            raise StoreError(
                "memory", "state.url is memory:, which is inside of each worker; use sqlite or redis"
            )
        if scheme != "sqlite":
            return _redis(self._state.url, self._TIMEOUT_S)
        path = rest.removeprefix("//")
        # not made here: it would belong to who runs the command
        if not Path(path).exists():
            raise StoreError("connect", f"{path} is not there yet; the gateway makes it when it starts")
        sqlite = SqliteStore(path, time.time, max_bytes=self._state.max_bytes)
        sqlite.open()
        return sqlite, sqlite.close


def _redis(url_text: str, timeout_s: float) -> tuple[Store, Callable[[], Coroutine[Any, Any, None]]]:
    """The store of a Redis URL, and what closes it."""
    # 200 ms of imports that other stores need not pay
    from gateway.adapters.store.redis import RedisStore  # noqa: PLC0415
    from gateway.adapters.store.redis_cluster import RedisClusterStore  # noqa: PLC0415
    from gateway.adapters.store.redis_url import Topology, parse_redis_url  # noqa: PLC0415

    url = parse_redis_url(url_text)
    kind = RedisClusterStore if url.topology is Topology.CLUSTER else RedisStore
    redis = kind(url, timeout_s=timeout_s)
    return redis, redis.close
