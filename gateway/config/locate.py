"""Where each key of a TOML or JSON text stands; the parsers of the standard library do not tell.

One pass over a text that its parser has accepted. It follows table headers, arrays of tables, dotted and quoted
keys, inline tables and arrays, and skips comments and strings of all four kinds. Of a text that is not valid it
reports what it can; it never raises and is linear in the text.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_right
from typing import NamedTuple

from gateway.config.errors import KeyPath

# Multi-line strings may end in up to two more quotes than the three that close them.
_STRING = re.compile(
    r"""
      "{3} (?: [^\\"] | \\. | "(?!"") )* "{3,5}
    | '{3} (?: [^'] | '(?!'') )* '{3,5}
    | " (?: [^"\\\n] | \\. )* "
    | ' [^'\n]* '
    """,
    re.DOTALL | re.VERBOSE,
)
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_EQUALS = re.compile(r"[ \t\r\n]*[=:]")
_SCALAR = re.compile(r"[^,\]}#\n]+")
# Deeper than any configuration; beyond it positions may be missing.
_MAX_DEPTH = 100
_REST_OF_LINE = re.compile(r"[^\n]*")


class Position(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


def locate(text: str) -> dict[KeyPath, Position]:
    """The position of every header, key and array element of a text.

    A dotted key or header stands for its whole path only, not for the tables that it implies.
    """
    return _Scanner(text).scan()


def parse_key(text: str) -> tuple[tuple[str, ...], int] | None:
    """The parts of the dotted key that a text begins with and where it ends, or None."""
    scanner = _Scanner(text)
    parts = scanner.key()
    return (parts, scanner.at) if parts else None


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.elements: dict[KeyPath, int] = {}  # how many [[headers]] an array of tables has so far

    def scan(self) -> dict[KeyPath, Position]:
        table: KeyPath = ()
        self.skip(_BLANK)
        if self.peek() == "{":  # JSON: the document is one table
            self.value(())
        while self.at < len(self.text):
            if self.peek() == "[":
                table = self.header()
            elif not self.pair(table):
                self.skip(_REST_OF_LINE)
            self.skip(_BLANK)
        starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        return {path: _position(starts, at) for path, at in self.found.items()}

    def header(self) -> KeyPath:
        """`[a.b]` or `[[a.b]]`: the path that the following keys are below."""
        start = self.at
        is_array = self.text.startswith("[[", start)
        self.at += 2 if is_array else 1
        self.skip(_BLANK)
        *parents, last = self.key() or ("",)
        path = (*self.resolve(parents), last)
        if is_array:
            self.found.setdefault(path, start)
            index = self.elements.get(path, 0)
            self.elements[path] = index + 1
            path = (*path, index)
        self.found.setdefault(path, start)
        self.skip(_REST_OF_LINE)
        return path

    def resolve(self, parts: list[str]) -> KeyPath:
        """A header's parents: an array of tables stands for its last element."""
        path: KeyPath = ()
        for part in parts:
            path = (*path, part)
            if path in self.elements:
                path = (*path, self.elements[path] - 1)
        return path

    def pair(self, table: KeyPath) -> bool:
        """`key = value`, or `"key": value`."""
        start = self.at
        parts = self.key()
        if not parts or not self.skip(_EQUALS):
            return False
        self.found.setdefault((*table, *parts), start)
        self.skip(_BLANK)
        self.value((*table, *parts))
        return True

    def value(self, path: KeyPath) -> None:
        opening = self.peek()
        if opening not in ("[", "{"):
            if not self.skip(_STRING):
                self.skip(_SCALAR)
            return
        if len(path) > _MAX_DEPTH:
            return
        self.at += 1
        index = 0
        while True:
            self.skip(_BLANK)
            before = self.at
            if opening == "{":
                self.pair(path)
            elif self.peek() not in ("]", ","):
                self.found.setdefault((*path, index), self.at)
                self.value((*path, index))
                index += 1
            self.skip(_BLANK)
            if self.peek() == ",":
                self.at += 1
            elif self.peek() in ("]", "}", ""):
                self.at += 1
                return
            elif self.at == before:
                return

    def key(self) -> tuple[str, ...]:
        parts = []
        while match := _KEY.match(self.text, self.at):
            parts.append(_unquote(match.group()))
            self.at = match.end()
            if not self.skip(_DOT):
                break
        return tuple(parts)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.at)
        if match is None:
            return False
        self.at = match.end()
        return True

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]


def _position(starts: list[int], at: int) -> Position:
    line = bisect_right(starts, at)
    return Position(line, at - starts[line - 1] + 1)


def _unquote(key: str) -> str:
    if key[0] == "'":
        return key[1:-1]
    if key[0] != '"':
        return key
    # The two languages share all escapes that a key is likely to have; each is asked for its own.
    try:
        return str(tomllib.loads(f"k = {key}")["k"])
    except tomllib.TOMLDecodeError:
        pass
    try:
        return str(json.loads(key))
    except json.JSONDecodeError:
        return key[1:-1]
