"""gateway.plugins: which policies there are, what a configuration plans, and how a bad plugin is told."""

from collections.abc import Callable
from importlib.metadata import EntryPoints, distributions
from pathlib import Path

import pytest

from gateway import plugins
from gateway.config import Config, ConfigError, Mode, load
from gateway.plugins import PluginError, installed, plan
from gateway.policy import OnError

CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org", ".example.net"]
relay.recipients_file = "/etc/mxgate/recipients"
relay.routes = [{ downstream = ["192.0.2.5:25"] }]
"""

GUARD = """\
from dataclasses import dataclass
from pathlib import Path
from gateway.policy import OnError, Policy

@dataclass(frozen=True, slots=True)
class GuardSettings:
    domains: tuple[str, ...] = ()
    domains_file: Path | None = None
    recipients_file: Path | None = None

class Guard(Policy[GuardSettings]):
    name = "relay_guard"
    Settings = GuardSettings
    on_error = OnError.DEFER
"""

SPF = """\
from dataclasses import dataclass
from enum import StrEnum
from gateway.policy import Policy

class OnFail(StrEnum):
    CONTINUE = "continue"
    REJECT = "reject"

@dataclass(frozen=True, slots=True)
class Limits:
    terms: int = 10

@dataclass(frozen=True, slots=True)
class SpfSettings:
    on_fail: OnFail = OnFail.CONTINUE
    limits: Limits = Limits()
    hosts: tuple[Limits, ...] = ()

class Spf(Policy[SpfSettings]):
    name = "spf"
    Settings = SpfSettings
    timeout_s = 4.0
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs distributions in a directory of their own; only they are seen, and relay_guard is there."""
    site = tmp_path / "site"

    def add(distribution: str, module: str, source: str, **policies: str) -> None:
        metadata = site / f"{distribution}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {module}:{value}\n" for name, value in policies.items())
        (metadata / "entry_points.txt").write_text(f"[gateway.policies]\n{lines}")
        (site / f"{module}.py").write_text(source)

    def seen(*, group: str) -> EntryPoints:
        found = [each for dist in distributions(path=[str(site)]) for each in dist.entry_points]
        return EntryPoints(each for each in found if each.group == group)

    # Modules of one test must not be found by another one in the same process.
    prefix = f"{tmp_path.name}_"
    original = add

    def add_unique(distribution: str, module: str, source: str, **policies: str) -> None:
        unique = "".join(char if char.isalnum() else "_" for char in prefix + module)
        original(distribution, unique, source, **policies)

    monkeypatch.setattr(plugins, "entry_points", seen)
    monkeypatch.syspath_prepend(str(site))
    add_unique("mxgate-guard", "guard", GUARD, relay_guard="Guard")
    return add_unique


def config(directory: Path, more: str = "") -> Config:
    path = directory / "mxgate.toml"
    path.write_text(CONFIG + more)
    return load(path, environ={})


def refused(directory: Path, more: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(config(directory, more))
    return [str(problem).removeprefix(f"{directory}/") for problem in caught.value.problems]


def test_installed_policies_are_known_without_an_import(install: Install) -> None:
    install("stranger", "broken", "raise SystemError", sunday="Sunday")
    sources = installed()
    assert sorted(sources) == ["relay_guard", "sunday"]
    assert str(sources["sunday"]) == "stranger 1.0"


def test_a_name_that_two_distributions_offer_is_an_error(install: Install, tmp_path: Path) -> None:
    install("one", "a", SPF, spf="Spf")
    install("two", "b", SPF, spf="Spf")
    with pytest.raises(PluginError, match=r"(one|two) 1\.0 and (one|two) 1\.0 both offer"):
        installed()
    (problem,) = refused(tmp_path, "policy.spf.mode = 'enforce'")
    assert problem.startswith("mxgate.toml:5:1: policy.spf: ")


@pytest.mark.usefixtures("install")
def test_the_relay_guard_is_planned_with_the_settings_of_relay(tmp_path: Path) -> None:
    (guard,) = plan(config(tmp_path))
    assert guard.name == "relay_guard"
    assert guard.settings == guard.policy.Settings(
        domains=("example.org", ".example.net"), recipients_file=Path("/etc/mxgate/recipients")
    )
    assert (guard.mode, guard.on_error, guard.timeout_s) == (Mode.ENFORCE, OnError.DEFER, 10.0)


def test_the_order_is_the_guard_the_default_plan_and_then_the_files(install: Install, tmp_path: Path) -> None:
    source = (
        SPF + "class Dkim(Policy[SpfSettings]): name = 'dkim'\nclass A(Policy[SpfSettings]): name = 'a'\n"
    )
    install("stranger", "many", source, a="A", dkim="Dkim", spf="Spf")
    planned = plan(config(tmp_path, "policy.a.timeout_s = 2\npolicy.dkim.timeout_s = 3\n"))
    assert [(each.name, each.timeout_s) for each in planned] == [
        ("relay_guard", 10.0),
        ("spf", 4.0),
        ("dkim", 3.0),
        ("a", 2.0),
    ]


def test_a_stranger_is_planned_only_when_asked_for(install: Install, tmp_path: Path) -> None:
    install("stranger", "sunday", SPF.replace('"spf"', '"sunday"'), sunday="Spf")
    assert [each.name for each in plan(config(tmp_path))] == ["relay_guard"]
    assert [each.name for each in plan(config(tmp_path, "[policy.sunday]"))] == ["relay_guard", "sunday"]


def test_a_policy_that_is_off_need_not_be_installed_and_is_not_checked(
    install: Install, tmp_path: Path
) -> None:
    install("stranger", "broken", "raise SystemError", spf="Spf")
    more = "policy.spf = { mode = 'off', settings = { x = 1 } }\npolicy.none = { mode = 'off' }\n"
    assert [each.name for each in plan(config(tmp_path, more))] == ["relay_guard"]


@pytest.mark.usefixtures("install")
def test_a_policy_that_is_asked_for_must_be_installed(tmp_path: Path) -> None:
    assert refused(tmp_path, "policy.spf.mode = 'enforce'\npolicy.relay_gaurd.timeout_s = 3\n") == [
        "mxgate.toml:5:1: policy.spf: policy spf is not installed",
        "mxgate.toml:6:1: policy.relay_gaurd: policy relay_gaurd is not installed; did you mean relay_guard?",
    ]
    # The default plan takes what is there.
    assert len(plan(config(tmp_path, "policy.greylist.settings.delay_s = 300"))) == 1


def test_settings_are_validated_and_told_with_their_line(install: Install, tmp_path: Path) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    more = """
    [policy.spf.settings]
    on_fial = "reject"
    on_fail = "rejct"
    limits = { terms = "x", term = 1 }
    hosts = [{ terms = 1 }, { temrs = 2 }]
    """
    assert refused(tmp_path, more) == [
        "mxgate.toml:8:5: policy.spf.settings.on_fail: must be one of continue, reject; did you mean reject?",
        "mxgate.toml:9:16: policy.spf.settings.limits.terms: must be a whole number",
        "mxgate.toml:9:29: policy.spf.settings.limits.term: unknown key; did you mean terms?",
        "mxgate.toml:10:31: policy.spf.settings.hosts[1].temrs: unknown key; did you mean terms?",
        "mxgate.toml:7:5: policy.spf.settings.on_fial: unknown key; did you mean on_fail?",
    ]
    planned = plan(config(tmp_path, "policy.spf = { on_error = 'defer', settings = { on_fail = 'reject' } }"))
    assert str(planned[1].settings) == str(planned[1].policy.Settings(on_fail=planned[1].settings.on_fail))  # type: ignore[attr-defined]
    assert planned[1].on_error is OnError.DEFER


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import os\nraise OSError('no disk')\n", "X", "py:2: raise OSError('no disk'): OSError: no disk"),
        ("def f():\n    return 1 / 0\nX = f()\n", "X", "py:2: return 1 / 0: ZeroDivisionError"),
        ("import nonexistent_module_x\n", "X", "py:1: import nonexistent_module_x: ModuleNotFoundError"),
        ("def f(:\n", "X", "py:1: def f(:: SyntaxError: "),
        ("x = 1\n", "Y", "AttributeError: module"),
        ("X = 3\n", "X", "is not a subclass of Policy"),
        ("class X: pass\n", "X", "is not a subclass of Policy"),
        ("from gateway.policy import Policy\nclass X(Policy): pass\n", "X", "must have name = 'bad'"),
        (
            "from gateway.policy import Policy\nclass X(Policy):\n  name = 'bad'\n  Settings = dict\n",
            "X",
            "is not a dataclass",
        ),
        (
            SPF.replace('"spf"', '"bad"').replace("terms: int", "terms: Policy"),
            "Spf",
            "a type in its Settings cannot be validated",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told_with_its_authors_line(
    install: Install, tmp_path: Path, source: str, value: str, message: str
) -> None:
    install("stranger", "bad", source, bad=value)
    (problem,) = refused(tmp_path, "[policy.bad]\n")
    assert problem.startswith("mxgate.toml:5:1: policy.bad: ")
    assert message in problem
    assert "stranger 1.0" in problem or "Settings cannot be validated" in problem


def test_a_policy_needs_the_ones_that_it_requires(install: Install, tmp_path: Path) -> None:
    source = SPF.replace('"spf"', '"dmarc"') + "    requires = ('relay_guard', 'dkim')\n"
    install("stranger", "dmarc", source, dmarc="Spf")
    (problem,) = refused(tmp_path)
    assert problem.endswith("policy.dmarc: needs policy dkim, which is off or not installed")


def test_the_built_in_policies_come_by_entry_point_as_all_others(tmp_path: Path) -> None:
    assert "relay_guard" in installed()
    assert plan(config(tmp_path))[0].name == "relay_guard"
