"""examples/: each passes its own tests, mypy and the contract, imports public modules only, and its wheel is loaded."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.authorkit import run

pytestmark = [pytest.mark.e2e, pytest.mark.full]

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org"]
relay.routes = [{{ downstream = ["192.0.2.5:25"] }}]
[policy.{}]
"""
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


@pytest.fixture(params=NAMES)
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one, so that nothing is written into the checkout."""
    copy = tmp_path / str(request.param)
    shutil.copytree(EXAMPLES / str(request.param), copy)
    return copy


def test_its_tests_pass_and_mypy_has_nothing_to_say(example: Path) -> None:
    tests = run("pytest", "-q", "-p", "no:cacheprovider", at=example)
    assert tests.returncode == 0, tests.stdout
    types = run("mypy", at=example)
    assert types.returncode == 0, types.stdout


def test_its_wheel_passes_the_contract_and_is_planned(example: Path) -> None:
    built = run("hatchling", "build", "-t", "wheel", at=example)
    assert built.returncode == 0, built.stderr
    (wheel,) = (example / "dist").glob("*.whl")
    tried = run("gateway", "plugin", "test", wheel, at=example.parent)
    assert tried.returncode == 0, tried.stdout
    project = tomllib.loads((example / "pyproject.toml").read_text("utf-8"))["project"]
    (name,) = project["entry-points"]["gateway.policies"]
    config = example / "mxgate.toml"
    config.write_text(CONFIG.format(name))
    plan = run("gateway", "plan", "--config", config, at=example.parent, path=[wheel])
    assert plan.returncode == 0, plan.stderr
    assert f"from {example.name} 0.1.0\n" in plan.stdout


@pytest.mark.parametrize("name", NAMES)
def test_it_imports_nothing_of_the_gateway_that_is_not_public(name: str) -> None:
    for file in (EXAMPLES / name).rglob("*.py"):
        allowed = {"gateway.api"} | (
            {"gateway.testing", "gateway.testing.mail"} if "tests" in file.parts else set()
        )
        found = re.findall(
            r"^\s*(?:from|import) (gateway[\w.]*|policies[\w.]*)", file.read_text("utf-8"), re.MULTILINE
        )
        assert set(found) <= allowed, file


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_names_each_setting_and_the_overview_names_it(name: str) -> None:
    source = next((EXAMPLES / name / "src").rglob("__init__.py")).read_text("utf-8")
    settings = re.findall(r"^    (\w+): [\w\[\], .]+ = field\(", source, re.MULTILINE)
    readme = (EXAMPLES / name / "README.md").read_text("utf-8")
    assert settings
    assert re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE) == settings
    assert f"[{name}]({name}/README.md)" in (EXAMPLES / "README.md").read_text("utf-8")
