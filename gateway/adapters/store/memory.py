"""The store in this process's memory: `memory:`, and what answers while a shared store is out of reach.

It never suspends and never fails. It is bounded by octets: when it is full, the entry that would end first goes
first. So whoever fills it with entries that stay for two days drives out his own and those that end as soon, never
those that stay for weeks. An entry costs its key and value and about 150 octets.

Entries stand in buckets by the minute in which they end, each key in exactly one. One that is set again, or deleted,
stays in its bucket and is looked at when that is due: then it goes, or moves to where it belongs by now. Each
operation that sets something looks at a few, so no turn of the loop becomes long.

Used by one thread only, that of the loop.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Sequence
from typing import Any, assert_never

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
    Take,
    added,
    taken,
)

# Before the value: when the entry ends. One object less for each entry than a tuple would take.
_END = struct.Struct("d")
_DELETED = _END.pack(0.0)
_BUCKET_S = 60
# What a str and a bytes object, their slot in the dict and their place in a bucket take, besides the octets in them
# (64-bit CPython, measured with a million entries).
_OVERHEAD_BYTES = 160
_LOOK_AT = 16  # keys of buckets that are due, for each entry that is set
_EVICT_AT_MOST = 512  # keys looked at to make room for one entry


class MemoryStore:
    """At most `max_bytes` of entries. `monotonic` gives seconds; `evicted` counts entries that had to go early."""

    def __init__(self, monotonic: Callable[[], float], *, max_bytes: int) -> None:
        self._monotonic = monotonic
        self._max_bytes = max_bytes
        self._entries: dict[str, bytes] = {}
        self._buckets: dict[int, list[str]] = {}
        self._order: list[int] = []  # a heap of the buckets
        self.used_bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        return [self.do(each) for each in operations]

    def do(self, operation: Operation[Any]) -> Any:
        """The answer to one operation, at once. Raises NotACounterError."""
        now = self._monotonic()
        key = operation.key
        packed = self._entry(key, now)
        value = None if packed is None else packed[_END.size :]
        match operation:
            case Get():
                return value
            case PutIfAbsent():
                if value is None:
                    self._set(key, operation.value, now, operation.ttl_s)
                return value
            case Add():
                count, digits = added(value, operation.amount)
                if packed is None or operation.renew:
                    self._set(key, digits, now, operation.ttl_s)
                else:
                    self._keep(key, packed[: _END.size] + digits)
                return count
            case Put():
                self._set(key, operation.value, now, operation.ttl_s)
                return None
            case Replace():
                is_same = value == operation.old
                if is_same:
                    self._set(key, operation.value, now, operation.ttl_s)
                return is_same
            case Take():
                return self._take(operation, packed, now)
            case Delete():
                if packed is not None:
                    self._keep(key, _DELETED)
                return packed is not None
            case _:
                assert_never(operation)  # type: ignore[arg-type]  # Operation is no union, but these are all

    def _entry(self, key: str, now: float) -> bytes | None:
        packed = self._entries.get(key)
        return None if packed is None or _END.unpack_from(packed)[0] <= now else packed

    def _take(self, take: Take, packed: bytes | None, now: float) -> float:
        lacks_s = 0.0 if packed is None else _END.unpack_from(packed)[0] - now
        after_s, wait_s = taken(lacks_s, take)
        if after_s > 0 and (wait_s == 0 or after_s < lacks_s):
            self._set(take.key, b"", now, after_s)
        elif wait_s == 0 and packed is not None:
            self._keep(take.key, _DELETED)
        return wait_s

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        now = self._monotonic()
        found: list[Entry] = []
        looked_at = 0
        # A key moves to later buckets only: in their order each is met at least once.
        for number in sorted(number for number in self._buckets if not cursor or number > int(cursor)):
            if looked_at >= limit:
                return Page(tuple(found), cursor)
            for key in self._buckets[number]:
                packed = self._entries[key]
                ttl_s = _END.unpack_from(packed)[0] - now
                if ttl_s > 0 and key.startswith(prefix):
                    found.append(Entry(key, packed[_END.size :], ttl_s))
            looked_at += len(self._buckets[number])
            cursor = str(number)
        return Page(tuple(found), "")

    def _set(self, key: str, value: bytes, now: float, ttl_s: float) -> None:
        end = now + ttl_s
        if key in self._entries:
            self._keep(key, _END.pack(end) + value)
        else:
            self._entries[key] = packed = _END.pack(end) + value
            self.used_bytes += _OVERHEAD_BYTES + len(key) + len(packed)
            self._place(key, end)
        self._tidy(now)

    def _keep(self, key: str, packed: bytes) -> None:
        """Another value for an entry that is there; its place stays."""
        self.used_bytes += len(packed) - len(self._entries[key])
        self._entries[key] = packed

    def _place(self, key: str, end: float) -> None:
        number = int(end // _BUCKET_S)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = []
            heapq.heappush(self._order, number)
        bucket.append(key)

    def _tidy(self, now: float) -> None:
        """Drop what has ended, a few at a time, and what ends first while there is too much."""
        due = now // _BUCKET_S
        for _ in range(_LOOK_AT):
            if not self._order or self._order[0] >= due:
                break
            self._take_first(now)
        for _ in range(_EVICT_AT_MOST):
            if self.used_bytes <= self._max_bytes or len(self._entries) <= 1:
                break
            self._take_first(now, evict=True)

    def _take_first(self, now: float, *, evict: bool = False) -> None:
        """Look at a key of the first bucket: it goes, or moves to the bucket where it belongs by now."""
        first = self._order[0]
        bucket = self._buckets[first]
        key = bucket.pop()
        if not bucket:
            del self._buckets[first]
            heapq.heappop(self._order)
        packed = self._entries[key]
        end = _END.unpack_from(packed)[0]
        if end > now and (end // _BUCKET_S > first or not evict):
            self._place(key, end)
            return
        if end > now:
            self.evicted += 1
        del self._entries[key]
        self.used_bytes -= _OVERHEAD_BYTES + len(key) + len(packed)
