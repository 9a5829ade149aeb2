"""`./dev fuzz --atheris`: search for octets that a parser stumbles over, led by the code that they reach.

    python -m tests.fuzz.guided [TARGET ...] [--seconds N]

Each target of `targets` runs in a process of its own, since the search ends the process. What it has learnt stays in
.atheris/TARGET, and so do octets that made a target raise, or take too long: the next search begins with them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

LEARNT = Path(__file__).parents[2] / ".atheris"
SECONDS = 60
# A parser is done within milliseconds, but the machine may be a shared one
MAX_SECONDS_EACH = 5


def main(words: Sequence[str]) -> int:
    """Search in each target that is named, or in all; 1 when there was a finding."""
    # here, so that the processes of the targets import it under atheris' eyes
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(
        prog="./dev fuzz --atheris", description="Coverage-guided search for what makes a parser raise."
    )
    parser.add_argument("target", nargs="*", help=f"all when none is named: {', '.join(TARGETS)}")
    parser.add_argument(
        "--seconds", type=_seconds, default=SECONDS, metavar="N", help="for each target; %(default)s"
    )
    given = parser.parse_args(words)
    if unknown := [name for name in given.target if name not in TARGETS]:
        parser.error(f"there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    names = list(dict.fromkeys(given.target or TARGETS))
    found = [name for name in names if not _is_clean(name, given.seconds)]
    if found:
        print(
            f"fuzz: FOUND something in: {', '.join(found)}; the octets are in {LEARNT}/TARGET",
            file=sys.stderr,
        )
        return 1
    print(f"fuzz: nothing found in: {', '.join(names)}", file=sys.stderr)
    return 0


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return int(text)


def _is_clean(name: str, seconds: int) -> bool:
    print(f"fuzz: {name}, {seconds} s", file=sys.stderr, flush=True)
    process = multiprocessing.get_context("spawn").Process(target=search, args=(name, seconds))
    process.start()
    process.join()
    return process.exitcode == 0


def search(name: str, seconds: int) -> None:
    """Search in one target; ends the process, with 0 when nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["gateway", "policies"]):
        from tests.fuzz.targets import TARGETS, kept
    target = TARGETS[name]
    directory = LEARNT / name
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate((*target.seeds, *kept(name))):
        (directory / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={MAX_SECONDS_EACH}",
        f"-artifact_prefix={directory}/",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([name, *options, str(directory)], target.function)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
