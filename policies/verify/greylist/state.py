"""What a greylist's record of attempts means now (RFC 6647 2.1): a pure decision, without a store and without a clock.

A record is the time of the first attempt and, once it was let through, that it passed; times are whole seconds since
the epoch. Early retries change nothing in it, so they do not start the clock again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_PASSED = b"+"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a stranger waits, until when a retry counts, how long who passed is known."""

    delay_s: float = 300.0
    retry_window_s: float = 2 * 86_400.0
    lifetime_s: float = 35 * 86_400.0


class Standing(StrEnum):
    """Where an attempt stands."""

    NEW = "new"  # the first one: recorded, deferred
    EARLY = "early"  # a retry before its time: deferred
    IN_TIME = "in_time"  # the retry that passes; it is to be recorded as passed
    KNOWN = "known"  # it passed before


@dataclass(frozen=True, slots=True)
class Record:
    """`first_s`: when the first attempt came."""

    first_s: int
    has_passed: bool = False

    def encoded(self) -> bytes:
        """As the store has it."""
        return b"%d%b" % (self.first_s, _PASSED if self.has_passed else b"")


@dataclass(frozen=True, slots=True)
class Decision:
    """`wait_s`: how long it still has to wait, whole seconds, 0 where it may pass; `waited_s`: since the first one."""

    standing: Standing
    wait_s: int = 0
    waited_s: float = 0.0


def decode(value: bytes | None) -> Record | None:
    """The record of a value; None for none, and for one that nobody here wrote: it is begun anew."""
    if value is None:
        return None
    digits = value.removesuffix(_PASSED)
    # 12 digits last for 30,000 years
    if not digits.isdigit() or len(digits) > 12:
        return None
    return Record(int(digits), value.endswith(_PASSED))


def decide(record: Record | None, now_s: float, timing: Timing) -> Decision:
    """Where an attempt at `now_s` stands whose record, from before it, is this one.

    A clock that went back makes nobody wait longer than the delay.
    """
    if record is None:
        return Decision(Standing.NEW, _whole(timing.delay_s))
    if record.has_passed:
        return Decision(Standing.KNOWN)
    waited_s = max(0.0, now_s - record.first_s)
    if waited_s < timing.delay_s:
        return Decision(Standing.EARLY, _whole(timing.delay_s - waited_s), waited_s)
    if waited_s > timing.retry_window_s:
        return Decision(Standing.NEW, _whole(timing.delay_s))
    return Decision(Standing.IN_TIME, 0, waited_s)


def _whole(seconds: float) -> int:
    """Rounded up: who comes after so many seconds has waited long enough."""
    return int(-(-seconds // 1))
