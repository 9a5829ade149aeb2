"""`mxgate plugin test`: the contract suite on the policies of a file, a source tree or a wheel; no installation."""

from __future__ import annotations

import os
import sys
import tomllib
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

from gateway.errors import GatewayError
from gateway.plugins import GROUP, PolicySource, load_from, policies_in, settings_of
from gateway.policy import Policy
from gateway.testing import PolicyContract

_PREFIX = "test_"


class TrialError(GatewayError):
    """There is no policy to try; the text says why."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One test of the suite on one policy; `failure` "" when it passed."""

    policy: str
    test: str
    failure: str

    @property
    def line(self) -> str:
        """For people."""
        word = "FAIL" if self.failure else "ok"
        return f"{word:4}  {self.policy}  {self.test.replace('_', ' ')}" + (
            f"\n      {self.failure}" if self.failure else ""
        )


def read_settings(file: Path) -> Mapping[str, object]:
    """The table of a TOML file. Raises TrialError."""
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise TrialError(f"{file}: {exc}") from exc


def try_policies(path: Path, given: Mapping[str, object]) -> Iterator[Tried]:
    """Run the suite on all policies of `path` with these settings. Raises TrialError and PluginError."""
    found = policies_at(path)
    if not found:
        raise TrialError(f"{path} offers no policy")
    for policy in found:
        settings = settings_of(policy, given)
        suite = type(
            f"Contract{policy.__name__}", (PolicyContract,), {"policy": policy, "settings": settings}
        )()
        for name in vars(PolicyContract):
            if name.startswith(_PREFIX):
                yield Tried(policy.name, name.removeprefix(_PREFIX), _failure(getattr(suite, name)))


def policies_at(path: Path) -> Sequence[type[Policy[Any]]]:
    """The policies of a file, of the source tree in a directory (its pyproject.toml names them), or of a wheel."""
    if path.is_dir():
        return [load_from(each) for each in _of_tree(path)]
    if zipfile.is_zipfile(path):
        sys.path.insert(0, os.fspath(path.resolve()))
        return [load_from(each) for each in _of_wheel(path)]
    named = [each for each in policies_in(path, path.stem) if isinstance(getattr(each, "name", None), str)]
    return [each for each in named if not each.__name__.startswith("_")]


def _of_tree(path: Path) -> Iterator[PolicySource]:
    project = read_settings(path / "pyproject.toml").get("project")
    if not isinstance(project, Mapping):
        raise TrialError(f"{path / 'pyproject.toml'} has no table project")
    groups = project.get("entry-points")
    points = groups.get(GROUP) if isinstance(groups, Mapping) else None
    # where packages lie in the layouts that are in use
    for directory in (path, path / "src"):
        sys.path.insert(0, os.fspath(directory.resolve()))
    for name, value in (points if isinstance(points, Mapping) else {}).items():
        point = EntryPoint(str(name), str(value), GROUP)
        yield PolicySource(point.name, str(project.get("name")), str(project.get("version")), point)


def _of_wheel(path: Path) -> Iterator[PolicySource]:
    for distribution in distributions(path=[os.fspath(path.resolve())]):
        for point in distribution.entry_points:
            if point.group == GROUP:
                yield PolicySource(point.name, distribution.name, distribution.version, point)


def _failure(test: Any) -> str:
    """Why a test failed, with the author's own line where an exception of the policy is the reason."""
    try:
        test()
    except Exception as exc:  # noqa: BLE001  # whatever a stranger's code raises is what the author wants to see
        cause = exc.__cause__
        if cause is None or not (frames := traceback.extract_tb(cause.__traceback__)):
            return str(exc) or repr(exc)
        return f"{exc}\n      {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    return ""
