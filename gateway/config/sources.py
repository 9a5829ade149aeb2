"""The layers that a configuration is made of: the file, over it the environment, over it the command line.

Remembers for each value which layer it came from and how it was written before `${NAME}` was filled in.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from gateway.config.errors import DEFAULT, KeyPath, Origin, Problem, dotted, redact
from gateway.config.locate import Position, locate, parse_key

PREFIX = "MXGATE__"
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Sources:
    """A tree of plain values (`data`) with the origin of each. Problems on the way are collected, not raised."""

    def __init__(self, name: str, text: str, data: dict[str, Any]) -> None:
        self.data = data
        self.problems: list[Problem] = []
        self._name = name
        self._text = text
        self._upper: dict[KeyPath, Origin] = {}  # leaves that the environment or the command line gave
        self._written: dict[KeyPath, str] = {}

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """`MXGATE__SECTION__KEY=value`; a table is merged, everything else replaces."""
        for name in sorted(environ):
            if name.startswith(PREFIX):
                path = tuple(part.lower() for part in name.removeprefix(PREFIX).split("__"))
                origin = Origin(f"environment {name}")
                if all(path):
                    self._overlay(path, parse_value(environ[name]), origin)
                else:
                    self.problems.append(Problem("", "names no key", origin))

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """`section.key=value` of the command line, the last one counts."""
        for override in overrides:
            key = parse_key(override)
            if key is None or override[key[1] : key[1] + 1] != "=":
                origin = Origin(f"--set {redact(override)}")
                self.problems.append(Problem("", "write it as section.key=value", origin))
            else:
                path, end = key
                self._overlay(path, parse_value(override[end + 1 :]), Origin(f"--set {override[:end]}"))

    def expand(self, environ: Mapping[str, str]) -> None:
        """Fill in `${NAME}` in every string value; `$${` stands for `${`."""
        for path, text in list(_strings(self.data, ())):
            if "${" in text:
                self._written[path] = text
                _assign(self.data, path, self._filled_in(path, text, environ))

    def origin(self, path: KeyPath) -> Origin:
        """Where the value at a path came from."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._upper:
                return self._upper[path[:end]]
        position = self._positions.get(path)
        if position is None:
            return DEFAULT
        return Origin(
            self._name, position.line, position.column, redact(self._text.split("\n")[position.line - 1])
        )

    def place(self, path: KeyPath) -> Origin:
        """Where a problem with a path is best shown: there, below it, at a table around it, or the file."""
        below = [each for each in (*self._upper, *self._positions) if each[: len(path)] == path]
        around = [path[:end] for end in range(len(path) - 1, 0, -1)]
        for each in (path, *below[:1], *around):
            if (origin := self.origin(each)) != DEFAULT:
                return origin
        return Origin(self._name) if self._name else DEFAULT

    def written(self, path: KeyPath) -> str | None:
        """The text of a value that held `${NAME}`, as it was written; None for all others."""
        return self._written.get(path)

    def problem(self, path: KeyPath, message: str) -> Problem:
        return Problem(dotted(path), message, self.place(path))

    @cached_property
    def _positions(self) -> dict[KeyPath, Position]:
        return locate(self._text)

    def _overlay(self, path: KeyPath, value: object, origin: Origin) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                self._overlay((*path, key), below, origin)
            return
        table: Any = self.data
        for end, part in enumerate(path[:-1], 1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                self.problems.append(Problem(dotted(path), f"{dotted(path[:end])} is not a table", origin))
                return
        table[path[-1]] = value
        self._upper[path] = origin

    def _filled_in(self, path: KeyPath, text: str, environ: Mapping[str, str]) -> str:
        def fill(match: re.Match[str]) -> str:
            name = match.group(1)
            if name is None:
                return "${"
            if not _NAME.fullmatch(name) or not match.group(2):
                self.problems.append(
                    self.problem(path, "${ needs a variable's name and }; write $${ for a plain ${")
                )
            elif name not in environ:
                self.problems.append(self.problem(path, f"environment variable {name} is not set"))
            return environ.get(name, "")

        return _REFERENCE.sub(fill, text)


def parse_value(text: str) -> object:
    """A TOML value, or the text itself where it is none."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _strings(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _strings(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _strings(below, (*path, index))


def _assign(data: Any, path: KeyPath, value: str) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value
