"""`mxgate replay`: what one configuration makes of stored mail and recorded decisions, or where two of them differ.

Each message meets policies that have just been started, in the world of `mxgate explain`: nothing is delivered and
nothing remembered; policies that would remember are observed. Both configurations are given the same answers of DNS,
asked by the first one's name servers; the clock shows when the message came, where it says so. A record brings its own
answers, and its own verdict to compare.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.app import SystemClock
from gateway.config import Config
from gateway.decision import RecordError, read_record
from gateway.decision.text import printable
from gateway.explain.ask import read_zone, resolver
from gateway.explain.remembered import observed, offline
from gateway.explain.replay import replay
from gateway.explain.run import Dns, Explained, ExplainError, explain, world_of
from gateway.explain.stand_ins import StandingClock
from gateway.explain.stored import Assumed, Stored, sent, stored_in
from gateway.plugins import PlannedPolicy, plan

# Fields of ours that name the time and the transaction differ each time.
_NEVER_THE_SAME = frozenset({"received"})
_WORDS = ("action", "policy", "reason")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one message. `said` is by configuration, in their order; `trouble` why nothing could come of it.

    `differences` are those between the two, or from what its record says.
    """

    name: str
    said: tuple[Mapping[str, str], ...] = ()
    differences: tuple[str, ...] = ()
    trouble: str = ""

    def lines(self) -> Iterator[str]:
        """For people: the outcome where there is one configuration, the differences where there are any."""
        if self.trouble:
            yield f"{printable(self.name)}: skipped, {printable(self.trouble)}"
        elif self.differences:
            yield f"{printable(self.name)}:"
            yield from (f"  {printable(each)}" for each in self.differences)
        elif len(self.said) == 1:
            (said,) = self.said
            why = " ".join(filter(None, (said["policy"], said["reason"])))
            yield f"{printable(self.name)}: {said['action']} ({printable(why)}) {printable(said['reply'])}"

    def as_json(self) -> dict[str, Any]:
        """The same in JSON's types."""
        said = [dict(each) for each in self.said]
        return {"name": self.name, "said": said, "differences": [*self.differences], "trouble": self.trouble}


def replay_all(
    path: Path,
    configs: Sequence[Config],
    assumed: Assumed,
    zone: Path | None,
    tell: Callable[[Outcome], None],
) -> int:
    """Replay everything in `path`, and `tell` each outcome; how many differed. Raises ExplainError and ConfigError."""
    known = None if zone is None else read_zone(zone)
    plans = [(config, plan(config) if known is None else offline(plan(config))) for config in configs]

    async def play() -> int:
        different = 0
        async with resolver(configs[0], known) as dns:
            async for outcome in _outcomes(path, plans, assumed, dns):
                tell(outcome)
                different += bool(outcome.differences)
        return different

    return asyncio.run(play())


_Plans = Sequence[tuple[Config, Sequence[PlannedPolicy]]]


async def _outcomes(path: Path, plans: _Plans, assumed: Assumed, dns: Dns) -> AsyncIterator[Outcome]:
    for stored in stored_in(path):
        try:
            if stored.is_record:
                yield await _of_record(stored, plans)
            else:
                yield await _of_message(stored, plans, assumed, dns)
        except (ExplainError, RecordError) as exc:
            yield Outcome(stored.name, trouble=str(exc))


async def _of_message(stored: Stored, plans: _Plans, assumed: Assumed, dns: Dns) -> Outcome:
    found = []
    for config, planned in plans:
        message = sent(stored, config.server.hostname, assumed)
        server = config.server
        case = message.case(max_bytes=server.max_message_bytes, max_line_bytes=server.max_line_bytes)
        now = SystemClock()
        clock = now if message.time is None else StandingClock(message.time, now.monotonic)
        found.append(_said(await explain(case, world_of(config, observed(planned), clock, dns))))
    return Outcome(stored.name, tuple(found), tuple(_differences(*found)) if len(found) == 2 else ())


async def _of_record(stored: Stored, plans: _Plans) -> Outcome:
    try:
        record = json.loads(stored.octets)
    except (ValueError, RecursionError) as exc:
        raise ExplainError(f"it is no JSON: {exc}") from exc
    recorded = read_record(record)
    replayed = [await replay(recorded, config, planned, SystemClock()) for config, planned in plans]
    found = tuple(_said(each.explained) for each in replayed)
    if len(found) == 2:
        return Outcome(stored.name, found, tuple(_differences(*found)))
    missing = (f"not in the record: {each}" for each in replayed[0].missing)
    return Outcome(stored.name, found, (*replayed[0].differences, *missing))


def _said(explained: Explained) -> dict[str, str]:
    """What is compared: the decision, the reply, each policy's word, the results, and the fields that were added."""
    shown: dict[str, Any] = explained.as_json()
    decision = shown["decision"]
    reply = " ".join(str(decision[key]) for key in ("code", "enhanced", "text") if decision.get(key))
    said = {**{word: str(decision[word]) for word in _WORDS}, "reply": reply}
    for verdict in decision["verdicts"]:
        where = " ".join(str(verdict[key]) for key in ("policy", "stage", "rcpt") if verdict.get(key))
        would = verdict.get("would_be") or {}
        words = [verdict["action"], verdict["reason"], verdict["failure"]]
        words += [f"would {would['action']} {would['reason']}"] if would else []
        said[where] = " ".join(filter(None, words))
    for result in decision["results"]:
        said[f"result {result['method']}"] = f"{result['result']} {result['reason']}".strip()
    for field in (shown["fields"] or {}).get("added", ()):
        if field["name"].lower() not in _NEVER_THE_SAME:
            said[f"field {field['name']}"] = field["value"]
    return said


def _differences(first: Mapping[str, str], second: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*first, *second]):
        if (one := first.get(key, "nothing")) != (other := second.get(key, "nothing")):
            yield f"{key}: {one or 'nothing'} -> {other or 'nothing'}"
