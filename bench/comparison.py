"""`bench` without a name: mxgate beside its peers in every scenario, one table, and the marks that must be reached.

The performance lab measures what needs peers and their DNS (lab.py); the rest is measured here (latency.py, own.py).
Without the lab that part is left out, said so, and mxgate is compared in forwarding only (forward.py).
Exit code 0 whatever the figures are, 1 when a system did not run or refused mail.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import forward, latency, own
from bench.comparison_table import (
    AIOSMTPD,
    BARE,
    HARAKA,
    HARAKA_BARE,
    MILTER,
    MXGATE,
    PROXY,
    RSPAMD,
    Found,
    Scenario,
    gates,
    render,
    render_latency,
)
from bench.lab import Lab, LabRun
from bench.table import Gate
from bench.traffic import CannotRun

FAILED = 1
FULL = (MXGATE, HARAKA, MILTER, RSPAMD, AIOSMTPD)
BIG = ("--sink", "fast")
CHECK = Scenario("check", "does it verify?", FULL, ("2k", "--check"))
SCENARIOS = (
    Scenario("warm", "2 KiB, warm DNS", FULL, ("2k", "-n", "500")),
    Scenario("cold", "2 KiB, cold DNS", FULL, ("cold", "-n", "400")),
    Scenario("ten", "2 KiB, 10 on a connection", FULL, ("2k", "-n", "500", "-m", "10")),
    Scenario("20k", "20 KiB", FULL, ("20k", "-n", "200")),
    Scenario("1m", "1 MiB", FULL, ("1m", "-n", "30", "-c", "5", *BIG)),
    Scenario("hundred", "2 KiB, 100 connections", (MXGATE, HARAKA), ("2k", "-n", "800", "-c", "100")),
    Scenario(
        "forward",
        "2 KiB, forwarding only",
        (BARE, HARAKA_BARE, PROXY, "py-aiosmtpd-naive"),
        ("2k", "-n", "500"),
    ),
    Scenario("idle", "2,000 idle sessions", (MXGATE, HARAKA), ("2k", "--mem-idle", "2000")),
    Scenario(
        "held", "50 x 10 MiB in flight", (MXGATE, HARAKA, MILTER, RSPAMD), ("10m", "--mem-big", "50", *BIG)
    ),
)
QUICK = (
    Scenario("warm", "2 KiB, warm DNS", (MXGATE, HARAKA, MILTER), ("2k", "-n", "200")),
    Scenario("1m", "1 MiB", (MXGATE, HARAKA, MILTER), ("1m", "-n", "10", "-c", "5", *BIG)),
)
ROUNDS, QUICK_ROUNDS = 5, 2
LATENCY_ROUNDS = 3
LIMIT_S = 900.0
LATENCY, OWN = "latency", "own"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    is_quick: bool
    rounds: int
    mxgate: str
    only: tuple[str, ...]
    json_path: Path | None


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    options = _parse(arguments)
    begun = time.monotonic()
    found = Found()
    lab = None
    if set(options.only) != {OWN}:
        try:
            lab = Lab.find(options.mxgate)
        except CannotRun as error:
            what = "all that needs the peers' verification"
            if options.only:  # then it was asked for
                found.failures.append(f"{what}: {error}")
            else:
                found.left_out[what] = str(error)
    if lab:
        _measure_in(lab, found, options)
    if not options.only or OWN in options.only:
        _measure_own(found, options)
    took_s = time.monotonic() - begun
    when = time.strftime("%d %B %Y")
    print(
        f"CPU per message: user + system of a whole system; medians of {options.rounds} alternating rounds.\n"
        f"Ratios are of CPU (idle sessions, in flight: of memory): median (lowest-highest) of the rounds' ratios;\n"
        f"only they mean something, and only within this run.\n"
        f"{when}, {took_s:.0f} s, CPython {platform.python_version()}.\n"
    )
    _print(found, is_whole=bool(lab) and not (options.is_quick or options.only))
    if options.json_path:
        report = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": platform.platform(),
            **asdict(found),
        }
        report["gates"] = [asdict(gate) | {"is_reached": gate.is_reached} for gate in _gates(found)]
        options.json_path.write_text(json.dumps(report, indent=1, default=str) + "\n")
    code = FAILED if found.failures else 0
    if lab is None and not options.only:
        print()
        code |= forward.main([*(["--quick"] if options.is_quick else []), "--mxgate", options.mxgate])
    return code


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="bench", description="mxgate beside its peers, one table")
    parser.add_argument(
        "--quick", action="store_true", help="a look of a minute or two: 2 KiB and 1 MiB, rough figures"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help=f"rounds of each scenario ({ROUNDS})")
    parser.add_argument(
        "--mxgate", default="", metavar="COMMAND", help="the mxgate to measure (the one of this Python)"
    )
    parser.add_argument("--only", default="", metavar="A,B", help="scenarios by name; also latency, own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    given = parser.parse_args(arguments)
    names = {each.name for each in SCENARIOS} | {LATENCY, OWN}
    only = tuple(filter(None, given.only.split(",")))
    if unknown := set(only) - names:
        parser.error(
            f"no scenario is called {', '.join(sorted(unknown))}: there are {', '.join(sorted(names))}"
        )
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    if rounds < 1:
        parser.error("at least one round")
    return Options(given.quick, rounds, given.mxgate, only, given.json)


def _measure_in(lab: Lab, found: Found, options: Options) -> None:
    scenarios = [
        each
        for each in (QUICK if options.is_quick else SCENARIOS)
        if not options.only or each.name in options.only
    ]
    if scenarios:
        ran = _run(lab, CHECK, options, found)
        found.failures += [
            f"{name} does not verify as asked" for name, verifies in ran.verifies.items() if not verifies
        ]
    for scenario in scenarios:
        ran = _run(lab, scenario, options, found)
        found.runs[scenario.name] = (scenario, ran)
        found.failures += [
            f"{scenario.label}: {name} did not accept all of it"
            for name, rounds in ran.rounds.items()
            if not all(one.is_all_accepted for one in rounds)
        ]
    if not options.is_quick and (not options.only or LATENCY in options.only):
        _say("latency at half of the capacity")
        try:
            found.latency.update(latency.measure(lab, (MXGATE, HARAKA), rounds=LATENCY_ROUNDS))
        except CannotRun as error:
            found.failures.append(f"latency: {error}")


def _run(lab: Lab, scenario: Scenario, options: Options, found: Found) -> LabRun:
    systems = [name for name in scenario.systems if name not in found.left_out]
    is_memory = any(word.startswith("--") and word != "--sink" for word in scenario.arguments)
    rounds = () if is_memory else ("-r", str(options.rounds))
    _say(scenario.label)
    try:
        ran = lab.run(systems, (*scenario.arguments, *rounds), limit_s=LIMIT_S)
    except CannotRun as error:
        found.failures.append(f"{scenario.label}: {error}")
        return LabRun()
    found.left_out.update(ran.skipped)
    return ran


def _measure_own(found: Found, options: Options) -> None:
    try:
        found.own = own.measure(mxgate=options.mxgate, is_quick=options.is_quick)
    except CannotRun as error:
        found.failures.append(f"mxgate alone: {error}")


def _print(found: Found, *, is_whole: bool) -> None:
    """A mark that was not measured is no news in a run of a part."""
    for lines in (
        render(found.runs),
        render_latency(found.latency),
        own.render(found.own) if found.own else [],
    ):
        if lines:
            print("\n".join(lines) + "\n")
    for gate in _gates(found):
        if is_whole or gate.value is not None:
            print(gate)
    for name, why in found.left_out.items():
        print(f"note    {name} was left out: {why}")
    for failure in found.failures:
        print(f"FAILED  {failure}")


def _gates(found: Found) -> list[Gate]:
    return [*gates(found.runs, found.latency), *(own.gates(found.own) if found.own else ())]


def _say(text: str) -> None:
    print(f"--- {text}", file=sys.stderr, flush=True)
