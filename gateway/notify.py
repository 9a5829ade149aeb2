"""Tells a service manager how the gateway is: sd_notify(3), a datagram to the socket that $NOTIFY_SOCKET names.

With `Type=notify-reload` systemd sends SIGHUP for a reload and waits for its end; with `WatchdogSec=` it restarts a
gateway whose supervisor has fallen silent. Without a service manager nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress


class Notify:
    """The service manager, or nobody."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes its variables out of the environment, so that no other process speaks for us."""
        name = environ.pop("NOTIFY_SOCKET", "")
        # unix(7): a name in the abstract namespace
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        is_watched = bool(environ.pop("WATCHDOG_USEC", "")) and environ.pop("WATCHDOG_PID", "") in {
            "",
            str(os.getpid()),
        }
        self._is_watched = is_watched

    def ready(self, status: str) -> None:
        """It serves; a reload is over."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        # sd_notify(3): together in one message, microseconds of CLOCK_MONOTONIC
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading")

    def stopping(self) -> None:
        """It drains."""
        self._send("STOPPING=1\nSTATUS=draining")

    def alive(self) -> None:
        """The loop turns; to be told each second."""
        if self._is_watched:
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
