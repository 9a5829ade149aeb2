"""A process that shares a store with others: `python -m tests.adapters.store.sharing URL PREFIX ROUNDS SEED`.

It says "ready" and begins when it is told a line. It asks for the same keys as the others, in an order of its own, and
for two keys that all of them change all the time. What it was answered is printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

from gateway.adapters.store.sqlite import SqliteStore
from gateway.store import Keyspace
from tests.adapters.store.conftest import redis_store

TTL_S = 600.0


async def share(url: str, prefix: str, rounds: int, seed: int) -> dict[str, object]:
    """How often it was the first, how often its replacement counted, and every sum that it was given."""
    if url.startswith("sqlite://"):
        store = SqliteStore(url.removeprefix("sqlite://"), time.time, max_bytes=2**24)
        store.open()
    else:
        store = redis_store(url)  # type: ignore[assignment]  # both are stores
    keys = Keyspace(store, prefix)
    await keys.ask(keys.put_if_absent("hot", b"0", ttl_s=TTL_S))
    order = [*range(rounds)]
    random.Random(seed).shuffle(order)
    print("ready", flush=True)  # noqa: T201 - the test waits for it
    await asyncio.to_thread(sys.stdin.readline)
    firsts = replaced = hot = 0
    sums: list[int] = []
    for number in order:
        first, total, value = await keys.ask_together(
            keys.put_if_absent(f"k{number}", b"1", ttl_s=TTL_S),
            keys.add("sum", ttl_s=TTL_S),
            keys.get("hot"),
        )
        firsts += first is None
        sums.append(total)
        assert value is not None
        # what somebody has changed since is not replaced
        was_mine, was_hot = await keys.ask_together(
            keys.replace(f"k{number}", b"1", b"2", ttl_s=TTL_S),
            keys.replace("hot", value, b"%d" % (int(value) + 1), ttl_s=TTL_S),
        )
        replaced += was_mine
        hot += was_hot
    last = await keys.ask(keys.get("hot"))
    await store.close()
    return {"firsts": firsts, "replaced": replaced, "sums": sums, "hot": hot, "last": int(last or b"")}


if __name__ == "__main__":
    url, prefix, rounds, seed = sys.argv[1:]
    print(json.dumps(asyncio.run(share(url, prefix, int(rounds), int(seed)))))  # noqa: T201 - its answer
