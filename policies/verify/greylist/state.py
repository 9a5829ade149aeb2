"""What a greylist's records mean now (RFC 6647 2.4): pure decisions, without a store and without a clock.

A Record is the time of the first attempt and, once it was let through, the day on which that was so last. Early retries
change nothing in it, so they do not start the clock again. A Credit is what a network or an authenticated domain has
earned by retries in time, or was given by the operator. Times are whole seconds, days those since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DAY_S = 86_400
RECENT_S = 2.0
"""For so long a worker lets pass whom it has just found known, without asking again: `forget` waits for it."""

_ALLOWED = b"allow"
# 12 digits of seconds last for 30,000 years
_MAX_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a stranger waits, until when a retry counts, how long who passed is known."""

    delay_s: float = 300.0
    retry_window_s: float = 2.0 * DAY_S
    lifetime_s: float = 35.0 * DAY_S


class Standing(StrEnum):
    """Where an attempt stands."""

    NEW = "new"  # the first one: to be recorded; with a delay of 0 it passes
    EARLY = "early"  # a retry before its time: deferred
    IN_TIME = "in_time"  # the retry that passes; it is to be recorded as passed
    KNOWN = "known"  # it passed before


@dataclass(frozen=True, slots=True)
class Record:
    """`first_s`: when the first attempt came; `passed_day`: when it was let through last, None before."""

    first_s: int
    passed_day: int | None = None

    def encoded(self) -> bytes:
        """As the store has it."""
        return _encoded(b"%d" % self.first_s, self.passed_day)


@dataclass(frozen=True, slots=True)
class Credit:
    """`passes`: how many triplets came again in time; `seen_day`: when that, or mail because of it, was last."""

    passes: int = 0
    seen_day: int | None = None
    is_allowed: bool = False

    def encoded(self) -> bytes:
        """As the store has it."""
        return _encoded(_ALLOWED if self.is_allowed else b"%d" % self.passes, self.seen_day)

    def is_known(self, known_after: int) -> bool:
        """Whether its mail passes at once; with `known_after` 0 only the operator's word counts."""
        return self.is_allowed or 0 < known_after <= self.passes


@dataclass(frozen=True, slots=True)
class Decision:
    """`wait_s`: how long it still has to wait, whole seconds, 0 where it may pass; `waited_s`: since the first one."""

    standing: Standing
    wait_s: int = 0
    waited_s: float = 0.0


def day_of(seconds: float) -> int:
    """The day of a time."""
    return int(seconds // DAY_S)


def decode(value: bytes | None) -> Record | None:
    """The record of a value; None for none, and for one that nobody here wrote: it is begun anew."""
    first, day = _decoded(value)
    return None if first is None or first == _ALLOWED else Record(int(first), day)


def decode_credit(value: bytes | None) -> Credit:
    """The credit of a value; none for what nobody here wrote."""
    passes, day = _decoded(value)
    if passes is None:
        return Credit()
    return Credit(0, day, is_allowed=True) if passes == _ALLOWED else Credit(int(passes), day)


def decide(record: Record | None, now_s: float, timing: Timing) -> Decision:
    """Where an attempt at `now_s` stands whose record, from before it, is this one.

    A clock that went back makes nobody wait longer than the delay.
    """
    if record is None:
        return Decision(Standing.NEW, _whole(timing.delay_s))
    if record.passed_day is not None:
        return Decision(Standing.KNOWN)
    waited_s = max(0.0, now_s - record.first_s)
    if waited_s < timing.delay_s:
        return Decision(Standing.EARLY, _whole(timing.delay_s - waited_s), waited_s)
    if waited_s > timing.retry_window_s:
        return Decision(Standing.NEW, _whole(timing.delay_s))
    return Decision(Standing.IN_TIME, 0, waited_s)


def _encoded(what: bytes, day: int | None) -> bytes:
    return what if day is None else b"%b+%d" % (what, day)


def _decoded(value: bytes | None) -> tuple[bytes | None, int | None]:
    what, plus, day = (value or b"").partition(b"+")
    is_sound = (what.isdigit() or what == _ALLOWED) and day.isdigit() == bool(plus)
    if not is_sound or max(len(what), len(day)) > _MAX_DIGITS:
        return None, None
    return what, int(day) if plus else None


def _whole(seconds: float) -> int:
    """Rounded up: who comes after so many seconds has waited long enough."""
    return int(-(-seconds // 1))
