"""gateway.plugins: which policies there are, what a configuration plans, and how a bad plugin is told."""

from collections.abc import Callable
from importlib.metadata import EntryPoints, distributions
from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway import plugins
from gateway.config import Config, ConfigError, Mode, load
from gateway.plugins import PluginError, installed, plan
from gateway.policy import OnError
from gateway.session import Trust
from gateway.show_plan import shown_plan
from tests.fakes import FakeServices

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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("requires = 'dkim'", "requires must be a tuple of policies' names, not 'dkim'"),
        ("after = ['dkim']", "after must be a tuple of policies' names, not ['dkim']"),
        ("method = 5", "method must be a word or None, not 5"),
        (
            "own_fields = ('X-Other',)",
            """own_fields must be a tuple of names "X-Mxgate-...", not ('X-Other',)""",
        ),
        ("on_error = 'reject'", "on_error must be OnError.CONTINUE or OnError.DEFER, not 'reject'"),
        ("timeout_s = 0", "timeout_s must be a number of seconds, more than 0 and at most 60, not 0"),
        ("timeout_s = '5'", "timeout_s must be a number of seconds, more than 0 and at most 60, not '5'"),
        ("timeout_s = float('nan')", "timeout_s must be a number of seconds"),
        ("def on_mail(self, tx): ...", "on_mail must be a coroutine function: async def on_mail(...)"),
        ("def start(self): ...", "start must be a coroutine function"),
        ("async def on_header(self, tx): ...", "on_header must be a plain function: def on_header(...)"),
        ("stages = classmethod(lambda cls, settings=None: 1 / 0)", "its stages() failed: "),
        (
            "stages = classmethod(lambda cls, settings=None: ['mail'])",
            "must return a set of stages, not ['mail']",
        ),
    ],
)
def test_a_declaration_that_the_engine_cannot_take_is_told(
    install: Install, tmp_path: Path, line: str, message: str
) -> None:
    install("stranger", "bad", SPF.replace('"spf"', '"bad"') + f"    {line}\n", bad="Spf")
    (problem,) = refused(tmp_path, "[policy.bad]\n")
    assert problem.startswith("mxgate.toml:5:1: policy.bad: ")
    assert message in problem


def test_a_hook_that_is_wrapped_is_taken(install: Install, tmp_path: Path) -> None:
    source = (
        "import functools\ndef wrapped(hook):\n    @functools.wraps(hook)\n"
        "    def call(*args): return hook(*args)\n    return call\n"
        + SPF.replace('"spf"', '"bad"')
        + "    @wrapped\n    async def on_mail(self, tx): ...\n"
    )
    install("stranger", "bad", source, bad="Spf")
    assert [each.name for each in plan(config(tmp_path, "[policy.bad]\n"))][-1] == "bad"


def test_settings_that_raise_what_they_should_not_are_told(install: Install, tmp_path: Path) -> None:
    source = SPF.replace('"spf"', '"bad"').replace(
        "    hosts: tuple[Limits, ...] = ()\n",
        "    hosts: tuple[Limits, ...] = ()\n    def __post_init__(self): raise KeyError('zone')\n",
    )
    install("stranger", "bad", source, bad="Spf")
    (problem,) = refused(tmp_path, "[policy.bad]\n")
    assert "policy.bad: its Settings failed on what is given: " in problem
    assert "raise KeyError('zone')" in problem


def test_a_policy_needs_the_ones_that_it_requires(install: Install, tmp_path: Path) -> None:
    source = SPF.replace('"spf"', '"dmarc"') + "    requires = ('relay_guard', 'dkim')\n"
    install("stranger", "dmarc", source, dmarc="Spf")
    (problem,) = refused(tmp_path)
    assert problem.endswith("policy.dmarc: needs policy dkim, which is off or not installed")


def test_policies_that_wait_for_each_other_are_no_plan(install: Install, tmp_path: Path) -> None:
    source = SPF + "    after = ('dkim',)\nclass Dkim(Spf):\n    name = 'dkim'\n    after = ('spf',)\n"
    install("stranger", "circle", source, spf="Spf", dkim="Dkim")
    (problem,) = refused(tmp_path)
    assert problem.endswith("policy: policies wait for each other: dkim, spf")


# --- files --------------------------------------------------------------------------------------------


def policy_file(directory: Path, source: str) -> Path:
    path = directory / "own.py"
    path.write_text(source)
    return path


OWN = SPF.replace('"spf"', '"own"')


@pytest.mark.usefixtures("install")
def test_a_policy_may_be_one_file(tmp_path: Path) -> None:
    path = policy_file(tmp_path, "from __future__ import annotations\n" + OWN)
    more = (
        f"policy.own = {{ file = '{path}', settings = {{ on_fail = 'reject', limits = {{ terms = 3 }} }} }}"
    )

    planned = plan(config(tmp_path, more))[1]

    assert (planned.name, planned.source, planned.policy.__name__) == ("own", str(path), "Spf")
    assert "limits=Limits(terms=3)" in str(planned.settings)
    assert not [*tmp_path.glob("__pycache__")], "nothing is written beside it"
    # what is changed is what is loaded next
    path.write_text(OWN.replace("timeout_s = 4.0", "timeout_s = 5.0"))
    assert plan(config(tmp_path, more))[1].timeout_s == 5.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import os\nraise OSError('no disk')\n",
            "cannot load it from {path}: {path}:2: raise OSError('no disk'): OSError: no disk",
        ),
        ("def f(:\n", "cannot load it from {path}: {path}:1: def f(:: SyntaxError: invalid syntax"),
        ("X = 1\n", "{path} must hold one subclass of Policy with name = 'own'; it holds none at all"),
        (SPF, "{path} must hold one subclass of Policy with name = 'own'; it holds Spf"),
        (
            "from policies.relay_guard import RelayGuard\n",
            "{path} must hold one subclass of Policy with name = 'own'; it holds none at all",
        ),
        (
            OWN + "class Two(Spf): pass\n",
            "{path} must hold one subclass of Policy with name = 'own'; it holds Spf, Two",
        ),
        (
            "from gateway.api import Policy\nclass X(Policy):\n  name = 'own'\n  Settings = dict\n",
            "Settings of X of {path} is not a dataclass",
        ),
    ],
)
@pytest.mark.usefixtures("install")
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, source: str, message: str) -> None:
    path = policy_file(tmp_path, source)
    (problem,) = refused(tmp_path, f"policy.own.file = '{path}'")
    assert problem == f"mxgate.toml:5:1: policy.own: {message.format(path=path)}"


@pytest.mark.usefixtures("install")
def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "policy.own.file = '/nonexistent/own.py'")
    assert "cannot load it from /nonexistent/own.py: " in problem
    assert "No such file" in problem


def test_a_file_does_not_take_an_installed_policys_place(install: Install, tmp_path: Path) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    path = policy_file(tmp_path, SPF)
    (problem,) = refused(tmp_path, f"policy.spf.file = '{path}'")
    assert f"{path} and mxgate-spf 1.0 both offer a policy of this name; give yours another one" in problem


def test_a_policy_of_a_file_and_one_of_a_distribution_may_require_each_other(
    install: Install, tmp_path: Path
) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    path = policy_file(tmp_path, OWN + "    requires = ('spf',)\n")
    more = f"policy.own.file = '{path}'\n"
    assert [each.name for each in plan(config(tmp_path, more))] == ["relay_guard", "spf", "own"]
    (problem,) = refused(tmp_path, more + "policy.spf.mode = 'off'")
    assert problem.endswith("policy.own: needs policy spf, which is off or not installed")


# --- modes, exemptions, domains -----------------------------------------------------------------------


def test_a_dry_run_observes_all_but_the_guard(install: Install, tmp_path: Path) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    more = "pipeline.observe = true\npolicy.spf.domains.'example.org'.mode = 'enforce'\n"
    guard, spf = plan(config(tmp_path, more + "policy.spf.domains.'example.net'.mode = 'off'"))
    assert (guard.mode, spf.mode) == (Mode.ENFORCE, Mode.OBSERVE)
    assert [each.mode for each in spf.overrides] == [Mode.OBSERVE, Mode.OFF]


def test_a_domain_has_the_policys_settings_but_for_its_own(install: Install, tmp_path: Path) -> None:
    install(
        "mxgate-spf", "spf", SPF.replace("terms: int = 10", "terms: int = 10\n    depth: int = 1"), spf="Spf"
    )
    more = """
    [policy.spf]
    exempt = ["192.0.2.0/24", "trusted"]
    [policy.spf.settings]
    on_fail = "reject"
    limits = { terms = 3 }
    [policy.spf.domains."example.org"]
    mode = "observe"
    settings = { limits = { depth = 5 } }
    [policy.spf.domains.".example.org"]
    settings = { on_fail = "continue" }
    [policy.spf.domains."*"]
    mode = "off"
    """
    spf = plan(config(tmp_path, more))[1]
    one, below, rest = spf.overrides
    assert (one.pattern, one.mode) == ("example.org", Mode.OBSERVE)
    assert "OnFail.REJECT" in repr(one.settings)
    assert "Limits(terms=3, depth=5)" in repr(one.settings)
    assert (below.pattern, below.mode) == (".example.org", Mode.ENFORCE)
    assert "OnFail.CONTINUE" in repr(below.settings)
    assert (rest.pattern, rest.mode, rest.settings) == ("*", Mode.OFF, None)
    step = spf.step(FakeServices())
    assert step.exempt == (ip_network("192.0.2.0/24"), Trust.TRUSTED)
    objects = [each.policy for each in step.overrides]
    assert [policy and policy.settings for policy in objects] == [one.settings, below.settings, None]


def test_a_policy_says_whom_it_exempts_unless_the_operator_does(install: Install, tmp_path: Path) -> None:
    source = (
        "from gateway.session import Trust\n" + SPF + "    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)\n"
    )
    install("mxgate-spf", "spf", source, spf="Spf")
    for more, expected in (
        ("", (Trust.TRUSTED, Trust.AUTHENTICATED)),
        ("policy.spf.mode = 'observe'", (Trust.TRUSTED, Trust.AUTHENTICATED)),
        ("policy.spf.exempt = []", ()),
        ("policy.spf.exempt = ['192.0.2.0/24']", (ip_network("192.0.2.0/24"),)),
    ):
        spf = plan(config(tmp_path, more))[1]
        assert spf.exempt == expected
        (shown,) = (each for each in shown_plan([spf])["policies"])
        assert shown["exempt"] == [str(each) for each in expected]


@pytest.mark.parametrize("exempt", ["Trust.TRUSTED", "('trusted', 1)", "(Trust.UNTRUSTED,)", "None"])
def test_a_policy_exempts_nobody_but_those_who_are_trusted(
    install: Install, tmp_path: Path, exempt: str
) -> None:
    install(
        "mxgate-spf", "spf", f"from gateway.session import Trust\n{SPF}    exempt = {exempt}\n", spf="Spf"
    )
    (problem,) = refused(tmp_path)
    assert "may be a tuple of trusted and authenticated only" in problem


def test_settings_of_a_domain_are_validated_and_told_with_their_line(
    install: Install, tmp_path: Path
) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    more = "[policy.spf.domains.'example.org'.settings]\non_fial = 'reject'\nlimits = { terms = 'x' }\n"
    assert refused(tmp_path, more) == [
        'mxgate.toml:7:12: policy.spf.domains."example.org".settings.limits.terms: must be a whole number',
        'mxgate.toml:6:1: policy.spf.domains."example.org".settings.on_fial: unknown key; did you mean on_fail?',
    ]


def test_a_policy_that_is_off_is_loaded_for_the_domain_that_has_it(install: Install, tmp_path: Path) -> None:
    install("mxgate-spf", "spf", SPF, spf="Spf")
    more = "policy.spf = { mode = 'off', domains.'example.org'.mode = 'enforce' }"
    spf = plan(config(tmp_path, more))[1]
    assert (spf.mode, spf.overrides[0].mode) == (Mode.OFF, Mode.ENFORCE)
    off = more.replace("enforce", "off")
    assert [each.name for each in plan(config(tmp_path, off))] == ["relay_guard"]


def test_the_built_in_policies_come_by_entry_point_as_all_others(tmp_path: Path) -> None:
    assert "relay_guard" in installed()
    assert plan(config(tmp_path))[0].name == "relay_guard"
