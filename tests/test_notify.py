"""notify: what a service manager is told."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.notify import Notify


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """Its socket, in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        sock.setblocking(False)
        yield sock


def variables(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": "@" + manager.getsockname()[1:].decode(), **more}


def test_says_what_systemd_expects(manager: socket.socket) -> None:
    environ = variables(manager, PATH="/bin")
    notify = Notify(environ)
    assert environ == {"PATH": "/bin"}
    notify.ready("serving")
    notify.reloading()
    notify.stopping()
    notify.alive()  # nobody watches
    assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+\nSTATUS=reloading", manager.recv(1000))
    assert manager.recv(1000).startswith(b"STOPPING=1\n")
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


@pytest.mark.parametrize(("pid", "is_watched"), [(0, True), (1, False)])
def test_the_watchdog_is_fed_when_it_is_ours(manager: socket.socket, pid: int, is_watched: bool) -> None:
    Notify(variables(manager, WATCHDOG_USEC="1000000", WATCHDOG_PID=str(pid or os.getpid()))).alive()
    if is_watched:
        assert manager.recv(1000) == b"WATCHDOG=1"
    else:
        with pytest.raises(BlockingIOError):
            manager.recv(1000)


def test_a_socket_of_the_file_system_will_do(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        Notify({"NOTIFY_SOCKET": str(tmp_path / "notify")}).stopping()
        assert sock.recv(1000)


def test_nobody_there_is_no_matter(tmp_path: Path) -> None:
    Notify({}).ready("serving")
    Notify({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("serving")
