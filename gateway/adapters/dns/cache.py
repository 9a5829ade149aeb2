"""Cache: answers by question until their time is over, the least used ones dropped where there is no more room."""

from __future__ import annotations

from collections import OrderedDict
from sys import getsizeof

from gateway.lookup import Answer, Mx

_ENTRY_BYTES = 400
_RECORD_BYTES = 120


class Cache:
    """At most so many answers and so many octets, as near as they can be reckoned."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[Answer, float, int]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, now: float) -> Answer | None:
        """What is remembered and still true at `now`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[1] <= now:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def has(self, key: str, now: float) -> bool:
        """Whether `get` would find it; it does not count as used."""
        entry = self._entries.get(key)
        return entry is not None and now < entry[1]

    def put(self, key: str, answer: Answer, until: float) -> None:
        """Remember until then; an answer of which few would fill the cache is not."""
        size_bytes = _ENTRY_BYTES + len(key)
        for record in answer.records:
            size_bytes += _RECORD_BYTES + getsizeof(record.host if isinstance(record, Mx) else record)
        if size_bytes * 8 > self._max_bytes:
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = answer, until, size_bytes
        self.size_bytes += size_bytes
        while len(self._entries) > self._max_entries or self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        self.size_bytes -= self._entries.pop(key)[2]
