"""The store of one worker: which kind `[state] url` asks for, opened when a planned policy needs it.

Called by the worker. A file that cannot be used stops the start, a server that does not answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from gateway.adapters.store.guarded import GuardedStore, StoreMetrics
from gateway.adapters.store.memory import MemoryStore
from gateway.adapters.store.sqlite import SqliteStore
from gateway.config.model import OnOutage, State
from gateway.policy import OnError, Policy
from gateway.services import Instruments, Store
from gateway.store import Keyspace, NoStore

_ON_OUTAGE = {OnOutage.LOCAL: None, OnOutage.CONTINUE: OnError.CONTINUE, OnOutage.DEFER: OnError.DEFER}


class WorkerStore:
    """The store as `state` has it, if one of `policies` needs one."""

    def __init__(self, state: State, policies: Iterable[type[Policy[Any]]], instruments: Instruments) -> None:
        self._state = state
        self._instruments = instruments
        self._metrics = StoreMetrics(instruments.metrics)
        self._open: Callable[[], None] | None = None
        self._close: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._guard: GuardedStore | None = None
        self._store: Store | None = None
        if any(policy.needs_store for policy in policies):
            self._make()

    def for_policy(self, policy: type[Policy[Any]]) -> Keyspace:
        """The policy's own part of the store."""
        if self._store is None or not policy.needs_store:
            return Keyspace(NoStore(), "")
        return Keyspace(self._store, f"{self._state.key_prefix}{policy.name}:")

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
        # 200 ms of imports that other stores need not pay
        from gateway.adapters.store.redis import RedisStore  # noqa: PLC0415
        from gateway.adapters.store.redis_cluster import RedisClusterStore  # noqa: PLC0415
        from gateway.adapters.store.redis_url import Topology, parse_redis_url  # noqa: PLC0415

        url = parse_redis_url(self._state.url)
        kind = RedisClusterStore if url.topology is Topology.CLUSTER else RedisStore
        redis = kind(url, timeout_s=self._state.timeout_s)
        self._close = redis.close
        return redis
