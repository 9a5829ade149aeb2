"""A name server in which no name exists: what gateways ask whose tests are about something else."""

from __future__ import annotations

import socket
import threading
from functools import cache

from tests.e2e.net import LOOPBACK, Address

# RFC 1035 4.1.1: a response with recursion available, NXDOMAIN, one question, nothing else
_FLAGS_AND_COUNTS = b"\x81\x83\0\1\0\0\0\0\0\0"
_ROOM = 4096


@cache
def nowhere() -> Address:
    """Its address. It runs as long as this process does."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((LOOPBACK, 0))
    threading.Thread(target=_serve, args=(server,), daemon=True, name="nowhere").start()
    return LOOPBACK, server.getsockname()[1]


def _serve(server: socket.socket) -> None:
    while True:
        query, client = server.recvfrom(_ROOM)
        # the name ends at the first empty label, as a question is never compressed; its type and class follow
        end = query.find(b"\0", 12) + 5
        server.sendto(query[:2] + _FLAGS_AND_COUNTS + query[12:end], client)
