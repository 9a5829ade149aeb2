"""A store for tests: what every store does, said as plainly as possible; in property tests it is their model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from gateway.services import Clock
from gateway.store import (
    Add,
    Delete,
    Entry,
    Get,
    Operation,
    Page,
    Put,
    PutIfAbsent,
    Replace,
    StoreError,
    Take,
    added,
    taken,
)


class FakeStore:
    """Unbounded, on a clock that the test owns. Set `error` to have it fail; `asked` are the operations so far.

    Each call suspends for so many `turns` of the loop: with 0 it answers at once, as memory does.
    """

    def __init__(self, clock: Clock, *, turns: int = 0) -> None:
        self._clock = clock
        self.turns = turns
        self._entries: dict[str, tuple[bytes, float]] = {}  # value, when it ends
        self.error: StoreError | None = None
        self.asked: list[Operation[Any]] = []

    @property
    def entries(self) -> dict[str, bytes]:
        """What is in it now, by key."""
        now = self._clock.now()
        return {key: value for key, (value, end) in self._entries.items() if end > now}

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        self.asked += operations
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return [self._answer(each) for each in operations]

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        if self.error is not None:
            raise self.error
        keys = sorted(key for key in self.entries if key.startswith(prefix) and key > cursor)
        now = self._clock.now()
        page = tuple(Entry(key, self._entries[key][0], self._entries[key][1] - now) for key in keys[:limit])
        return Page(page, keys[limit - 1] if len(keys) > limit else "")

    def _answer(self, operation: Operation[Any]) -> Any:
        key = operation.key
        value = self.entries.get(key)
        now = self._clock.now()
        match operation:
            case Get():
                return value
            case Put():
                self._entries[key] = (operation.value, now + operation.ttl_s)
                return None
            case PutIfAbsent():
                if value is None:
                    self._entries[key] = (operation.value, now + operation.ttl_s)
                return value
            case Replace():
                if value == operation.old:
                    self._entries[key] = (operation.value, now + operation.ttl_s)
                return value == operation.old
            case Add():
                count, digits = added(value, operation.amount)
                begins = value is None or operation.renew
                self._entries[key] = (digits, now + operation.ttl_s if begins else self._entries[key][1])
                return count
            case Take():
                end = now if value is None else self._entries[key][1]
                after_s, wait_s = taken(end - now, operation)
                if wait_s == 0 or after_s < end - now:
                    self._entries[key] = (b"", now + after_s)
                return wait_s
            case Delete():
                self._entries.pop(key, None)
                return value is not None
            case _:
                raise TypeError(f"{operation!r} is no operation of the store")
