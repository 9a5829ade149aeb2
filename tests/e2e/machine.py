"""What the machine has to have: programs of Debian packages, root, IPv6."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import NoReturn

import pytest


def require(*, program: str | Path, root: bool = False) -> None:
    """Skip the test when the machine lacks something; in CI that is a failure."""
    if shutil.which(program) is None:
        _lacking(f"{program} is not installed: ./dev test installs it")
    if root and os.geteuid() != 0:
        _lacking(f"{program} needs root")


def require_ipv6() -> None:
    """The same for the loopback address ::1."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as exc:
        _lacking(f"no IPv6 here: {exc}")


def _lacking(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
