"""The soak's bookkeeping; a short one for real."""

import subprocess
import sys

import pytest

from bench.soak import Ledger, Sample, Soak, compare, gates, growth, render
from bench.traffic import Sent

SENT = Sent(100, 0, 0, 0, 0, 10.0, 0.1, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0)
CLEAN = Ledger(100, 100, (), (), 0, {}, 0, {})


def soak(ledger: Ledger = CLEAN, samples: tuple[Sample, ...] = (), **changes: int) -> Soak:
    faults = {"failed_reloads": 0, "tracebacks": 0, **changes}
    messages = ledger.accepted + faults.pop("stuck", 0)
    return Soak(10.0, 200.0, 140.0, messages, SENT, ledger, 30, 30, samples, **faults)


def missed(one: Soak) -> list[str]:
    return [gate.label for gate in gates(one) if gate.is_reached is False]


def test_a_message_that_was_accepted_and_never_arrived_is_lost() -> None:
    ledger = compare(["1 250 5.0", "2 250 5.1"], ["1"])
    assert ledger.lost == (2,)
    assert missed(soak(ledger)) == ["messages accepted with 250 and not stored"]


def test_a_message_that_arrived_twice_needs_a_broken_connection() -> None:
    attempts = ["1 after 5.0", "1 250 6.0", "2 250 6.0", "3 before 5.0", "3 250 6.0"]
    ledger = compare(attempts, ["1", "1", "2", "2", "3"], kills_s=[4.9])
    assert (ledger.doubled, ledger.doubled_by_breaks) == ((2,), 1)
    assert ledger.broken == {"after": 1, "before": 1}
    assert missed(soak(ledger)) == ["messages stored twice without a broken connection"]


def test_a_message_that_was_deferred_and_stored_all_the_same_is_doubled() -> None:
    assert compare(["1 451 5.0", "1 250 6.0"], ["1", "1"]).doubled == (1,)


def test_connections_break_only_behind_a_kill() -> None:
    ledger = compare(["1 banner 4.0", "1 after 5.5", "1 250 6.0"], ["1"], kills_s=[5.0])
    assert ledger.broken_unprovoked == 1
    assert missed(soak(ledger)) == ["connections broken without a kill"]


def test_refused_connections_and_replies_are_counted() -> None:
    ledger = compare(["1 refused 4.0", "1 451 4.6", "1 421 5.2", "1 451 5.7", "1 250 6.2"], ["1"])
    assert ledger.turned == {"421": 1, "451": 2, "refused": 1}
    assert missed(soak(ledger)) == ["connections refused, and replies 4xx or 5xx"]


def test_what_arrived_without_a_reply_is_nobodys_fault() -> None:
    ledger = compare(["1 after 5.0"], ["1"], kills_s=[4.9])
    assert (ledger.accepted, ledger.arrived, ledger.lost) == (0, 1, ())


def test_growth_ignores_the_beginning_and_single_peaks() -> None:
    flat = [10.0] * 5 + [50.0] * 45
    assert growth(flat) == pytest.approx(1.0)
    assert growth([*flat[:30], 400.0, *flat[30:]]) == pytest.approx(1.0)
    assert growth([50.0 + step for step in range(100)]) == pytest.approx(1.5, abs=0.2)


def test_growth_needs_enough_samples() -> None:
    assert growth([50.0] * 20) is None


def test_memory_that_grows_is_found_and_reloads_are_not_growth() -> None:
    growing = tuple(Sample(2.0 * k, 100.0 + k, 80, 3, 30.0, 11) for k in range(60))
    assert missed(soak(samples=growing)) == ["growth of memory (PSS)"]
    reloading = tuple(
        Sample(2.0 * k, 200.0 if k > 30 and k % 2 else 100.0, 80, 5 if k % 2 else 3, 30.0, 11)
        for k in range(90)
    )
    assert missed(soak(samples=reloading)) == []


def test_a_failed_reload_and_a_traceback_are_faults() -> None:
    assert missed(soak(failed_reloads=1)) == missed(soak(tracebacks=1)) != []


def test_report_has_ten_lines_of_the_series_and_names_what_was_lost() -> None:
    samples = tuple(Sample(2.0 * k, 100.0, 80, 3, 30.0, 11) for k in range(300))
    lines = render(soak(Ledger(100, 99, (42,), (), 0, {}, 0, {}), samples))
    assert sum(line.endswith("3           30.0     11") for line in lines) == 10
    assert "lost (42,)" in lines[-1]


@pytest.mark.e2e
@pytest.mark.full
def test_a_short_soak_loses_nothing() -> None:
    """Half a minute with four kills and reloads; the growth of memory needs longer to tell."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "soak", "--minutes", "0.5", "--disturb", "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      messages accepted with 250 and not stored: 0.00" in done.stdout


@pytest.mark.parametrize("stuck", [0, 1])
def test_messages_that_never_got_through_are_a_fault(stuck: int) -> None:
    assert missed(soak(stuck=stuck)) == ["messages that never got through"] * stuck
