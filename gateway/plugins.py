"""Policies by name: which are installed, their classes, and the plan that a configuration makes of them.

A distribution offers a policy by an entry point of the group `gateway.policies`: `spf = "policies.spf:Spf"`.
`installed` reads metadata only; `load` imports. The built-in policies come the same way as everybody's. A single file
with a policy in it (`[policy.X] file`) is loaded as a module that nobody else can import.

Called by the workers (plan), check-config, and the commands that print the plan.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from inspect import iscoroutinefunction, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError

from gateway.config import Config, ConfigError, KeyPath, Network, PolicySection, Problem, dotted
from gateway.config.errors import did_you_mean
from gateway.config.explain import explain
from gateway.config.model import RELAY_GUARD
from gateway.errors import GatewayError
from gateway.plan import Override, PlanError, Step, rank_of
from gateway.policy import Mode, OnError, Policy
from gateway.services import Services
from gateway.session import Role, Trust
from gateway.verdict import Stage, is_own_field

GROUP = "gateway.policies"
# Planned without being asked for, where installed; in this order.
DEFAULT_PLAN = (RELAY_GUARD, "spf", "dkim", "arc", "dmarc", "greylist")
# The same for submission: who has authenticated is checked by nothing but whose name it writes.
SUBMISSION_PLAN = (RELAY_GUARD, "sender_login")
# As for the operator's key of this name (config.model.PolicySection).
MAX_TIMEOUT_S = 60
_COROUTINES = (*(f"on_{stage}" for stage in Stage), "on_outcome", "start", "stop")
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
class PlannedOverride:
    """What is different for recipients of a domain; `settings` None where they are those of all."""

    pattern: str
    mode: Mode
    settings: object | None = None


@dataclass(frozen=True, slots=True)
class PlannedPolicy:
    """A policy as it shall run: its class and validated settings, and the engine's keys with defaults filled in.

    `source` says where it comes from: a distribution with its version, or a file.
    """

    name: str
    policy: type[Policy[Any]]
    settings: object
    mode: Mode
    timeout_s: float
    on_error: OnError
    exempt: tuple[Network | Trust, ...] = ()
    overrides: tuple[PlannedOverride, ...] = ()
    source: str = ""

    @property
    def stages(self) -> frozenset[Stage]:
        """Where it has something to say."""
        return self.policy.stages(self.settings)

    def step(self, services: Services) -> Step:
        """The policy and those of its overrides, made; raises what their constructors raise."""
        return Step(
            self.policy(self.settings, services),
            self.timeout_s,
            self.on_error,
            self.mode,
            self.exempt,
            tuple(
                Override(
                    each.pattern,
                    each.mode,
                    None if each.settings is None else self.policy(each.settings, services),
                )
                for each in self.overrides
            ),
        )


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


def configurable() -> tuple[dict[str, type[Policy[Any]]], list[PluginError]]:
    """The installed policies that have settings of their own, by name, and why others of them cannot be used.

    Imports all of them: for the reference of all keys and the schema.
    """
    classes: dict[str, type[Policy[Any]]] = {}
    errors: list[PluginError] = []
    try:
        sources = installed()
    except PluginError as exc:
        return {}, [exc]
    for name, source in sorted(sources.items()):
        if name == RELAY_GUARD:
            continue  # it is configured in [relay]
        try:
            classes[name] = _load(source)
        except PluginError as exc:
            errors.append(exc)
    return classes, errors


def load(names: Iterable[str]) -> dict[str, type[Policy[Any]]]:
    """Import the classes of installed policies. Raises PluginError for the first that cannot be used."""
    sources = installed()
    return {name: _load(sources[name] if name in sources else _missing(name, sources)) for name in names}


def plan(config: Config) -> tuple[PlannedPolicy, ...]:
    """The policies that a configuration asks for: the guard, its role's default plan, then others in the file's order.

    Imports their modules. Raises ConfigError with every problem.
    """
    planned: list[PlannedPolicy] = []
    problems: list[Problem] = []
    try:
        sources = installed()
    except PluginError as exc:
        raise ConfigError([config.problem(("policy", exc.name), str(exc))]) from exc
    for name in _asked_for(config, sources):
        section = config.policy.get(name, PolicySection())
        try:
            if section.file is not None:
                policy, source = _load_file(name, section.file, sources), str(section.file)
            elif name in sources:
                policy, source = _load(sources[name]), str(sources[name])
            else:
                _missing(name, sources)
            planned.append(_planned(config, name, policy, source))
        except PluginError as exc:
            problems.append(config.problem(("policy", name), str(exc)))
        except ConfigError as exc:
            problems += exc.problems
    problems += _missing_requirements(config, planned)
    if not problems:
        try:
            rank_of(planned)
        except PlanError as exc:
            problems.append(config.problem(("policy",), str(exc)))
    if problems:
        raise ConfigError(problems)
    return tuple(planned)


def _asked_for(config: Config, sources: Iterable[str]) -> list[str]:
    names = [RELAY_GUARD]
    default = DEFAULT_PLAN if config.role is Role.MX else SUBMISSION_PLAN
    for name in (*default, *config.policy):
        section = config.policy.get(name, PolicySection())
        # A policy of the default plan that nobody switched on by name may be missing.
        is_optional = name in default and "mode" not in section.model_fields_set
        is_there = name in sources or section.file is not None
        if name not in names and section.is_planned and (is_there or not is_optional):
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


def _missing(name: str, sources: Iterable[str]) -> NoReturn:
    raise PluginError(name, f"policy {name} is not installed{did_you_mean(name, sources)}")


def _load(source: PolicySource) -> type[Policy[Any]]:
    try:
        policy = source.entry_point.load()
    except (Exception, SystemExit) as exc:
        raise PluginError(source.name, f"cannot load it from {source}: {_authors_line(exc)}") from exc
    return _checked(source.name, policy, f"{source.entry_point.value} of {source}")


def _load_file(name: str, file: Path, sources: Mapping[str, PolicySource]) -> type[Policy[Any]]:
    """The one policy of this name in a file."""
    if name in sources:
        raise PluginError(
            name, f"{file} and {sources[name]} both offer a policy of this name; give yours another one"
        )
    classes = policies_in(file, name)
    named = [each for each in classes if getattr(each, "name", None) == name]
    if len(named) != 1:
        found = ", ".join(sorted(each.__name__ for each in named or classes)) or "none at all"
        raise PluginError(
            name, f"{file} must hold one subclass of Policy with name = {name!r}; it holds {found}"
        )
    return _checked(name, named[0], f"{named[0].__name__} of {file}")


def policies_in(file: Path, name: str) -> list[type[Policy[Any]]]:
    """The subclasses of Policy that a file defines. Raises PluginError, about `name`, for one that cannot be loaded.

    Nothing is written beside the file, and its modules are loaded anew each time.
    """
    # dataclasses and annotations look their module up by its name
    module = ModuleType(f"mxgate_policy_file_{name}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))  # noqa: S102  # the operator's own code
    except (Exception, SystemExit) as exc:
        del sys.modules[module.__name__]
        raise PluginError(name, f"cannot load it from {file}: {_authors_line(exc)}") from exc
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    return [*dict.fromkeys(classes)]


def load_from(source: PolicySource) -> type[Policy[Any]]:
    """Import the class of one policy. Raises PluginError."""
    return _load(source)


def settings_of(policy: type[Policy[Any]], given: Mapping[str, object]) -> object:
    """An object of the policy's Settings. Raises PluginError with everything that is wrong, one line for each."""
    settings, messages = _validated(policy, given)
    if messages:
        wrong = "\n".join(f"{dotted(path)}: {message}" for path, message in messages.items())
        raise PluginError(policy.name, f"settings of {policy.name}: {wrong}")
    return settings


def _checked(name: str, policy: object, what: str) -> type[Policy[Any]]:
    """What was loaded, if it is a policy of this name."""
    if not isinstance(policy, type) or not issubclass(policy, Policy):
        raise PluginError(name, f"{what} is not a subclass of Policy")
    if getattr(policy, "name", None) != name:
        raise PluginError(name, f"{what} must have name = {name!r}")
    if not is_dataclass(policy.Settings):
        raise PluginError(name, f"Settings of {what} is not a dataclass")
    exempt: object = policy.exempt
    allowed = () if name == RELAY_GUARD else (Trust.TRUSTED, Trust.AUTHENTICATED)
    if not isinstance(exempt, tuple) or not all(each in allowed for each in exempt):
        words = " and ".join(map(str, allowed)) or "nobody"
        raise PluginError(name, f"exempt of {what} may be a tuple of {words} only")
    for wrong in _undeclarable(policy):
        raise PluginError(name, f"{what}: {wrong}")
    return policy


def _undeclarable(policy: type[Policy[Any]]) -> Iterator[str]:
    """What a declaration holds that the engine cannot take; mypy would have told the author."""
    declared: dict[str, object] = {
        key: getattr(policy, key)
        for key in ("requires", "after", "own_fields", "method", "on_error", "timeout_s")
    }
    for key in ("requires", "after"):
        names = declared[key]
        if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
            yield f"{key} must be a tuple of policies' names, not {names!r}"
    fields = declared["own_fields"]
    if not isinstance(fields, tuple) or not all(map(is_own_field, fields)):
        yield f'own_fields must be a tuple of names "X-Mxgate-...", not {fields!r}'
    method, on_error, timeout_s = declared["method"], declared["on_error"], declared["timeout_s"]
    if method is not None and not isinstance(method, str):
        yield f"method must be a word or None, not {method!r}"
    if not isinstance(on_error, OnError):
        yield f"on_error must be OnError.CONTINUE or OnError.DEFER, not {on_error!r}"
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s <= MAX_TIMEOUT_S:  # type: ignore[operator]  # a number it is
        yield f"timeout_s must be a number of seconds, more than 0 and at most {MAX_TIMEOUT_S}, not {timeout_s!r}"
    for hook in _COROUTINES:
        function = getattr(policy, hook)
        # what wraps a coroutine function may be no coroutine function itself
        is_plain = isfunction(function) and not hasattr(function, "__wrapped__")
        if is_plain and not iscoroutinefunction(function):
            yield f"{hook} must be a coroutine function: async def {hook}(...)"
    if iscoroutinefunction(policy.on_header):
        yield "on_header must be a plain function: def on_header(...)"


def _authors_line(exc: BaseException) -> str:
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


def _planned(config: Config, name: str, policy: type[Policy[Any]], source: str) -> PlannedPolicy:
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
        settings = _settings(config, ("policy", name, "settings"), policy, section.settings)
    _check_stages(name, policy, settings)
    is_dry_run = config.pipeline.observe and name != RELAY_GUARD

    def effective(mode: Mode) -> Mode:
        return Mode.OBSERVE if is_dry_run and mode is Mode.ENFORCE else mode

    return PlannedPolicy(
        name=name,
        policy=policy,
        settings=settings,
        mode=effective(section.mode),
        timeout_s=policy.timeout_s if section.timeout_s is None else section.timeout_s,
        on_error=policy.on_error if section.on_error is None else section.on_error,
        exempt=policy.exempt if section.exempt is None else section.exempt,
        overrides=tuple(
            PlannedOverride(
                pattern,
                effective(override.mode or section.mode),
                _overridden(config, name, policy, pattern) if override.settings else None,
            )
            for pattern, override in section.domains.items()
        ),
        source=source,
    )


def _check_stages(name: str, policy: type[Policy[Any]], settings: object) -> None:
    try:
        stages: object = policy.stages(settings)
    except Exception as exc:
        raise PluginError(name, f"its stages() failed: {_authors_line(exc)}") from exc
    if not isinstance(stages, AbstractSet) or not all(isinstance(each, Stage) for each in stages):
        raise PluginError(name, f"its stages() must return a set of stages, not {stages!r}")


def _overridden(config: Config, name: str, policy: type[Policy[Any]], pattern: str) -> object:
    """The settings for a domain: what it has of its own, and the policy's for the rest."""
    section = config.policy[name]
    given = _merged(section.settings, section.domains[pattern].settings)
    return _settings(config, ("policy", name, "domains", pattern, "settings"), policy, given)


def _merged(base: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """Tables in tables are merged too."""
    merged = dict(base)
    for key, value in more.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def _settings(config: Config, at: KeyPath, policy: type[Policy[Any]], given: Mapping[str, object]) -> object:
    settings, messages = _validated(policy, given)
    if messages:
        raise ConfigError(config.problem((*at, *path), message) for path, message in messages.items())
    return settings


def _validated(policy: type[Policy[Any]], given: Mapping[str, object]) -> tuple[object, dict[KeyPath, str]]:
    """An object of the policy's Settings, or what is wrong by key. Raises PluginError for Settings that none can be."""
    try:
        adapter: TypeAdapter[object] = TypeAdapter(policy.Settings)
    except (PydanticUserError, PydanticUndefinedAnnotation) as exc:
        reason = str(exc).partition("\n")[0]
        raise PluginError(policy.name, f"a type in its Settings cannot be validated: {reason}") from exc
    try:
        return adapter.validate_python(dict(given), extra="forbid"), {}
    except ValidationError as exc:
        return None, explain(exc, policy.Settings, dict(given))
    except Exception as exc:
        raise PluginError(policy.name, f"its Settings failed on what is given: {_authors_line(exc)}") from exc
