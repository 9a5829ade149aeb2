"""`bench smoke`: what it reads, and what it refuses; the whole of it for real is long."""

import json

import pytest

from bench import smoke, workload
from bench.traffic import CannotRun


def test_reads_the_totals_of_callgrind_and_not_its_summary() -> None:
    assert (
        smoke.total_of("events: Ir\nsummary: 18446744073700159197\nfn=(1)\n1 2\ntotals: 331809785\n")
        == 331809785
    )


def test_a_profile_without_totals_is_no_profile() -> None:
    with pytest.raises(CannotRun, match="no totals"):
        smoke.total_of("events: Ir\n")


@pytest.mark.parametrize(("ratio", "is_reached"), [(7.0, True), (8.04, True), (8.06, False), (5.0, True)])
def test_a_message_may_cost_a_little_more_than_the_reference(ratio: float, *, is_reached: bool) -> None:
    assert smoke.judge(ratio, 7.0).is_reached is is_reached


def test_reference_is_a_ratio() -> None:
    reference = json.loads(smoke.REFERENCE.read_text())
    assert 1 < reference["ratio"] < 100


def test_the_workload_is_what_it_was() -> None:
    """Another one makes the reference meaningless."""
    assert workload.unit() == 1163
