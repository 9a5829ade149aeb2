"""The performance lab beside the checkout (../shared/lab/perf): starting its runs, and reading what they wrote.

The lab puts the same signed messages on mxgate and on its peers in turn, in namespaces of its own; its README is the
manual.  It is used as it is.  Where it is not, not set up, or cannot run, `Lab.find` says why.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.traffic import CannotRun

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT.parent / "shared" / "lab" / "perf"


@dataclass(frozen=True, slots=True)
class LabRound:
    """What one system did with one load; latencies are from MAIL to the last reply."""

    cpu_us: float
    messages_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    pss_mib: float
    load_share: float
    is_all_accepted: bool


@dataclass(frozen=True, slots=True)
class LabMemory:
    """Memory of one system with sessions or messages held; `held` of `asked` it kept."""

    asked: int
    held: int
    before_mib: float
    peak_mib: float
    kib_per_session: float | None

    @property
    def is_whole(self) -> bool:
        return self.held == self.asked


@dataclass(frozen=True, slots=True)
class LabRun:
    """What one run of the lab found, by system; `skipped`: who did not run, and why."""

    rounds: Mapping[str, tuple[LabRound, ...]] = field(default_factory=dict)
    memory: Mapping[str, LabMemory] = field(default_factory=dict)
    verifies: Mapping[str, bool] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that is set up; `work` and `shm` are where it keeps what it made and what a run sees."""

    directory: Path
    work: Path
    shm: Path
    mxgate: str

    @classmethod
    def find(cls, mxgate: str = "", directory: Path = DIRECTORY) -> Self:
        """Raises CannotRun with what is missing."""
        if not (directory / "run.sh").exists():
            raise CannotRun("there is no ../shared/lab/perf beside the checkout")
        if os.geteuid():
            raise CannotRun("the lab needs root")
        said = subprocess.run(
            ["bash", "-c", '. "$1/lib.sh"; printf "%s\\n" "$LAB_WORK" "$LAB_SHM"', "lab", str(directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        work, shm = map(Path, said.stdout.splitlines()) if said.returncode == 0 else (Path(), Path())
        if not (work / "data" / "stamp").exists():
            raise CannotRun("the lab is not set up: ../shared/lab/perf/setup.sh")
        return cls(directory, work, shm, mxgate or str(Path(sys.executable).with_name("mxgate")))

    def run(self, systems: Sequence[str], arguments: Sequence[str], *, limit_s: float) -> LabRun:
        """One run of run.sh; its words go to standard error.  Raises CannotRun when it wrote nothing."""
        with tempfile.TemporaryDirectory(prefix="mxgate-lab-") as directory:
            out = Path(directory, "run.json")
            command = [str(self.directory / "run.sh"), ",".join(systems), *arguments, "--out", str(out)]
            try:
                # its standard output is a table of its own
                subprocess.run(
                    command,
                    stdout=sys.stderr,
                    env=os.environ | {"MXGATE": self.mxgate},
                    timeout=limit_s,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise CannotRun(f"not done within {limit_s:.0f} s") from error
            if not out.exists():
                raise CannotRun("it ended without a result")
            return read_run(json.loads(out.read_text()))


def read_run(report: Mapping[str, Any]) -> LabRun:
    """What the lab's bench.py writes as JSON: one of three kinds of results, as its arguments say."""
    arguments, results = report["args"], report["results"]
    skipped = {name: str(why).splitlines()[0] for name, why in report["skipped"].items()}
    if arguments["check"]:
        return LabRun(
            verifies={name: bool(one["verifies"]) for name, one in results.items()}, skipped=skipped
        )
    if arguments["mem_idle"] or arguments["mem_big"]:
        return LabRun(memory={name: _memory(one) for name, one in results.items()}, skipped=skipped)
    return LabRun(
        rounds={name: tuple(map(_round, rounds)) for name, rounds in results.items()}, skipped=skipped
    )


def _round(one: Mapping[str, Any]) -> LabRound:
    p50, p95, p99 = one["txn_ms"]
    return LabRound(
        cpu_us=one["cpu_us"],
        messages_per_s=one["mps"],
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        pss_mib=one["pss"],
        load_share=one["load_busy"],
        is_all_accepted=set(one["codes"]) == {"250"} and not one["errs"],
    )


def _memory(one: Mapping[str, Any]) -> LabMemory:
    return LabMemory(one["asked"], one["msgs"], one["before"], one["peak"], one.get("kib_per_session"))
