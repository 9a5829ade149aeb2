"""A server of the demo as a process of its own, forked before the supervisor has a thread or a loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn, Protocol

# For a server to end by itself: nothing is under way any more when it is asked to.
_END_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Closable(Protocol):
    """What serves on a socket until it is closed."""

    def close(self) -> None: ...


Start = Callable[[socket.socket], Awaitable[Closable]]


@contextlib.contextmanager
def served(sock: socket.socket, start: Start, *, tells_of_hangup: bool) -> Iterator[int]:
    """A process in which `start` serves on the socket; its pid. It is gone at the end.

    It ignores Ctrl-C, so that the gateway can drain, and ends when its parent does, however that ends: it watches a
    pipe that only the parent holds open, and processes that were forked later. A closed terminal is SIGHUP, which
    the gateway takes for something else, so one of the processes has to ask the parent to end.
    """
    watched, held = os.pipe()
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(held)
        _be(sock, start, watched, parent if tells_of_hangup else None)
    # When it is gone, connections have to be refused, not to wait here for nobody.
    sock.close()
    os.close(watched)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pid
    finally:
        os.close(held)
        _await_end(pid)


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + _END_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _be(sock: socket.socket, start: Start, watched: int, parent: int | None) -> NoReturn:
    """The child, which must never return into the parent's frames."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # What asked the parent to end while it forked asked this process too: it is noticed by the pipe.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        asyncio.run(_serve(sock, start, watched, parent))
        code = 0
    except BaseException:  # noqa: BLE001  # as above; it is said, and the exit code says so too
        traceback.print_exc()
    finally:
        os._exit(code)


async def _serve(sock: socket.socket, start: Start, watched: int, parent: int | None) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(watched, ended.set)  # nothing is ever written: it is readable when the parent is gone
    if parent is not None:
        loop.add_signal_handler(signal.SIGHUP, os.kill, parent, signal.SIGTERM)
    server = await start(sock)
    await ended.wait()
    loop.remove_reader(watched)
    server.close()
