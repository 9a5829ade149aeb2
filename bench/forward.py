"""`bench forward`: what it costs to forward a message, beside an aiosmtpd program and Postfix's before-queue proxy.

Prints one table, and whether what must be reached is reached.  Exit code 0 whatever the figures are; 1 when a system
did not run, or lost or changed a message.  docs/performance.md is the manual.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.measure import CONNECTIONS, HELD_MIB, Cores, Measurement, Plan
from bench.peers import postfix_proxy
from bench.systems import AIOSMTPD, MXGATE, POSTFIX, SYSTEMS, Starter
from bench.table import gates, render_holdings, render_rows
from bench.traffic import CannotRun, Sink, compile_programs

FAILED = 1


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    systems: tuple[str, ...]
    rounds: int
    messages: int
    is_quick: bool
    mxgate: str
    json_path: Path | None


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    options = _parse(arguments)
    left_out = {POSTFIX: why} if (why := postfix_proxy.why_not()) and POSTFIX in options.systems else {}
    plan = Plan(
        systems=tuple(name for name in options.systems if name not in left_out),
        rounds=options.rounds,
        messages=options.messages,
        held_connections=(1, 10) if options.is_quick else (1, 10, 50, 100),
    )
    began = time.monotonic()
    cores = Cores.choose()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxgate-bench-")))
        directory.chmod(0o711)  # Postfix's processes run as another user and must get to their queue
        try:
            compile_programs(directory)
            if cores.load:
                os.sched_setaffinity(0, cores.load)  # the clients and the sink inherit it
            sink = stack.enter_context(Sink(directory))
        except CannotRun as error:
            print(f"bench: {error}", file=sys.stderr)
            return FAILED
        measurement = Measurement(
            plan, directory, sink, Starter(directory, sink.port, cores.system, options.mxgate)
        )
        measurement.measure_cpu()
        if MXGATE in measurement.meters:
            measurement.measure_memory()
    _print_report(plan, measurement, left_out, took_s=time.monotonic() - began)
    if options.json_path:
        options.json_path.write_text(json.dumps(_report(plan, measurement, left_out, cores), indent=1) + "\n")
    return FAILED if measurement.failures else 0


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="bench forward", description="CPU per forwarded message, beside peers"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: few messages, two rounds")
    parser.add_argument("--systems", default=",".join(SYSTEMS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (5; 2 with --quick)")
    parser.add_argument(
        "-n", type=int, metavar="N", help="messages of 2 KiB in a round (2000; 300 with --quick)"
    )
    parser.add_argument(
        "--mxgate", default="", metavar="COMMAND", help="the mxgate to measure (the one of this Python)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    given = parser.parse_args(arguments)
    systems = tuple(given.systems.split(","))
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"no system is called {', '.join(sorted(unknown))}: there are {', '.join(SYSTEMS)}")
    rounds = given.rounds or (2 if given.quick else 5)
    messages = given.n or (300 if given.quick else 2000)
    if rounds < 1 or messages < CONNECTIONS:
        parser.error(f"at least one round and {CONNECTIONS} messages")
    return Options(systems, rounds, messages, given.quick, given.mxgate, given.json)


def _print_report(plan: Plan, measurement: Measurement, left_out: dict[str, str], *, took_s: float) -> None:
    print(
        f"CPU per forwarded message: user + system of the whole process tree, one message per connection,\n"
        f"{CONNECTIONS} connections at once; medians of {plan.rounds} alternating rounds, {took_s:.0f} s in all.\n"
        f"Ratios: median (lowest-highest) of the rounds' ratios; only they mean something, and only within this run.\n"
    )
    peers = [name for name in (POSTFIX, AIOSMTPD) if name in plan.systems]
    print("\n".join(render_rows(measurement.rows, peers)))
    if measurement.holdings:
        print(f"\nMemory (PSS) of mxgate while clients hold {HELD_MIB} MiB each before the final dot:\n")
        print("\n".join(render_holdings(measurement.holdings)))
    print()
    for gate in gates(measurement.rows, measurement.holdings):
        print(gate)
    for name, kind in measurement.meters.items():
        if not kind.startswith("cgroup"):
            print(
                f"note    {name}: no cgroup may be made here, CPU comes from {kind} in steps of 10 ms: use a larger -n"
            )
    for name, why in left_out.items():
        print(f"note    {name} was left out: {why}")
    for failure in measurement.failures:
        print(f"FAILED  {failure}")


def _report(
    plan: Plan, measurement: Measurement, left_out: dict[str, str], cores: Cores
) -> dict[str, object]:
    """What --json writes."""
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": {"system": sorted(cores.system), "load": sorted(cores.load)},
        "meters": measurement.meters,
        "plan": asdict(plan),
        "left_out": left_out,
        "failures": measurement.failures,
        "rows": [asdict(row) for row in measurement.rows],
        "holdings": [asdict(one) for one in measurement.holdings],
        "gates": [
            asdict(gate) | {"is_reached": gate.is_reached}
            for gate in gates(measurement.rows, measurement.holdings)
        ],
    }
