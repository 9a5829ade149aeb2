"""Decisions as they come, for `mxgate decisions --follow`: asks again and again, and gives each record once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta

from gateway.decision.filters import MAX_LIMIT

_EVERY_S = 1.0
# Workers are asked at the same time and answer one after the other: a record of one may be older than the newest that
# another has told of, and is still new to us.
_OVERLAP_S = 10.0


def follow_decisions(
    ask: Callable[[Mapping[str, str]], Mapping[str, object]],
    query: Mapping[str, str],
    *,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Mapping[str, object]]:
    """The records of `query`, then those that come, the oldest first and each once; never ends by itself.

    `ask` is given a query and answers as /api/v1/decisions does.
    """
    told: dict[str, str] = {}  # tx -> its time
    wanted = dict(query)
    begin: str | None = None  # what is older was there before and is more than was asked for
    while True:
        answer = ask(wanted)
        records = answer["decisions"]
        assert isinstance(records, list)
        if begin is None:
            begin = min(map(_time, records), default="") if answer.get("truncated") else ""
        newest = max(told.values(), default="")
        for record in reversed(records):
            if _time(record) >= begin and (tx := str(record.get("tx"))) not in told:
                told[tx] = _time(record)
                newest = max(newest, told[tx])
                yield record
        if newest:
            since = _earlier(newest)
            told = {tx: at for tx, at in told.items() if at >= since}
            wanted = {**query, "since": since, "limit": str(MAX_LIMIT)}
        pause(_EVERY_S)


def _time(record: Mapping[str, object]) -> str:
    return str(record.get("timestamp"))


def _earlier(timestamp: str) -> str:
    """A timestamp of records, some seconds before another; the same where that is none."""
    try:
        at = datetime.fromisoformat(timestamp) - timedelta(seconds=_OVERLAP_S)
    except (ValueError, OverflowError):
        return timestamp
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}Z"
