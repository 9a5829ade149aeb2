from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.verify.greylist.state import (
    Credit,
    Decision,
    Record,
    Standing,
    Timing,
    decide,
    decode,
    decode_credit,
)

TIMING = Timing()
NOW_S = 1_700_000_000


def test_a_stranger_waits_once_and_passes_then() -> None:
    record = Record(NOW_S)
    assert decide(None, NOW_S, TIMING) == Decision(Standing.NEW, 300)
    assert decide(record, NOW_S + 100, TIMING) == Decision(Standing.EARLY, 200, 100)
    assert decide(record, NOW_S + 299.5, TIMING) == Decision(Standing.EARLY, 1, 299.5)
    assert decide(record, NOW_S + 300, TIMING) == Decision(Standing.IN_TIME, 0, 300)
    assert decide(record, NOW_S + 2 * 86_400, TIMING).standing is Standing.IN_TIME
    assert decide(record, NOW_S + 2 * 86_400 + 1, TIMING) == Decision(Standing.NEW, 300)
    assert decide(Record(NOW_S, 19_675), NOW_S + 30 * 86_400, TIMING) == Decision(Standing.KNOWN)


def test_a_delay_of_0_defers_nobody_who_is_recorded() -> None:
    assert decide(Record(NOW_S), NOW_S, Timing(delay_s=0)).standing is Standing.IN_TIME
    assert decide(None, NOW_S, Timing(delay_s=0)).wait_s == 0


DAYS = st.none() | st.integers(0, 10**6)


@given(st.integers(0, 10**12 - 1), DAYS)
def test_a_record_comes_back_as_it_was(first_s: int, passed_day: int | None) -> None:
    record = Record(first_s, passed_day)
    assert decode(record.encoded()) == record


@given(st.integers(0, 10**12 - 1), DAYS)
def test_a_credit_comes_back_as_it_was(passes: int, seen_day: int | None) -> None:
    for credit in (Credit(passes, seen_day), Credit(0, seen_day, is_allowed=True)):
        assert decode_credit(credit.encoded()) == credit


def test_a_credit_counts_from_the_number_on_that_the_operator_wants() -> None:
    assert [Credit(passes).is_known(5) for passes in (0, 4, 5, 6)] == [False, False, True, True]
    assert not Credit(1000).is_known(0)
    assert Credit(is_allowed=True).is_known(0)


@given(st.binary(max_size=20))
def test_what_others_wrote_is_a_record_or_none(value: bytes) -> None:
    record = decode(value)
    assert record is None or decode(record.encoded()) == record
    assert decode_credit(decode_credit(value).encoded()) == decode_credit(value)


@given(st.lists(st.floats(0, 200_000), min_size=1, max_size=20), st.floats(0, 10_000))
def test_who_comes_again_after_the_seconds_that_were_named_passes(gaps: list[float], delay_s: float) -> None:
    """Whatever retries came before: they never start the clock again."""
    timing = Timing(delay_s=delay_s)
    now_s, record = float(NOW_S), None
    for gap in gaps:
        decision = decide(record, now_s, timing)
        if decision.standing is Standing.NEW:
            record = Record(int(now_s))
        assert 0 <= decision.wait_s <= delay_s + 1
        if decision.standing in (Standing.NEW, Standing.EARLY):
            assert decide(record, now_s + decision.wait_s, timing).standing is Standing.IN_TIME
        else:
            assert decision.wait_s == 0
            record = Record(record.first_s if record else 0, 19_675)
        now_s += gap


@given(st.floats(-(10.0**6), 10.0**6))
def test_a_clock_that_jumps_makes_nobody_wait_longer_than_the_delay(jump_s: float) -> None:
    assert decide(Record(NOW_S), NOW_S + jump_s, TIMING).wait_s <= 300
