"""`mxgate plugin new`: a package with a policy, its settings, tests and documentation that pass as they are."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from gateway import __version__
from gateway.errors import GatewayError
from gateway.plugins import installed

_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
# What is written where; the names stand for themselves.
_FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "policy.py.in": "src/{module}/__init__.py",
    "py.typed.in": "src/{module}/py.typed",
    "test_policy.py.in": "tests/test_{name}.py",
}


class NewError(GatewayError):
    """The package cannot be made; the text says why."""


def new_package(name: str, parent: Path) -> list[Path]:
    """Make the package `mxgate-NAME` in a directory; the files that were written. Raises NewError."""
    if not _NAME.fullmatch(name):
        raise NewError(
            f"{name!a} is no name for a policy: a-z, 0-9 and _, a letter first, at most 41 of them"
        )
    if (taken := installed().get(name)) is not None:
        raise NewError(f"{taken} already offers a policy {name}")
    directory = parent / f"mxgate-{name.replace('_', '-')}"
    words = {
        "name": name,
        "module": f"mxgate_{name}",
        "distribution": directory.name,
        "class": "".join(part.capitalize() for part in name.split("_")),
        "version": __version__,
        "below": f"{int(__version__.partition('.')[0]) + 1}",
    }
    written = []
    try:
        directory.mkdir(parents=True)
        for template, where in _FILES.items():
            path = directory / where.format(**words)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled(template, words), "utf-8")
            written.append(path)
    except FileExistsError as exc:
        raise NewError(f"{directory} is there already") from exc
    except OSError as exc:
        raise NewError(f"{directory}: {exc.strerror or exc}") from exc
    return written


def _filled(template: str, words: dict[str, str]) -> str:
    text = (files("gateway.authoring") / "template" / template).read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)
