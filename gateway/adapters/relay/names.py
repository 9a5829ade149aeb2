"""The addresses of a downstream: its name as the system resolves it (getaddrinfo), not as the verifiers' resolver does.

An answer counts for 30 s. Each connection starts at the next address in turn; one that failed comes last until the
next answer.
"""

from __future__ import annotations

import asyncio
import math
import socket
from ipaddress import ip_address

# DESIGN.md section 6
_CACHE_S = 30.0


class Addresses:
    """The addresses of one host. However many wait for an answer, the system is asked once.

    `known` are those of the last answer: a connection to any other is out of date.
    """

    def __init__(self, host: str, port: int) -> None:
        self.known: frozenset[str] = frozenset()
        self._host = host
        self._port = port
        self._good: list[str] = []
        self._failed: list[str] = []
        self._turn = 0
        self._valid_until = -math.inf
        self._question: asyncio.Task[None] | None = None
        self._is_literal = _is_address(host)
        if self._is_literal:
            self._take([host])

    async def in_turn(self) -> list[str]:
        """Every address in the order in which to try them. Raises OSError and UnicodeError."""
        if not self._is_literal and asyncio.get_running_loop().time() >= self._valid_until:
            if self._question is None:
                self._question = asyncio.create_task(self._resolve(), name="relay-resolve")
                self._question.add_done_callback(self._answered)
            await asyncio.shield(self._question)
        start = self._turn % max(1, len(self._good))
        self._turn += 1
        return [*self._good[start:], *self._good[:start], *self._failed]

    def failed(self, address: str) -> None:
        """This one is to be tried behind all others."""
        if address in self._good:
            self._good.remove(address)
            self._failed.append(address)

    def forget(self) -> None:
        """None of them is of use: the next connection has the name resolved anew."""
        self._valid_until = -math.inf

    def close(self) -> None:
        """Nobody waits for an answer any more."""
        if self._question is not None:
            self._question.cancel()

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        # in the system's order (RFC 6724), each once
        self._take(list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found)))
        self._valid_until = loop.time() + _CACHE_S

    def _take(self, addresses: list[str]) -> None:
        self._good = addresses
        self._failed = []
        self.known = frozenset(addresses)

    def _answered(self, question: asyncio.Task[None]) -> None:
        self._question = None
        if not question.cancelled():
            # Everybody who waited may be gone; then nobody else looks at it.
            question.exception()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
