"""The table of `bench`: merged rows, ratios and marks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.comparison_table import Scenario, gates, render, render_latency
from bench.lab import LabMemory, LabRound, LabRun
from bench.latency import Latency

WARM = Scenario("warm", "2 KiB, warm DNS", ("mxgate",), ("2k",))
HUNDRED = Scenario("hundred", "2 KiB, 100 connections", ("mxgate",), ("2k", "-c", "100"))
IDLE = Scenario("idle", "2,000 idle sessions", ("mxgate",), ("2k",))
HELD = Scenario("held", "50 x 10 MiB in flight", ("mxgate",), ("10m",))


def rounds(
    *cpu_us: float, per_s: float = 1000.0, p95_ms: float = 10.0, is_all_accepted: bool = True
) -> tuple[LabRound, ...]:
    return tuple(LabRound(cpu, per_s, 8.0, p95_ms, 12.0, 100.0, 0.2, is_all_accepted) for cpu in cpu_us)


def run(**by_system: tuple[LabRound, ...]) -> LabRun:
    return LabRun(rounds={name.replace("_", "-"): one for name, one in by_system.items()})


def values(found: dict[str, tuple[Scenario, LabRun]]) -> dict[str, float]:
    return {gate.label: gate.value for gate in gates(found, {}) if gate.value is not None}


def test_ratios_are_taken_round_by_round() -> None:
    """The machine was half as fast in the second round."""
    warm = run(
        mxgate=rounds(300, 600, 330),
        haraka_auth=rounds(1000, 2000, 1000),
        postfix_milter=rounds(3000, 6000, 3000),
    )
    header, ours, haraka, milter = render({"warm": (WARM, warm)})
    assert header.split()[-6:] == ["to", "haraka", "to", "postfix", "to", "rspamd"]
    assert ours.startswith("2 KiB, warm DNS")
    assert ours.split()[-4:] == ["0.30", "(0.30-0.33)", "0.10", "(0.10-0.11)"]
    assert haraka.split()[-2:] == ["0.33", "(0.33-0.33)"]
    assert milter.split()[-2:] == ["3.00", "(3.00-3.00)"]
    assert values({"warm": (WARM, warm)}) == pytest.approx(
        {
            "2 KiB: CPU to Haraka": 0.30,
            "2 KiB: CPU to Postfix + milters": 0.10,
            "p95 at 20 connections to Haraka's": 1.0,
        }
    )


def test_a_peer_that_did_not_run_leaves_its_column_empty() -> None:
    (_, line) = render({"warm": (WARM, run(mxgate=rounds(300.0)))})
    assert "(" not in line
    assert all("not measured" in str(gate) for gate in gates({"warm": (WARM, LabRun())}, {}))


def test_says_when_not_all_was_accepted() -> None:
    (_, line) = render({"warm": (WARM, run(mxgate=rounds(300.0, is_all_accepted=False)))})
    assert line.endswith("(not all was accepted)")


def test_throughput_is_a_mark_to_be_exceeded() -> None:
    hundred = run(mxgate=rounds(300.0, per_s=1200.0), haraka_auth=rounds(900.0, per_s=300.0))
    (gate,) = (one for one in gates({"hundred": (HUNDRED, hundred)}, {}) if one.value is not None)
    assert str(gate) == (
        "ok      messages/s of a core at 100 connections to Haraka's: 4.00 (must be at least 3.00, goal 6.00)"
    )


def test_memory_is_compared_between_those_that_held_all() -> None:
    idle = LabRun(
        memory={
            "mxgate": LabMemory(2000, 2000, 92.0, 96.0, 2.2),
            "haraka-auth": LabMemory(2000, 2000, 90.0, 200.0, 22.0),
            "postfix-milter": LabMemory(2000, 100, 90.0, 200.0, 1381.0),
        }
    )
    held = LabRun(memory={"mxgate": LabMemory(50, 50, 92.0, 98.0, None)})
    _, ours, haraka, milter, big = render({"idle": (IDLE, idle), "held": (HELD, held)})
    assert "2.2 KiB a session, 2000 of 2000 held" in ours
    assert ours.split()[-1] == "0.10"
    assert "100 of 2000 held" in milter
    assert haraka.endswith("held")
    assert "6.0 MiB above idle" in big
    assert values({"idle": (IDLE, idle), "held": (HELD, held)}) == pytest.approx(
        {"idle session": 2.2, "50 x 10 MiB in flight, above idle": 6.0}
    )


def test_latency_has_a_line_for_the_downstream_alone() -> None:
    found = {
        "mxgate": Latency(800.0, 400.0, 2.0, 5.0, 31.0),
        "downstream": Latency(None, 400.0, 0.01, 0.02, 0.03),
    }
    lines = render_latency(found)
    assert lines[-2].split() == ["mxgate", "800", "400", "2.00", "5.00", "31.00"]
    assert lines[-1].split() == ["downstream", "400", "0.01", "0.02", "0.03"]
    assert (
        "MISSED  p99 from dot to reply at half load: 31.00 ms (must be at most 30.00 ms, goal 10.00 ms)"
        in [str(gate) for gate in gates({}, found)]
    )


def test_nothing_measured_has_no_table() -> None:
    assert render({}) == render_latency({}) == []


def test_the_command_line_names_benchmarks_and_scenarios() -> None:
    for words, said in ((["speed"], "growth"), (["--only", "speed"], "cold, forward, held")):
        done = subprocess.run(
            [sys.executable, "-m", "bench", *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, said in done.stderr) == (2, True)


@pytest.mark.e2e
@pytest.mark.full
def test_what_needs_no_peer_is_measured_for_real(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "own", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two workers to one: CPU of a message" in done.stdout
    found = json.loads(report.read_text())
    assert len(found["own"]["start_s"]) == 2
    assert found["own"]["scrape"]["bytes"] > 1000
    assert [gate["is_reached"] for gate in found["gates"] if gate["label"] == "start to the first 220"] != [
        None
    ]
