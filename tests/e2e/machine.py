"""What the machine has to have: programs of Debian packages, root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def require(*, program: str | Path, root: bool = False) -> None:
    """Skip the test when the machine lacks something; in CI that is a failure."""
    if shutil.which(program) is None:
        reason = f"{program} is not installed: ./dev test installs it"
    elif root and os.geteuid() != 0:
        reason = f"{program} needs root"
    else:
        return
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
