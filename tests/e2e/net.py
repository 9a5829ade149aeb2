"""Ports and bounded waiting: what every other module of the end-to-end kit needs.

Nothing here sleeps to let something happen: `wait_until` asks again until it is true or the deadline is over.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

Address = tuple[str, int]

LOOPBACK = "127.0.0.1"
# Below the kernel's range for outgoing connections (32768-60999), so that no client socket takes a port between
# our choice and the server's bind. Nothing holds a chosen port until then, so each of pytest's workers has a part of
# the range for itself and gives no port twice before it has given all of them.
_RANGE = range(20000, 32000)
_PARTS = 16
_POLL_S = 0.02


def _ports() -> Iterator[int]:
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
    ports = list(_RANGE[part::_PARTS])
    # own randomness: pytest-randomly seeds all workers' `random` alike, and a second run may be on this machine
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


_PORTS = _ports()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that this process was not given lately."""
    for port in itertools.islice(_PORTS, len(_RANGE) // _PARTS):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")


def wait_until(condition: Callable[[], T], *, within_s: float, what: str) -> T:
    """The first true value of `condition`; AssertionError naming `what` when there is none within the time."""
    deadline = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(_POLL_S)


def is_listening(address: Address) -> bool:
    """Whether a connection to the address is accepted."""
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True
