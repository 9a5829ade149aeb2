"""What tests of packages share: Python modules run in processes of their own, as an author runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def environment(path: Sequence[Path] = ()) -> dict[str, str]:
    """That of a user: our programs are found, no setting of this machine's is, and more is on sys.path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MXGATE", "PYTEST"))}
    # comes with a dependency of the chart's tests, which no author has
    clean["PYTEST_ADDOPTS"] = "-p no:cloudcoil"
    clean["PYTHONPATH"] = os.pathsep.join(map(str, path))
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return clean


def run(*arguments: str | Path, at: Path, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """A module in a process of its own, with more on sys.path as an installation would have it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=at, env=environment(path), capture_output=True, text=True, timeout=110, check=False
    )
