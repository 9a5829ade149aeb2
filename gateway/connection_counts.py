"""How many connections there are, of all clients and of each: counted by all workers in one memory that they share.

The supervisor makes SharedCounts before it forks; each worker counts in a column of its own, which nobody else writes.
So there is no lock that a killed worker could keep, and what it counted vanishes with its column. Open connections of
a client are a count-min sketch: two cells for each client, found by a keyed hash, and the smaller one counts. It never
counts too few. It counts too many only for a client that shares both cells with others who have as many open: with 40
clients at their limit that meets one client in 170,000, and nobody without the key can choose whom.

The rate of new connections is counted in cells of all workers together, one set for each minute. Two workers that count
the same client within the same 100 ns may lose one.

Several workers that look before they count may let in as many too many as they are, less one.
"""

from __future__ import annotations

import os
from functools import lru_cache
from hashlib import blake2b
from mmap import mmap
from typing import NamedTuple

_CELLS = 16_384  # of one row; a power of two
_ROWS = 2
_COLUMN = _ROWS * _CELLS
# this minute, the one before, and the next one, which is cleared ahead
_MINUTES = 3
_MINUTE_S = 60.0
_CELL_BYTES = 4
_BITS = _CELLS.bit_length() - 1
# Words in front of the columns: how many columns were ever taken, the minute that was cleared for
_TAKEN, _CLEARED, _HEADER = 0, 1, 2


class Client(NamedTuple):
    """The two cells of a client; made by ConnectionCounts.client."""

    first: int
    second: int


class SharedCounts:
    """The memory, for at most `columns` workers at once: 128 KiB for each that was ever taken, 384 KiB for the rate."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._totals = _HEADER
        self._minutes = self._totals + columns
        self._open = self._minutes + _MINUTES * _COLUMN
        self._words = memoryview(mmap(-1, (self._open + columns * _COLUMN) * _CELL_BYTES)).cast("I")
        self._key = os.urandom(16)
        self._free = list(range(columns))

    @property
    def free(self) -> int:
        """How many more workers can be given a column."""
        return len(self._free)

    def take(self) -> int:
        """A column for a worker that is about to be forked, the lowest that is free. Raises ValueError without one."""
        column = min(self._free)
        self._free.remove(column)
        self._words[_TAKEN] = max(self._words[_TAKEN], column + 1)
        return column

    def release(self, column: int) -> None:
        """The worker has ended: its connections are no more."""
        begin = self._open + column * _COLUMN
        self._words[begin : begin + _COLUMN] = memoryview(bytes(_COLUMN * _CELL_BYTES)).cast("I")
        self._words[self._totals + column] = 0
        self._free.append(column)

    def of(self, column: int) -> ConnectionCounts:
        """The counts as the worker of this column sees them."""
        begins = (self._totals, self._minutes, self._open)
        return ConnectionCounts(self._words, begins, column, self._key)


class ConnectionCounts:
    """The connections of all workers, counted by one of them."""

    def __init__(self, words: memoryview[int], begins: tuple[int, int, int], column: int, key: bytes) -> None:
        self._words = words
        self._totals, self._minutes, self._open = begins
        self._own_total = self._totals + column
        self._own = column * _COLUMN
        self._key = key
        # most connections of an hour come from few addresses
        self.client = lru_cache(maxsize=4096)(self._client)

    def _client(self, number: int) -> Client:
        """The cells of the client that has this number, from -2**64 to 2**32."""
        octets = number.to_bytes(9, "big", signed=True)
        found = int.from_bytes(blake2b(octets, digest_size=8, key=self._key).digest(), "big")
        return Client(found % _CELLS, _CELLS + (found >> _BITS) % _CELLS)

    @property
    def total(self) -> int:
        """How many connections are open."""
        return sum(self._words[self._totals : self._totals + self._words[_TAKEN]])

    def opened(self) -> None:
        """A connection came."""
        self._words[self._own_total] += 1

    def closed(self) -> None:
        """It has gone."""
        self._words[self._own_total] -= 1

    def has(self, client: Client, limit: int) -> bool:
        """Whether the client has that many open connections, or more."""
        words, begin = self._words, self._open
        end = begin + words[_TAKEN] * _COLUMN
        return (
            sum(words[begin + client.first : end : _COLUMN]) >= limit
            and sum(words[begin + client.second : end : _COLUMN]) >= limit
        )

    def client_opened(self, client: Client) -> None:
        """The client has one more; to be taken back by `client_closed`."""
        begin = self._open + self._own
        self._words[begin + client.first] += 1
        self._words[begin + client.second] += 1

    def client_closed(self, client: Client) -> None:
        """The client has one less."""
        begin = self._open + self._own
        self._words[begin + client.first] -= 1
        self._words[begin + client.second] -= 1

    def admits(self, client: Client, limit: int, now_s: float) -> bool:
        """Whether the client may come now, `limit` times a minute; if so, it is counted. Refused attempts are not.

        The minute slides: what came in the minute before counts for the part of it that is less than a minute ago.
        `now_s` is the monotonic clock, which all processes of a machine share. Each worker calls `roll`.
        """
        words = self._words
        minute, part = divmod(now_s, _MINUTE_S)
        now = self._minutes + int(minute) % _MINUTES * _COLUMN
        before = self._minutes + int(minute - 1) % _MINUTES * _COLUMN
        came = min(words[now + cell] + words[before + cell] * (1 - part / _MINUTE_S) for cell in client)
        if came >= limit:
            return False
        for cell in client:
            words[now + cell] += 1
        return True

    def roll(self, now_s: float) -> None:
        """Clear the cells of the next minute, which nobody uses now; to be called each second, by every worker."""
        words, minute = self._words, int(now_s / _MINUTE_S)
        cleared = words[_CLEARED]
        if cleared == minute:
            return
        words[_CLEARED] = minute
        # where minutes were missed, nothing that is there is of now
        ahead = [minute + 1] if cleared + 1 == minute else range(_MINUTES)
        for each in ahead:
            begin = self._minutes + each % _MINUTES * _COLUMN
            words[begin : begin + _COLUMN] = memoryview(bytes(_COLUMN * _CELL_BYTES)).cast("I")


def lone_counts() -> ConnectionCounts:
    """Those of a process that has no others beside it."""
    shared = SharedCounts(1)
    return shared.of(shared.take())
