"""What a greylist has in the store: triplets, the credit of those that send, and how many came back.

    t ORIGIN SENDER RCPT   a triplet: Record; waiting for the retry window, once it passed for the lifetime
    o ORIGIN               Credit of a network or an authenticated domain, for the lifetime behind its last mail
    n ORIGIN               how many new triplets came from a network within the hour
    d DAY first, back      triplets whose first attempt was on that day, and those of them that came back in time
    x DAY                  that day's retries are over, and it was counted who did not come back

A known origin costs one question that only reads. Of a stranger a second one records the triplet (and, where nobody
waits, the credit), so what is known leaves no triplets. Each step is atomic on one key; of two workers that see one
retry, one gives the credit. What is lost between two steps (an outage) is a credit or a count, never the time since
when somebody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gateway.api import Keyspace, NotACounterError, Operation
from policies.verify.greylist.state import (
    DAY_S,
    Credit,
    Decision,
    Record,
    Standing,
    Timing,
    day_of,
    decide,
    decode,
    decode_credit,
)

ORIGIN, NEW, DAY, CLOSED = "o ", "n ", "d ", "x "
HOUR_S = 3600.0
DAYS_KEPT = 40
# How far back days are counted that nobody counted while no worker ran.
_CLOSED_AT_ONCE = 7


class Standings(NamedTuple):
    """What is known of origins: the credit of each with its octets in the store, and the new triplets of the last."""

    credits: tuple[tuple[str, Credit, bytes | None], ...]
    new: int


class Ledger:
    """The records of one greylist. Whatever asks raises StoreDownError."""

    def __init__(self, store: Keyspace, timing: Timing) -> None:
        self._store = store
        self._timing = timing
        self._closed_day = -1

    async def standings(self, origins: Sequence[str]) -> Standings:
        """What is known of them; nothing is written."""
        store = self._store
        *values, new = await store.ask_together(
            *[store.get(ORIGIN + each) for each in origins], store.get(NEW + origins[-1])
        )
        found = [(origin, decode_credit(value), value) for origin, value in zip(origins, values, strict=True)]
        return Standings(tuple(found), _number(new))

    async def renew(self, origin: str, credit: Credit, value: bytes | None, now_s: float) -> None:
        """Mail passed because of this credit: it stays for another lifetime. Written once a day.

        What the operator allowed ends when he said.
        """
        today = day_of(now_s)
        if value is not None and credit.seen_day != today and not credit.is_allowed:
            await self._put(ORIGIN + origin, value, Credit(credit.passes, today).encoded())

    async def attempts(self, known: Standings, keys: Sequence[str], now_s: float) -> list[Decision]:
        """Record an attempt of each triplet of the first origin, of which `known` is what was read; where each stands.

        Who comes back gives credit to the first origin, who is new counts for the last. With a delay of 0 nobody comes
        back: to have been here is all that can be learnt, and each attempt gives credit.
        """
        store, timing = self._store, self._timing
        is_free = timing.delay_s == 0
        today = day_of(now_s)
        fresh = Record(int(now_s), today if is_free else None).encoded()
        ttl_s = timing.lifetime_s if is_free else timing.retry_window_s
        attempts = [store.put_if_absent(key, fresh, ttl_s=ttl_s) for key in keys]
        if is_free:
            *olds, _ = await store.ask_together(*attempts, self._credit(known, len(keys), today))
        else:
            olds = [*await store.ask_together(*attempts)]
        decisions = [decide(decode(old), now_s, timing) for old in olds]
        came_back = 0
        for key, old, decision in zip(keys, olds, decisions, strict=True):
            if decision.standing is Standing.NEW and old is not None:
                # its window is over, or it is nothing that we wrote
                await store.ask(store.replace(key, old, fresh, ttl_s=ttl_s))
            elif decision.standing is Standing.IN_TIME:
                came_back += await self._came_back(key, old, now_s)
            elif decision.standing is Standing.KNOWN:
                await self._seen_again(key, old, now_s)
        if came_back:
            await store.ask(self._credit(known, came_back, today))
        new = sum(each.standing is Standing.NEW for each in decisions)
        if new and not is_free:
            await self._count(
                store.add(NEW + known.credits[-1][0], new, ttl_s=HOUR_S),
                store.add(f"{DAY}{today} first", new, ttl_s=DAYS_KEPT * DAY_S),
            )
        return decisions

    async def waiting(self, keys: Sequence[str], now_s: float) -> list[Decision]:
        """Where each triplet stands; a new one is not recorded."""
        store = self._store
        values = await store.ask_together(*[store.get(key) for key in keys])
        return [decide(decode(value), now_s, self._timing) for value in values]

    async def close_days(self, now_s: float) -> int:
        """How many triplets never came back, of the days that nobody has counted yet and whose retries are over."""
        last = day_of(now_s - self._timing.retry_window_s) - 1
        if last <= self._closed_day:
            return 0
        self._closed_day = last
        store = self._store
        days = [day for day in range(last - _CLOSED_AT_ONCE + 1, last + 1) if day >= 0]
        closed = await store.ask_together(
            *[store.put_if_absent(f"{CLOSED}{day}", b"1", ttl_s=DAYS_KEPT * DAY_S) for day in days]
        )
        ours = [day for day, value in zip(days, closed, strict=True) if value is None]
        never = 0
        for day in ours:
            first, back = await store.ask_together(
                store.get(f"{DAY}{day} first"), store.get(f"{DAY}{day} back")
            )
            never += max(0, _number(first) - _number(back))
        return never

    async def _came_back(self, key: str, old: bytes | None, now_s: float) -> bool:
        """Record that a triplet passed; False where another worker was faster, which gives the credit then."""
        record = decode(old)
        assert record is not None  # it is in time
        assert old is not None
        if not await self._put(key, old, Record(record.first_s, day_of(now_s)).encoded()):
            return False
        await self._count(self._store.add(f"{DAY}{day_of(record.first_s)} back", ttl_s=DAYS_KEPT * DAY_S))
        return True

    def _credit(self, known: Standings, passes: int, today: int) -> Operation[Any]:
        """Give credit to the first origin. What somebody else changed meanwhile stays: the next one counts."""
        origin, credit, value = known.credits[0]
        more = Credit(credit.passes + passes, today).encoded()
        if value is None:
            return self._store.put_if_absent(ORIGIN + origin, more, ttl_s=self._timing.lifetime_s)
        return self._store.replace(ORIGIN + origin, value, more, ttl_s=self._timing.lifetime_s)

    async def _seen_again(self, key: str, old: bytes | None, now_s: float) -> None:
        record, today = decode(old), day_of(now_s)
        if record is not None and old is not None and record.passed_day != today:
            await self._put(key, old, Record(record.first_s, today).encoded())

    async def _count(self, *counters: Operation[int]) -> None:
        # what somebody else wrote there is not counted
        with suppress(NotACounterError):
            await self._store.ask_together(*counters)

    async def _put(self, key: str, old: bytes, value: bytes) -> bool:
        return await self._store.ask(self._store.replace(key, old, value, ttl_s=self._timing.lifetime_s))


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0
