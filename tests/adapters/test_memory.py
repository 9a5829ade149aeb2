"""memory: what was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: what the test runner allocates and frees meanwhile would be seen too.
SCRIPT = """
import sys
from gateway.adapters.memory import release

def resident_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))

size = int(sys.argv[1])
count = 2 * 1024 * 1024 // size
blocks, small = [None] * count, [None] * count
release()
before = resident_bytes()
for number in range(count):
    blocks[number] = bytearray(size)
    blocks[number][:] = b"x" * size
    small[number] = (f"object number {number} that lives on", [number])
full = resident_bytes()
blocks.clear()
release()
print(full - before, resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc does the work")
@pytest.mark.parametrize("size", [1500, 65536])
def test_freed_content_goes_back_to_the_system(size: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(size)], capture_output=True, text=True, check=True
    )
    grown, kept = map(int, run.stdout.split())
    assert grown > 1_800_000
    assert kept < grown / 3
