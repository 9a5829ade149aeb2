"""`python -m bench`: the benchmarks' command line."""

import signal
import sys

from bench import forward, greylist, soak, store, verify

USAGE = """\
usage: python -m bench [NAME [OPTION ...]]      without a name: all of them

  forward     CPU per forwarded message and memory per connection, beside peers; options: forward --help
  greylist    decisions a second and latency with each store, octets per entry; --quick for a look
  store       CPU and latency of a question to each store, octets per entry; --quick for a look
  verify      CPU of SPF and DKIM of a message, beside pyspf and dkimpy; options: verify --help"""


def main(arguments: list[str]) -> int:
    """Run one benchmark; its exit code."""
    # A measurement that is told to end takes its servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    match arguments:
        case []:
            store.main([])
            greylist.main([])
            return forward.main([]) or verify.main([])
        case ["forward", *options]:
            return forward.main(options)
        case ["greylist", *options]:
            greylist.main(options)
            return 0
        case ["soak", *options]:
            return soak.main(options)
        case ["store", *options]:
            store.main(options)
            return 0
        case ["verify", *options]:
            return verify.main(options)
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
        case _:
            print(USAGE, file=sys.stderr)
            return 2


sys.exit(main(sys.argv[1:]))
