"""A wire between a client and a server that can be listened to: tells when an octet passes, in either direction."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.e2e.net import LOOPBACK, Address


class Tap:
    """Passes connections on to `target` while it lives.

    `watch(count, act)` calls `act` once, in the thread of the wire, just before the octet of this number passes (of
    all connections and both directions together, counted from the call on), or never. What is cut there: the octets
    before it have been sent.
    """

    def __init__(self, target: Address) -> None:
        self._target = target
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address: Address = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._left = -1
        self._act: Callable[[], None] = lambda: None
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._spawn(self._accept)

    def watch(self, count: int, act: Callable[[], None]) -> None:
        """See the class."""
        with self._lock:
            self._left, self._act = count, act

    def close(self) -> None:
        """End all connections."""
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def _spawn(self, target: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="tap")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._spawn(self._pass, near, far)
                self._spawn(self._pass, far, near)

    def _pass(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while octets := source.recv(65536):
                with self._lock:
                    head, is_due = len(octets), False
                    if self._left >= 0:
                        is_due = self._left < len(octets)
                        head = min(self._left, len(octets))
                        self._left = -1 if is_due else self._left - len(octets)
                    act = self._act
                if is_due:
                    to.sendall(octets[:head])
                    act()
                    octets = octets[head:]
                to.sendall(octets)
        with suppress(OSError):
            to.shutdown(socket.SHUT_WR)
