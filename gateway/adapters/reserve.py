"""What a worker keeps for the mail that it has already: descriptors and memory that no new connection may take.

A connection needs more than its own descriptor: one to the downstream, one for large content, some for DNS. So
connections are turned away (421) while what is left of the process' limit is the reserve, and come in again when others
have gone. The same for memory, where the operator has set a limit.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

# SECURITY.md, invariant 9
MAX_RESERVE = 64
# For each connection: its own, the downstream's or a file of the spool; and for all: listening, DNS, idle, libraries
_FOR_EACH = 2
_FOR_ALL = 512


class Reserve:
    """Of this process. `max_memory_bytes` 0: memory has no limit here."""

    def __init__(self, max_connections: int, max_memory_bytes: int = 0) -> None:
        self.wanted = _FOR_EACH * max_connections + _FOR_ALL
        self.limit = _raised_limit(self.wanted)
        self._max_memory_bytes = max_memory_bytes
        self._usable = self.limit - min(MAX_RESERVE, self.limit // 8)
        self._left = self._usable
        self._is_heavy = False
        self.look()

    def look(self) -> None:
        """Count what is used; once a second, since it costs some microseconds for each descriptor."""
        self._left = self._usable - _descriptors()
        self._is_heavy = bool(self._max_memory_bytes) and _resident_bytes() > self._max_memory_bytes

    def taken(self) -> None:
        """A connection came since the last look, whether it stays or not."""
        self._left -= 1

    @property
    def short_of(self) -> str:
        """What must not be used any more for new connections: "descriptors", "memory", or "" when there is enough."""
        return "descriptors" if self._left < 0 else "memory" if self._is_heavy else ""


def _raised_limit(wanted: int) -> int:
    """The limit of descriptors, raised as far as is wanted and allowed: shells and old units give 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return wanted if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _descriptors() -> int:
    try:
        # itself is among them while it is read
        return len(os.listdir("/dev/fd")) - 1  # noqa: PTH208 - Path.iterdir() makes an object of each
    except FileNotFoundError:
        # A chroot without /proc. The lowest number that is free says about as much.
        lowest = os.open(os.sep, os.O_RDONLY)
        os.close(lowest)
        return lowest


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()
