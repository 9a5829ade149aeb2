"""`python -m bench`: the benchmarks' command line."""

import signal
import sys
from collections.abc import Callable, Sequence

from bench import comparison, forward, greylist, metrics, own, smoke, soak, store, verify

USAGE = """\
usage: python -m bench [NAME] [OPTION ...]

Without a name: mxgate beside its peers in every scenario, one table. Options: --help; --quick for a look.

  forward     CPU per forwarded message and memory per connection, beside peers; options: forward --help
  greylist    decisions a second and latency with each store, octets per entry; --quick for a look
  growth      memory after many messages; options: growth --help
  metrics     a count, a push, and scrapes of four workers under load; --quick for a look
  smoke       whether a message still costs what it did, by instructions: for CI
  soak        load for minutes with kills and reloads; nothing may be lost; options: soak --help
  store       CPU and latency of a question to each store, octets per entry; --quick for a look
  verify      CPU of SPF and DKIM of a message, beside pyspf and dkimpy; options: verify --help"""

BENCHMARKS: dict[str, Callable[[list[str]], int | None]] = {
    "forward": forward.main,
    "greylist": greylist.main,
    "growth": own.main,
    "metrics": metrics.main,
    "smoke": smoke.main,
    "soak": soak.main,
    "store": store.main,
    "verify": verify.main,
}


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark, or the comparison; its exit code."""
    # A measurement that is told to end takes its servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments and arguments[0] in BENCHMARKS:
        return BENCHMARKS[arguments[0]](list(arguments[1:])) or 0
    if arguments and not arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    if arguments and arguments[0] in {"-h", "--help"}:
        print(USAGE + "\n")
    return comparison.main(arguments)


sys.exit(main(sys.argv[1:]))
