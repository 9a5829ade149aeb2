"""The answer to a query: what one worker says, and what all of them said together.

A worker makes its answer in small steps: the loop that serialises records is the one that serves mail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Final

from gateway.decision.filters import parse_query
from gateway.decision.ring import DecisionRing
from gateway.decision.show import Json, redacted, to_json
from gateway.redaction import Redaction

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""Of the JSON of one worker's answer; a first record is in it in any case."""
# About a millisecond.
_STEP = 16


class DecisionsAnswer:
    """What one worker answers: `step` until it is complete, then `result`. Raises FilterError for a bad query.

    The records come in full when `tx` is asked for; otherwise without the header, evidence and DNS. What `redaction`
    takes out is asked for all the same by who knows it.
    """

    def __init__(
        self, ring: DecisionRing, query: Mapping[str, object], redaction: Redaction | None = None
    ) -> None:
        filters, limit = parse_query(query)
        self._redaction = redaction
        self._found = [*ring.latest(limit + 1, filters=filters)]  # one more tells whether there is more
        self._is_truncated = len(self._found) > limit
        self._found = self._found[limit - 1 :: -1] if self._is_truncated else self._found[::-1]
        self._in_full = bool(filters.tx)
        self._shown: list[Json] = []
        self._bytes = 0

    def step(self) -> bool:
        """Serialise a few more records; True when that was all."""
        # in full a record takes as long as several that are not
        for _ in range(min(1 if self._in_full else _STEP, len(self._found))):
            shown = to_json(self._found.pop(), in_full=self._in_full)
            if self._redaction:
                shown = redacted(shown, self._redaction)
            self._bytes += len(json.dumps(shown))
            if self._shown and self._bytes > MAX_ANSWER_BYTES:
                self._found.clear()
                self._is_truncated = True
                break
            self._shown.append(shown)
        return not self._found

    @property
    def result(self) -> dict[str, Json]:
        """The records, the newest first; `truncated`: there are more that were asked for."""
        return {"decisions": self._shown, "truncated": self._is_truncated}


def merge_decisions(answers: Sequence[Mapping[str, Json]], limit: int) -> dict[str, Json]:
    """One answer of those of all workers, by time, the newest first.

    Each has `worker` and `pid`, and either `decisions`, a worker's answer, or `error`. Where one is truncated, so is
    the whole; a worker that could not answer stands in `errors`, and its records are missing.
    """
    records: list[dict[str, Json]] = []
    errors: list[Json] = []
    is_truncated = False
    for answer in answers:
        said = answer.get("decisions")
        if not isinstance(said, dict):
            errors.append(dict(answer))
            continue
        records += [{"worker": answer["worker"], **record} for record in said["decisions"]]
        is_truncated = is_truncated or bool(said["truncated"])
    # each is in order already; timestamps sort as the times do
    records.sort(key=itemgetter("timestamp"), reverse=True)
    is_truncated = is_truncated or len(records) > limit
    return {"decisions": [*records[:limit]], "truncated": is_truncated, "errors": errors}
