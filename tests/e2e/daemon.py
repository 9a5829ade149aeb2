"""A server of another project, in a private directory, from its construction to `close`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import free_port, wait_until

_START_S = 100
_END_S = 20


class Daemon(ABC):
    """A program of Debian's with one port; whoever derives from it writes its configuration, and then calls `start`."""

    def __init__(self, program: str) -> None:
        require(program=program)
        self._program = program
        self.directory = Path(tempfile.mkdtemp(prefix=f"mxgate-{program}-"))
        self.port = free_port()

    def start(self, arguments: Sequence[str]) -> None:
        """Start it, and wait until it answers."""
        with (self.directory / "out").open("wb") as out:
            self._process = subprocess.Popen(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            wait_until(self._is_there, within_s=_START_S, what=f"{self._program} answers")
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def answers(self) -> bool:
        """Whether it answers now. Raises OSError when it does not yet."""

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _is_there(self) -> bool:
        assert self._process.poll() is None, (self.directory / "out").read_text("utf-8", "replace")
        try:
            return self.answers()
        except OSError:
            return False
