"""connection_counts: what several workers count in one memory."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from gateway.connection_counts import ConnectionCounts, SharedCounts, lone_counts

ONE, TWO = 0xC0000201, 0xC0000202


def pair() -> tuple[SharedCounts, ConnectionCounts, ConnectionCounts]:
    """The memory and two workers."""
    shared = SharedCounts(4)
    return shared, shared.of(shared.take()), shared.of(shared.take())


# --- connections that are open ---------------------------------------------------------------------------------


def test_connections_of_all_workers_count() -> None:
    _, first, second = pair()
    first.opened()
    first.opened()
    second.opened()
    assert (first.total, second.total) == (3, 3)
    first.closed()
    assert (first.total, second.total) == (2, 2)


def test_a_client_is_the_same_for_all_workers() -> None:
    _, first, second = pair()
    for counts in (first, second, second):
        counts.client_opened(counts.client(ONE))
    for counts in (first, second):
        assert counts.has(counts.client(ONE), 3)
        assert not counts.has(counts.client(ONE), 4)
        assert not counts.has(counts.client(TWO), 1)
    second.client_closed(second.client(ONE))
    assert not first.has(first.client(ONE), 3)


def test_what_a_worker_counted_vanishes_with_it_and_its_column_is_given_again() -> None:
    shared, first, second = pair()
    for counts in (first, second):
        counts.opened()
        counts.client_opened(counts.client(ONE))
    shared.release(0)
    assert second.total == 1
    assert not second.has(second.client(ONE), 2)
    assert shared.free == 3
    assert shared.take() == 0
    assert not second.has(second.client(ONE), 2)


def test_there_are_as_many_columns_as_were_made() -> None:
    shared = SharedCounts(2)
    assert [shared.take(), shared.take()] == [0, 1]
    with pytest.raises(ValueError, match="empty"):
        shared.take()


@pytest.mark.parametrize("number", [0, 2**32 - 1, -1, -(2**64)])
def test_every_address_and_network_is_a_client(number: int) -> None:
    counts = lone_counts()
    counts.client_opened(counts.client(number))
    assert counts.has(counts.client(number), 1)


def test_never_counts_too_few_and_hardly_ever_too_many() -> None:
    shared, first, second = pair()
    open_: Counter[int] = Counter()
    chance = random.Random(7)
    for _ in range(2000):
        number, counts = chance.randrange(400), chance.choice((first, second))
        open_[number] += 1
        counts.client_opened(counts.client(number))
    wrong = [
        number
        for number, count in open_.items()
        if not first.has(first.client(number), count) or first.has(first.client(number), count + 1)
    ]
    assert all(first.has(first.client(number), open_[number]) for number in wrong)
    assert len(wrong) <= 2
    assert shared.free == 2


def test_processes_share_it_and_a_killed_one_leaves_nothing() -> None:
    shared = SharedCounts(2)
    own, child = shared.of(shared.take()), shared.take()
    pid = os.fork()
    if pid == 0:
        counts = shared.of(child)
        counts.opened()
        counts.client_opened(counts.client(ONE))
        os._exit(0)
    os.waitpid(pid, 0)
    assert own.total == 1
    assert own.has(own.client(ONE), 1)
    shared.release(child)
    assert own.total == 0
    assert not own.has(own.client(ONE), 1)


# --- new connections a minute ----------------------------------------------------------------------------------


def came(counts: ConnectionCounts, times: int, limit: int, now_s: float, number: int = ONE) -> int:
    """How many of so many attempts were admitted."""
    counts.roll(now_s)
    return sum(counts.admits(counts.client(number), limit, now_s) for _ in range(times))


def test_a_client_comes_as_often_as_the_limit_to_all_workers_and_others_do_not_count() -> None:
    _, first, second = pair()
    assert came(first, 2, 3, 600.0) == 2
    assert came(second, 2, 3, 600.0) == 1
    assert came(first, 1, 3, 600.0, TWO) == 1


def test_the_minute_slides() -> None:
    _, first, second = pair()
    assert came(first, 20, 10, 659.0) == 10
    # of the ten of the minute before, this part is less than a minute ago
    assert came(second, 20, 10, 660.0) == 0
    assert came(second, 20, 10, 690.0) == 5
    assert came(first, 20, 10, 719.9) == 5


def test_who_was_refused_may_come_as_soon_as_the_others_may() -> None:
    _, first, _ = pair()
    assert came(first, 1, 1, 600.0) == 1
    assert not any(came(first, 1, 1, float(second)) for second in range(601, 661))
    assert came(first, 1, 1, 661.0) == 1


@pytest.mark.parametrize("later_s", [120.0, 180.0, 240.0, 3600.0])
def test_only_the_last_two_minutes_are_remembered(later_s: float) -> None:
    _, first, _ = pair()
    assert came(first, 5, 5, 600.0) == 5
    if later_s == 120.0:
        assert came(first, 5, 5, 660.0) == 0  # each minute is seen
    assert came(first, 5, 5, 600.0 + later_s) == 5


def test_what_a_worker_that_ended_admitted_is_remembered() -> None:
    shared, first, second = pair()
    assert came(first, 3, 3, 600.0) == 3
    shared.release(0)
    assert came(second, 1, 3, 600.0) == 0
