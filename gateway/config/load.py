"""Reads the configuration: file, environment and command line in, a validated Config or all its problems out."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.config.check import contradictions
from gateway.config.errors import ConfigError, KeyPath, Origin, Problem, redact
from gateway.config.explain import explain
from gateway.config.model import Config
from gateway.config.sources import Sources

_TOML_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def load(path: Path | None, *, environ: Mapping[str, str], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file (None: no file), `MXGATE__...` variables and `--set` arguments.

    Raises ConfigError with every problem. Looks at no other file: see `check_files`.
    """
    sources = _read(path) if path else Sources("", "", {})
    sources.add_environment(environ)
    sources.add_overrides(overrides)
    sources.expand(environ)
    config, faults = _validate(sources)
    problems = [*sources.problems, *(sources.problem(path, message) for path, message in faults.items())]
    if config is None or problems:
        raise ConfigError(
            sorted(problems, key=lambda problem: (not problem.origin.line, problem.origin.line))
        )
    return config


def _read(path: Path) -> Sources:
    name = str(path)
    try:
        text = path.read_text("utf-8-sig")
    except OSError as exc:
        raise ConfigError([Problem("", f"cannot be read: {exc.strerror}", Origin(name))]) from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise ConfigError([Problem("", "is not UTF-8", Origin(name, line, 1))]) from exc
    is_json = path.suffix == ".json" or text.lstrip().startswith("{")
    try:
        return Sources(name, text, _parse_json(name, text) if is_json else _parse_toml(name, text))
    except RecursionError as exc:
        raise ConfigError([Problem("", "is nested too deeply", Origin(name))]) from exc


def _parse_toml(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        message = str(exc)
        position = _TOML_POSITION.search(message)
        lines = text.split("\n")
        line, column = (len(lines), len(lines[-1]) + 1)
        if position:
            message = message[: position.start()]
            line, column = (int(position[1]), int(position[2])) if position[1] else (line, column)
        raise ConfigError([_syntax_problem(name, lines, line, column, message)]) from exc


def _parse_json(name: str, text: str) -> dict[str, Any]:
    lines = text.split("\n")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ConfigError([_syntax_problem(name, lines, exc.lineno, exc.colno, exc.msg)]) from exc
    if not isinstance(document, dict):
        raise ConfigError([_syntax_problem(name, lines, 1, 1, "the document must be one object")])
    return document


def _syntax_problem(name: str, lines: Sequence[str], line: int, column: int, message: str) -> Problem:
    return Problem("", message[:1].lower() + message[1:], Origin(name, line, column, redact(lines[line - 1])))


def _validate(sources: Sources) -> tuple[Config | None, dict[KeyPath, str]]:
    """The configuration, if its tables are right each for itself, and what is wrong at which path."""
    try:
        config = Config.model_validate(sources.data, context=sources)
    except ValidationError as exc:
        faults = explain(exc, Config, sources.data)
    else:
        return config, contradictions(config)
    # What is left without the faulty values may contradict itself as well: say so in the same go.
    for path in faults:
        _remove(sources.data, path)
    with suppress(ValidationError):
        rest = contradictions(Config.model_validate(sources.data))
        faults |= {path: rest[path] for path in rest if not any(_is_within(path, fault) for fault in faults)}
    return None, faults


def _is_within(path: KeyPath, other: KeyPath) -> bool:
    """Whether one of two paths leads through the other."""
    return all(mine == theirs for mine, theirs in zip(path, other, strict=False))


def _remove(data: Any, path: KeyPath) -> None:
    """Take a value out; of a list the whole, so that no index moves."""
    last = next((at for at, part in enumerate(path) if isinstance(part, int)), len(path)) - 1
    for part in path[:last]:
        data = data.get(part, {})
    if path:
        data.pop(path[last], None)
