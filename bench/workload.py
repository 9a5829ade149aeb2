"""A fixed piece of pure Python, to which `bench smoke` compares what the gateway does for a message.

It does what such a program does all day: calls, attributes, dictionaries, small objects, bytes cut and joined,
generators stepped, numbers formatted. What a Python does differently from another one (its version, how it was built)
touches both sides alike. Never change it: the reference in smoke.json is a ratio to it.

As a program it says "ready", awaits a line, does its units, says "done", and awaits the end of its input.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

UNITS = 100
_LINES = [b"Field-%d: value %d; with=some, more=%d\r\n" % (k, k * 7, k % 3) for k in range(20)]
_WORD = re.compile(rb"[a-z]+")


@dataclass(frozen=True, slots=True)
class _Field:
    name: bytes
    value: bytes
    size: int


def unit() -> int:
    """One unit of work; the number depends on all of it."""
    fields = list(_fields(b"".join(_LINES)))
    by_name = {field.name.lower(): field for field in fields}
    total = 0
    for field in fields:
        total += by_name[field.name.lower()].size
        total += len(_WORD.findall(field.value))
    record = {
        "event": "unit.done",
        "fields": len(fields),
        "size": total,
        "names": [f"{n!r}" for n in by_name],
    }
    return total + len(json.dumps(record))


def _fields(block: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(block):
        end = block.find(b"\r\n", at)
        name, _, value = block[at:end].partition(b":")
        yield _Field(name, value.strip(), end - at)
        at = end + 2


def main() -> None:
    """Be measured."""
    unit()
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(UNITS):
        unit()
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
