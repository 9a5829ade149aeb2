"""What a worker remembers itself of a shared store, to answer with while that one is out of reach.

It keeps what went through it last, so that in an outage it knows the clients that this worker has seen lately; what
other workers learn meanwhile it does not see, and what it learns itself stays here. Bounded as the memory store is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.adapters.store.memory import MemoryStore
from gateway.store import Add, Delete, Get, Operation, Put, PutIfAbsent, Replace, Take

_MAX_BYTES = 16 * 2**20
# The shared store does not say how long an entry that is only read will stay.
_SEEN_TTL_S = 86_400.0


class LocalStore:
    """The newest 16 MiB (some 60,000 entries) of what went through this worker."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._memory = MemoryStore(monotonic, max_bytes=_MAX_BYTES)

    def do(self, operation: Operation[Any]) -> Any:
        """Answer instead of the shared store. Raises NotACounterError."""
        return self._memory.do(operation)

    def note(self, operation: Operation[Any], answer: Any) -> None:
        """Remember what the shared store answered."""
        do = self._memory.do
        key = operation.key
        match operation:
            case Put() | PutIfAbsent() if answer is None:
                do(Put(key, operation.value, operation.ttl_s))
            case Replace() if answer:
                do(Put(key, operation.value, operation.ttl_s))
            case Add():
                known = None if operation.renew else do(Get(key))
                if known is not None and known.isdigit():
                    # so the window that is known ends when it would
                    do(Add(key, answer - int(known), operation.ttl_s))
                else:
                    do(Put(key, b"%d" % answer, operation.ttl_s))
            case Take() if answer:
                # as little as it had there: others took from it
                do(Put(key, b"", answer + operation.capacity_s - operation.cost_s))
            case Take():
                do(operation)
            case Get() | PutIfAbsent() if answer is not None:
                if do(Get(key)) != answer:
                    do(Put(key, answer, _SEEN_TTL_S))
            case _:
                do(Delete(key))
