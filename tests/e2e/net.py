"""Ports and bounded waiting: what every other module of the end-to-end kit needs.

Nothing here sleeps to let something happen: `wait_until` asks again until it is true or the deadline is over.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Address = tuple[str, int]

LOOPBACK = "127.0.0.1"
# Below the kernel's range for outgoing connections (32768-60999), so that no client socket takes a port between
# our choice and the server's bind; own randomness, since pytest-randomly seeds all workers' `random` alike.
_PORTS = range(20000, 32000)
_RANDOM = random.SystemRandom()
_POLL_S = 0.02


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    for _ in range(200):
        port = _RANDOM.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port in 200 tries")


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
