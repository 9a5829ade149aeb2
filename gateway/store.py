"""What policies remember between messages: operations on the store as data, and the part of it that is a policy's own.

A policy asks its Keyspace (`services.store`), which it has when it declares `needs_store = True`:

    store = self.services.store
    first, passes = await store.ask_together(
        store.put_if_absent(triplet, now, ttl_s=2 * DAY_S), store.get(client)
    )

Each operation is atomic on its own key, for all workers and machines that share the store; operations that are asked
together cost one round trip together and are not atomic together. Every entry ends after its `ttl_s` seconds (to the
millisecond; it may be dropped earlier where the store is full: what would end first goes first). Keys are texts of at
most MAX_KEY_BYTES octets in UTF-8, values octets, at most MAX_VALUE_BYTES of them.

While the store is out of reach, what happens is the operator's choice (`[state] on_outage`): with `local` the worker's
own memory answers; otherwise StoreDownError is raised, and says in `on_outage` what to do with the mail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

from gateway.errors import GatewayError
from gateway.policy import OnError

if TYPE_CHECKING:
    from gateway.services import Store

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 4096
MAX_TTL_S = 366 * 86_400.0
_SHORTEST_S = 0.001
_MAX_COUNT = 2**63 - 1  # Redis and SQLite count in signed 64 bits


class StoreError(GatewayError):
    """The store did not answer; whether it did what was asked is not known.

    `reason` is one word of a closed set: timeout, connect, auth, read_only, full, loading, protocol, error.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class StoreDownError(StoreError):
    """The store is out of reach, and the operator wants mail to go on without it or to be deferred: `on_outage`."""

    def __init__(self, reason: str, on_outage: OnError) -> None:
        super().__init__(reason)
        self.on_outage = on_outage


class NotACounterError(GatewayError):
    """`add` to an entry that is no whole number, or beyond 64 bits: nothing was changed."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """What is asked of the store; its answer is a T. Made by a Keyspace."""

    key: str


@dataclass(frozen=True, slots=True)
class Get(Operation[bytes | None]):
    """The entry's value, None where there is none."""


@dataclass(frozen=True, slots=True)
class Put(Operation[None]):
    """Set the entry, whatever it was."""

    value: bytes
    ttl_s: float


@dataclass(frozen=True, slots=True)
class PutIfAbsent(Operation[bytes | None]):
    """Set the entry where there is none; the answer is the value that was there already, None when it was set."""

    value: bytes
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Replace(Operation[bool]):
    """Set the entry if its value is `old`; whether it was. With `value` the same it is kept for `ttl_s` from now."""

    old: bytes
    value: bytes
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Add(Operation[int]):
    """Add to a counter, which begins with 0; the sum. It ends `ttl_s` after it began, with `renew` after the last."""

    amount: int
    ttl_s: float
    renew: bool = False


@dataclass(frozen=True, slots=True)
class Take(Operation[float]):
    """Take `cost_s` from a bucket that holds `capacity_s` and fills by one second a second; the wait, 0 when taken.

    A bucket that is full has no entry: how long an entry stays is what its bucket lacks, so it ends when that is full.
    With a negative cost something is given back, and the answer is 0.
    """

    cost_s: float
    capacity_s: float


@dataclass(frozen=True, slots=True)
class Delete(Operation[bool]):
    """Remove the entry; whether there was one. Of several at once one is told so."""


def taken(lacks_s: float, take: Take) -> tuple[float, float]:
    """What a bucket lacks after a `take`, and how long it had to wait: then nothing was taken.

    It never lacks more than it holds: a clock that was set back, or a smaller capacity, would say so.
    """
    lacks_s = min(lacks_s, take.capacity_s)
    # to the millisecond, as entries end
    after_s = round(lacks_s + take.cost_s, 3)
    wait_s = round(after_s - take.capacity_s, 3)
    return (lacks_s, wait_s) if take.cost_s > 0 and wait_s > 0 else (max(0.0, after_s), 0.0)


class Entry(NamedTuple):
    """One entry as a scan shows it; `ttl_s`: how long it will stay."""

    key: str
    value: bytes
    ttl_s: float


class Page(NamedTuple):
    """Some entries, and where to go on: "" behind the last page."""

    entries: tuple[Entry, ...]
    cursor: str


def added(value: bytes | None, amount: int) -> tuple[int, bytes]:
    """A counter after `amount`, and the value to keep: its decimal digits. Raises NotACounterError."""
    if value is None:
        count = amount
    else:
        digits = value.removeprefix(b"-")
        if not digits.isdigit() or (digits[:1] == b"0" and value != b"0"):
            raise NotACounterError
        count = int(value) + amount
    if not -_MAX_COUNT - 1 <= count <= _MAX_COUNT:
        raise NotACounterError
    return count, b"%d" % count


class Keyspace:
    """The part of a store whose keys begin with `prefix`: what one policy sees.

    Its methods but `ask`, `ask_together` and `scan` only make operations; they raise ValueError for what is over the
    limits. Asking raises StoreDownError, in `[state] on_outage = "local"` never.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def get(self, key: str) -> Operation[bytes | None]:
        """The value, None where there is none."""
        return Get(self._full(key))

    def put(self, key: str, value: bytes, *, ttl_s: float) -> Operation[None]:
        """Set the entry, whatever it was."""
        return Put(self._full(key), _checked(value), _bounded(ttl_s))

    def put_if_absent(self, key: str, value: bytes, *, ttl_s: float) -> Operation[bytes | None]:
        """Set the entry where there is none; the answer is the value that is there already, None when it was set."""
        return PutIfAbsent(self._full(key), _checked(value), _bounded(ttl_s))

    def replace(self, key: str, old: bytes, value: bytes, *, ttl_s: float) -> Operation[bool]:
        """Set the entry if its value is `old`; whether it was. With `value` the same it stays `ttl_s` from now."""
        return Replace(self._full(key), old, _checked(value), _bounded(ttl_s))

    def add(self, key: str, amount: int = 1, *, ttl_s: float, renew: bool = False) -> Operation[int]:
        """Add to a counter, which begins with 0; the sum. `get` reads its decimal digits.

        It ends `ttl_s` after its first `add`, a window; with `renew` after its last. Asking raises NotACounterError
        for an entry that is something else.
        """
        return Add(self._full(key), amount, _bounded(ttl_s), renew)

    def take(self, key: str, cost_s: float, *, capacity_s: float) -> Operation[float]:
        """Take from a token bucket; 0.0 when it had that much, else nothing is taken, and how many seconds to wait.

        A bucket fills by one second a second: of 100 tokens an hour each costs 36 s, and a burst of 20 is a capacity
        of 720 s. Times are rounded to the millisecond. A negative cost gives back what was taken.
        """
        if not _SHORTEST_S <= abs(cost_s) <= capacity_s <= MAX_TTL_S:
            raise ValueError(
                "a token costs 1 ms or more, and no more than the bucket holds: at most 366 days"
            )
        return Take(self._full(key), cost_s, capacity_s)

    def delete(self, key: str) -> Operation[bool]:
        """Remove the entry; whether there was one. Of several who ask at once one is told so."""
        return Delete(self._full(key))

    async def ask(self, operation: Operation[T]) -> T:
        """The answer to one operation."""
        (answer,) = await self._store.run((operation,))
        return answer  # type: ignore[no-any-return]  # the operation's type says what it is

    @overload
    async def ask_together(self, a: Operation[A], b: Operation[B], /) -> tuple[A, B]: ...
    @overload
    async def ask_together(self, a: Operation[A], b: Operation[B], c: Operation[C], /) -> tuple[A, B, C]: ...
    @overload
    async def ask_together(self, /, *operations: Operation[Any]) -> tuple[Any, ...]: ...
    async def ask_together(self, /, *operations: Operation[Any]) -> tuple[Any, ...]:
        """The answers in the order of the operations, for one round trip."""
        return tuple(await self._store.run(operations))

    async def scan(self, prefix: str = "", cursor: str = "", *, limit: int = 500) -> Page:
        """Entries whose key begins with `prefix`, about `limit` of them; go on with the page's cursor until it is "".

        For commands of operators, not for mail: it reads through the store. In no order; an entry that is there all
        the time is shown at least once, one that comes or goes meanwhile perhaps.
        """
        page = await self._store.scan(self._prefix + prefix, cursor, limit)
        begin = len(self._prefix)
        entries = tuple([Entry(key[begin:], value, ttl_s) for key, value, ttl_s in page.entries])
        return Page(entries, page.cursor)

    def _full(self, key: str) -> str:
        full = self._prefix + key
        if len(full) > MAX_KEY_BYTES or (not full.isascii() and len(full.encode()) > MAX_KEY_BYTES):
            raise ValueError(f"a key has at most {MAX_KEY_BYTES} octets")
        return full


def _checked(value: bytes) -> bytes:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"a value has at most {MAX_VALUE_BYTES} octets")
    return value


def _bounded(ttl_s: float) -> float:
    if not _SHORTEST_S <= ttl_s <= MAX_TTL_S:
        raise ValueError("an entry stays for 1 ms to 366 days")
    return ttl_s


class NoStore:
    """What a policy has that did not declare `needs_store`."""

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        raise RuntimeError("a policy that uses services.store declares needs_store = True")

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        raise RuntimeError("a policy that uses services.store declares needs_store = True")
