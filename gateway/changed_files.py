"""Says when files have changed, for `server.reload_on_change`: Kubernetes' ConfigMaps, and editors of people.

A change counts when it has stayed for one more look, so that a file which is still being written is left alone, and
so that files which are changed together make one reload. Files are followed through symbolic links, which is how
kubelet puts a new ConfigMap in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

_Stamp = tuple[int, int, int]
# Of a file that is not there.
_GONE: _Stamp = (0, 0, 0)


class ChangedFiles:
    """The files of the configuration in force, to be looked at again and again; none until `watch`."""

    def __init__(self) -> None:
        self._known: Mapping[Path, _Stamp] = {}
        self._seen: Mapping[Path, _Stamp] = {}

    def watch(self, paths: Iterable[Path]) -> None:
        """Look at these files from now on; one that was looked at before may have changed meanwhile."""
        self._known = {path: self._known.get(path) or _stamp(path) for path in paths}
        self._seen = self._known

    def note(self) -> None:
        """They are read now: what changes is what changes from here on."""
        self._known = self._seen = {path: _stamp(path) for path in self._known}

    def have_changed(self) -> bool:
        """Whether they are not what they were when they were read, and were the same at the last two looks."""
        before, self._seen = self._seen, {path: _stamp(path) for path in self._known}
        return self._known != self._seen == before


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError:
        return _GONE
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
