"""ListFile: a list that an operator keeps in a file, one entry a line, read again when the file changes.

`#` begins a comment. Nothing watches the file: whoever asks for the entries asks for a `refresh` first, which looks at
the file every 5 s at most. A file that has become unreadable or wrong keeps what was read last, and that is logged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from gateway.errors import GatewayError
from gateway.smtp.address import AddressError

if TYPE_CHECKING:
    from gateway.services import Services

E = TypeVar("E")

_LOOK_AT_MOST_EVERY_S = 5.0


class ListError(GatewayError, ValueError):
    """A list has a line that is no entry; the text names file and line."""


class ListFile(Generic[E]):
    """The `entries` of a file, none without a path.

    `parse` makes one of a line, or raises ValueError or AddressError.
    """

    def __init__(self, path: Path | None, parse: Callable[[str], E], services: Services) -> None:
        self.path = path
        self.entries: frozenset[E] = frozenset()
        self._parse = parse
        self._services = services
        self._stamp: tuple[int, int, int] = (0, 0, 0)
        self._look_at = 0.0

    def load(self) -> None:
        """Read the file; for `Policy.start`. Raises OSError and ListError."""
        if self.path is None:
            return
        stat = self.path.stat()
        try:
            text = self.path.read_text("utf-8")
        except UnicodeDecodeError as exc:
            raise ListError(f"{self.path}: {exc}") from exc
        entries = set()
        for number, line in enumerate(text.splitlines(), 1):
            if entry := line.partition("#")[0].strip():
                try:
                    entries.add(self._parse(entry))
                except (AddressError, ValueError) as exc:
                    raise ListError(f"{self.path}:{number}: {exc}") from exc
        self.entries = frozenset(entries)
        self._stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)

    def refresh(self) -> bool:
        """Read the file again if it changed; True when it was read. A bad file changes nothing."""
        if self.path is None or (now := self._services.clock.monotonic()) < self._look_at:
            return False
        self._look_at = now + _LOOK_AT_MOST_EVERY_S
        try:
            stat = self.path.stat()
            if (stat.st_mtime_ns, stat.st_ino, stat.st_size) == self._stamp:
                return False
            self.load()
        except (OSError, ListError) as exc:
            self._services.log.error("list.reload_failed", error=str(exc))
            return False
        return True
