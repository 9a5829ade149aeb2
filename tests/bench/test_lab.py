"""What the performance lab writes, and where it is."""

from pathlib import Path

import pytest

from bench.lab import Lab, read_run
from bench.latency import fill
from bench.traffic import CannotRun

THROUGHPUT = {
    "args": {"check": False, "mem_idle": None, "mem_big": None},
    "skipped": {"haraka-auth": "port 2602 did not open; end of haraka-auth.log:\n      Starting up"},
    "results": {
        "mxgate": [
            {
                "msgs": 400,
                "ok": 400,
                "errs": 0,
                "mps": 1183.1,
                "txn_ms": [8.48, 9.33, 11.28],
                "codes": {"250": 400},
                "cpu_us": 844.9,
                "load_busy": 0.2,
                "pss": 100.8,
            }
        ]
    },
}
MEMORY = {"msgs": 2000, "asked": 2000, "before": 92.0, "held": 96.0, "peak": 97.5, "after": 93.0}


def test_reads_rounds_and_who_was_skipped() -> None:
    run = read_run(THROUGHPUT)
    (found,) = run.rounds["mxgate"]
    assert (found.cpu_us, found.messages_per_s, found.p99_ms) == (844.9, 1183.1, 11.28)
    assert found.is_all_accepted
    assert run.skipped == {"haraka-auth": "port 2602 did not open; end of haraka-auth.log:"}


@pytest.mark.parametrize("changes", [{"codes": {"250": 399, "451": 1}}, {"errs": 1}, {"codes": {}}])
def test_notes_what_was_not_accepted(changes: dict[str, object]) -> None:
    rounds = THROUGHPUT["results"]["mxgate"]  # type: ignore[index]
    report = {**THROUGHPUT, "results": {"mxgate": [{**rounds[0], **changes}]}}
    assert not read_run(report).rounds["mxgate"][0].is_all_accepted


def test_reads_memory() -> None:
    arguments = {"check": False, "mem_idle": 2000, "mem_big": None}
    report = {"args": arguments, "skipped": {}, "results": {"mxgate": {**MEMORY, "kib_per_session": 2.2}}}
    found = read_run(report).memory["mxgate"]
    assert (found.kib_per_session, found.is_whole) == (2.2, True)
    report["results"] = {"mxgate": {**MEMORY, "msgs": 100}}
    found = read_run(report).memory["mxgate"]
    assert (found.kib_per_session, found.is_whole) == (None, False)


def test_reads_the_check() -> None:
    arguments = {"check": True, "mem_idle": None, "mem_big": None}
    report = {"args": arguments, "skipped": {}, "results": {"mxgate": {"verifies": False}}}
    assert read_run(report).verifies == {"mxgate": False}


def test_says_that_there_is_no_lab(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"no \.\./shared/lab/perf"):
        Lab.find(directory=tmp_path)


def test_fills_what_it_knows_only() -> None:
    assert fill("exec @PY@ -p @PORT@ a@b @X@", {"PY": "python", "PORT": "25"}) == "exec python -p 25 a@b @X@"
