"""Policies by name: which are installed, their classes, and the plan that a configuration makes of them.

A distribution offers a policy by an entry point of the group `gateway.policies`: `spf = "policies.spf:Spf"`.
`installed` reads metadata only; `load` imports. The built-in policies come the same way as everybody's.

Called by the workers (plan), check-config, and the commands that print the plan.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError

from gateway.config import Config, ConfigError, KeyPath, Mode, PolicySection, Problem
from gateway.config.errors import did_you_mean
from gateway.config.explain import explain
from gateway.config.model import RELAY_GUARD
from gateway.errors import GatewayError
from gateway.policy import OnError, Policy

GROUP = "gateway.policies"
# Planned without being asked for, where installed; in this order.
DEFAULT_PLAN = (RELAY_GUARD, "spf", "dkim", "arc", "dmarc", "greylist")
_IMPORTLIB = Path(importlib.__file__).parent


class PluginError(GatewayError):
    """An installed policy cannot be used; the message names its distribution."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class PolicySource:
    """Where a policy comes from."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class PlannedPolicy:
    """A policy as it shall run: its class and validated settings, and the engine's keys with defaults filled in."""

    name: str
    policy: type[Policy[Any]]
    settings: object
    mode: Mode
    timeout_s: float
    on_error: OnError


def installed() -> dict[str, PolicySource]:
    """The policies of all installed distributions, by name; imports none of them.

    Raises PluginError when two distributions offer one name.
    """
    sources: dict[str, PolicySource] = {}
    for entry_point in entry_points(group=GROUP):
        # Metadata without a distribution exists in tests of importlib only; it would have no one to name.
        distribution, version = (
            ("?", "?") if (dist := entry_point.dist) is None else (dist.name, dist.version)
        )
        source = PolicySource(entry_point.name, distribution, version, entry_point)
        if (other := sources.setdefault(source.name, source)) is not source:
            raise PluginError(
                source.name, f"{other} and {source} both offer a policy of this name; uninstall one"
            )
    return sources


def load(names: Iterable[str]) -> dict[str, type[Policy[Any]]]:
    """Import the classes of installed policies. Raises PluginError for the first that cannot be used."""
    sources = installed()
    return {name: _load(sources[name]) if name in sources else _missing(name, sources) for name in names}


def plan(config: Config) -> tuple[PlannedPolicy, ...]:
    """The policies that a configuration asks for: relay_guard, the default plan, then others in the file's order.

    Imports their modules. Raises ConfigError with every problem.
    """
    planned: list[PlannedPolicy] = []
    problems: list[Problem] = []
    try:
        sources = installed()
    except PluginError as exc:
        raise ConfigError([config.problem(("policy", exc.name), str(exc))]) from exc
    for name in _asked_for(config, sources):
        try:
            policy = _load(sources[name]) if name in sources else _missing(name, sources)
            planned.append(_planned(config, name, policy))
        except PluginError as exc:
            problems.append(config.problem(("policy", name), str(exc)))
        except ConfigError as exc:
            problems += exc.problems
    problems += _missing_requirements(config, planned)
    if problems:
        raise ConfigError(problems)
    return tuple(planned)


def _asked_for(config: Config, sources: Iterable[str]) -> list[str]:
    names = [RELAY_GUARD]
    for name in (*DEFAULT_PLAN, *config.policy):
        section = config.policy.get(name, PolicySection())
        # A policy of the default plan that nobody switched on by name may be missing.
        is_optional = name in DEFAULT_PLAN and "mode" not in section.model_fields_set
        if name not in names and section.mode is not Mode.OFF and (name in sources or not is_optional):
            names.append(name)
    return names


def _missing_requirements(config: Config, planned: list[PlannedPolicy]) -> Iterator[Problem]:
    names = {each.name for each in planned}
    for each in planned:
        for required in each.policy.requires:
            if required not in names:
                yield config.problem(
                    ("policy", each.name), f"needs policy {required}, which is off or not installed"
                )


def _missing(name: str, sources: Iterable[str]) -> type[Policy[Any]]:
    raise PluginError(name, f"policy {name} is not installed{did_you_mean(name, sources)}")


def _load(source: PolicySource) -> type[Policy[Any]]:
    try:
        policy = source.entry_point.load()
    except Exception as exc:
        raise PluginError(source.name, f"cannot load it from {source}: {_authors_line(exc)}") from exc
    if not isinstance(policy, type) or not issubclass(policy, Policy):
        raise PluginError(source.name, f"{source.entry_point.value} of {source} is not a subclass of Policy")
    if getattr(policy, "name", None) != source.name:
        raise PluginError(
            source.name, f"{source.entry_point.value} of {source} must have name = {source.name!r}"
        )
    if not is_dataclass(policy.Settings):
        raise PluginError(
            source.name, f"Settings of {source.entry_point.value} of {source} is not a dataclass"
        )
    return policy


def _authors_line(exc: Exception) -> str:
    """The last line of a traceback that is the author's, and the error: not ours, not the import system's."""
    if isinstance(exc, SyntaxError):
        return f"{exc.filename}:{exc.lineno}: {(exc.text or '').strip()}: {type(exc).__name__}: {exc.msg}"
    error = "".join(traceback.format_exception_only(exc)).strip()
    frames = traceback.extract_tb(exc.__traceback__)
    theirs = [
        frame for frame in frames if frame.filename != __file__ and not _is_import_system(frame.filename)
    ]
    if not theirs:
        return error
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}: {error}"


def _is_import_system(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or Path(filename).is_relative_to(_IMPORTLIB)


def _planned(config: Config, name: str, policy: type[Policy[Any]]) -> PlannedPolicy:
    section = config.policy.get(name, PolicySection())
    if name == RELAY_GUARD:
        relay = config.relay
        given: dict[str, object] = {
            "domains": relay.domains,
            "domains_file": relay.domains_file,
            "recipients_file": relay.recipients_file,
        }
        settings = _settings(config, ("relay",), policy, given)
    else:
        settings = _settings(config, ("policy", name, "settings"), policy, dict(section.settings))
    return PlannedPolicy(
        name=name,
        policy=policy,
        settings=settings,
        mode=section.mode,
        timeout_s=policy.timeout_s if section.timeout_s is None else section.timeout_s,
        on_error=policy.on_error if section.on_error is None else section.on_error,
    )


def _settings(config: Config, at: KeyPath, policy: type[Policy[Any]], given: dict[str, object]) -> object:
    try:
        adapter: TypeAdapter[object] = TypeAdapter(policy.Settings)
    except (PydanticUserError, PydanticUndefinedAnnotation) as exc:
        reason = str(exc).partition("\n")[0]
        raise PluginError(policy.name, f"a type in its Settings cannot be validated: {reason}") from exc
    try:
        return adapter.validate_python(given, extra="forbid")
    except ValidationError as exc:
        messages = explain(exc, policy.Settings, given)
    raise ConfigError(config.problem((*at, *path), message) for path, message in messages.items())
