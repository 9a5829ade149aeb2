"""Body: the content of one message in wire form, in memory up to a limit, then in an unlinked temporary file.

A Spool makes them and owns the worker's budget for content in memory. Nothing is ever joined or rewritten;
`blocks()` gives the content back as it came. A disk that is full or broken raises SpoolError, which the client
sees as 452 4.3.1.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from io import FileIO

from gateway.errors import GatewayError

BLOCK_BYTES = 64 * 1024


class SpoolError(GatewayError):
    """Content could not be kept: no space, or the spool directory does not take files."""


class Spool:
    """Makes bodies. One for a worker.

    `memory_bytes` is the most that one message keeps in memory, `total_bytes` the most that all do together;
    `release` is called when much memory was given up at once. `directory` "" is the system's temporary one.
    """

    def __init__(
        self,
        directory: str = "",
        *,
        memory_bytes: int = 2 * 1024 * 1024,
        total_bytes: int = 64 * 1024 * 1024,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self.directory = directory or tempfile.gettempdir()
        self.memory_bytes = memory_bytes
        self.total_bytes = total_bytes
        self.release = release
        self.used_bytes = 0
        self.spilled = 0  # bodies that went to a file

    def new(self, *, is_stuffed: bool) -> Body:
        """An empty body."""
        return Body(self, is_stuffed=is_stuffed)

    def open_file(self) -> FileIO:
        """A new file without a name. Raises SpoolError."""
        try:
            return tempfile.TemporaryFile(dir=self.directory, buffering=0)
        except OSError as exc:
            raise SpoolError(f"spool {self.directory}: {exc.strerror}") from exc


class Body:
    """A message's whole content, header included. `is_stuffed`: dot-stuffed as after DATA, else plain as after BDAT."""

    __slots__ = ("_blocks", "_file", "_held_bytes", "_spool", "is_stuffed", "size_bytes")

    def __init__(self, spool: Spool, *, is_stuffed: bool) -> None:
        self.is_stuffed = is_stuffed
        self.size_bytes = 0
        self._spool = spool
        self._blocks: list[bytes] = []
        self._held_bytes = 0  # in _blocks, counted in spool.used_bytes
        self._file: FileIO | None = None

    @property
    def is_spilled(self) -> bool:
        """Whether the content went to a file."""
        return self._file is not None

    def append(self, block: bytes) -> None:
        """Keep one more block. Raises SpoolError; the body is then to be closed."""
        if not block:
            return
        spool = self._spool
        self._blocks.append(block)
        size = len(block)
        self.size_bytes += size
        self._held_bytes += size
        spool.used_bytes += size
        if self._file is not None:
            # small blocks gather before they cost a write each
            if self._held_bytes >= BLOCK_BYTES:
                self._write_out()
        elif self._held_bytes > spool.memory_bytes or spool.used_bytes > spool.total_bytes:
            self._file = spool.open_file()
            spool.spilled += 1
            self._write_out()
            spool.release()

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """The content from octet `start` on, in blocks of at most 64 KiB. Raises SpoolError."""
        if self._file is not None:
            self._write_out()
            while True:
                try:
                    block = os.pread(self._file.fileno(), BLOCK_BYTES, start)
                except OSError as exc:
                    raise SpoolError(f"spool {self._spool.directory}: {exc.strerror}") from exc
                if not block:
                    return
                start += len(block)
                yield block
        for block in self._blocks:
            size = len(block)
            if start >= size:
                start -= size
                continue
            if start == 0 and size <= BLOCK_BYTES:
                yield block
            else:
                for at in range(start, size, BLOCK_BYTES):
                    yield block[at : at + BLOCK_BYTES]
                start = 0

    def close(self) -> None:
        """Give up the content: memory and file. May be called again."""
        self._spool.used_bytes -= self._held_bytes
        self._held_bytes = 0
        self._blocks = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_out(self) -> None:
        assert self._file is not None
        blocks, self._blocks = self._blocks, []
        self._spool.used_bytes -= self._held_bytes
        self._held_bytes = 0
        try:
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[self._file.write(view) :]
        except OSError as exc:
            raise SpoolError(f"spool {self._spool.directory}: {exc.strerror}") from exc
