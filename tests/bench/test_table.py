"""Medians, ratios, gates and lines of the benchmarks' table."""

import pytest

from bench.systems import AIOSMTPD, MXGATE, POSTFIX
from bench.table import (
    KIB,
    MIB,
    Case,
    Gate,
    Holding,
    Round,
    Row,
    gates,
    ratio,
    render_holdings,
    render_rows,
    spread,
)

SMALL = Case("2 KiB", 2 * KIB, 100)
NEW_RCPTS = Case("2 KiB, new recipients", 2 * KIB, 100, is_distinct=True)
BIG = Case("1 MiB", MIB, 20)


def row(case: Case, system: str, *cpu_us: float, load_share: float = 0.2) -> Row:
    return Row(case, system, tuple(Round(cpu, 1000.0, 5.0, 9.0, load_share) for cpu in cpu_us))


def test_spread_is_relative_to_the_median() -> None:
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)


def test_ratio_is_taken_round_by_round() -> None:
    """The machine was twice as slow in the second round: both suffered, their ratio did not."""
    found = ratio([100.0, 200.0, 110.0], to=[400.0, 800.0, 400.0])
    assert (found.lowest, found.median, found.highest) == pytest.approx((0.25, 0.25, 0.275))
    assert str(found) == "0.25 (0.25-0.28)"


def test_ratio_needs_the_same_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], to=[1.0])


def test_gates_compare_with_postfix_and_with_the_cached_case() -> None:
    rows = [
        row(SMALL, MXGATE, 200.0, 210.0, 190.0),
        row(SMALL, POSTFIX, 1000.0, 1000.0, 1000.0),
        row(NEW_RCPTS, MXGATE, 300.0, 300.0, 300.0),
        row(BIG, MXGATE, 2000.0, 2000.0, 2000.0),
        row(BIG, POSTFIX, 1000.0, 1000.0, 1000.0),
    ]
    holdings = [Holding(1, 10, 30.0, 30.6, 31.0), Holding(100, 10, 30.0, 40.0, 90.0)]
    found = gates(rows, holdings)
    assert [gate.value for gate in found] == pytest.approx([0.2, 2.0, 1.5, 0.6])
    assert [gate.is_reached for gate in found] == [True, False, False, False]


def test_gates_say_what_was_not_measured() -> None:
    found = gates([row(SMALL, MXGATE, 200.0)], [])
    assert [gate.is_reached for gate in found] == [None, None, None, None]
    assert all("not measured" in str(gate) for gate in found)


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        (Gate("x", 0.4, 0.4, 0.2), "ok      x: 0.40 (must be at most 0.40, goal 0.20)"),
        (Gate("x", 0.41, 0.4), "MISSED  x: 0.41 (must be at most 0.40)"),
        (Gate("x", 0.5, 0.5, unit=" MiB", is_strict=True), "MISSED  x: 0.50 MiB (must be below 0.50 MiB)"),
        (Gate("x", None, 0.4), "-       x: not measured (must be at most 0.40)"),
    ],
)
def test_gate_line(gate: Gate, line: str) -> None:
    assert str(gate) == line


def test_table_has_a_ratio_to_each_peer_but_oneself() -> None:
    rows = [row(SMALL, MXGATE, 200.0), row(SMALL, AIOSMTPD, 1600.0), row(SMALL, POSTFIX, 800.0)]
    header, ours, aiosmtpd, postfix = render_rows(rows, [POSTFIX, AIOSMTPD])
    assert (
        " ".join(header.split())
        == "case system CPU us spread msg/s p50 ms p95 ms to postfix-proxy to aiosmtpd"
    )
    assert ours.split()[-4:] == ["0.25", "(0.25-0.25)", "0.12", "(0.12-0.12)"]
    assert aiosmtpd.split()[-2:] == ["2.00", "(2.00-2.00)"]
    assert postfix.split()[-2:] == ["0.50", "(0.50-0.50)"]


def test_table_compares_new_recipients_with_known_ones() -> None:
    rows = [row(SMALL, MXGATE, 200.0), row(NEW_RCPTS, MXGATE, 250.0)]
    assert render_rows(rows, [POSTFIX])[-1].endswith("1.25 (1.25-1.25) of the cached case")


def test_table_warns_when_the_load_was_the_limit() -> None:
    assert "busy" in render_rows([row(SMALL, MXGATE, 200.0, load_share=0.9)], [])[-1]


def test_memory_is_what_a_connection_adds() -> None:
    holding = Holding(50, 10, before_mib=30.0, held_mib=40.0, peak_mib=95.5)
    assert holding.per_connection_mib == pytest.approx(0.2)
    assert render_holdings([holding])[-1].split() == ["50", "30.0", "40.0", "95.5", "0.20"]
