"""Forks a worker: a child that inherits what it is given, has no trace of the parent's loop, and never comes back.

The loop stands still meanwhile. Nothing of the parent is closed or finalised in the child by Python: all of it stays
referenced until the child's _exit.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from gateway.channel import channel_sockets
from gateway.services import Log

EXIT_FAILURE = 1

# The supervisor's; a child has to say anew what they mean, and until then they wait.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def fork(
    body: Callable[[socket.socket], int],
    *,
    inherited: Sequence[socket.socket],
    mask: Iterable[signal.Signals],
    log: Log,
) -> tuple[int, socket.socket]:
    """Run `body` with its end of a new channel in a child; the child's pid and our end.

    `mask` are the signals that are blocked in the child. Raises OSError when there can be no more processes.
    """
    ours, theirs = channel_sockets()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _be_worker(body, theirs, inherited, mask, log)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return pid, ours


def _be_worker(
    body: Callable[[socket.socket], int],
    channel: socket.socket,
    inherited: Sequence[socket.socket],
    mask: Iterable[signal.Signals],
    log: Log,
) -> NoReturn:
    code = EXIT_FAILURE
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        # What a terminal sends to the whole group is the supervisor's to act on.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _close_all_but(channel, *inherited)
        gc.freeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = body(channel)
    except BaseException:  # noqa: BLE001  # the child must never return into the parent's frames
        log.error("worker.failed", error=traceback.format_exc())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _close_all_but(*sockets: socket.socket) -> None:
    kept = sorted({0, 1, 2, *(sock.fileno() for sock in sockets)})
    # Not by /dev/fd, which a chroot without /proc lacks; one call of the kernel for each gap (close_range(2)).
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for below, above in itertools.pairwise([*kept, max(limit, kept[-1] + 1)]):
        os.closerange(below + 1, above)
