"""`mxgate plugin new`: what it makes passes its own tests, the contract and mypy, and its wheel is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.authoring.new import NewError, new_package
from gateway.testing import PolicyContract
from tests.authorkit import run

pytestmark = [pytest.mark.e2e, pytest.mark.full]

CONTRACT = [name for name in vars(PolicyContract) if name.startswith("test_")]
CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org"]
relay.routes = [{ downstream = ["192.0.2.5:25"] }]
[policy.no_spam.settings]
domains = ["spam.example"]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("new")
    written = new_package("no_spam", parent)
    assert all(path.is_relative_to(parent / "mxgate-no-spam") for path in written)
    return parent / "mxgate-no-spam"


@pytest.fixture(scope="module")
def wheel(package: Path) -> Path:
    built = run("hatchling", "build", "-t", "wheel", at=package)
    assert built.returncode == 0, built.stderr
    (found,) = (package / "dist").glob("*.whl")
    return found


def test_its_tests_pass_as_they_are(package: Path) -> None:
    done = run("pytest", "-q", "-p", "no:cacheprovider", at=package)
    assert done.returncode == 0, done.stdout
    assert "22 passed" in done.stdout


def test_it_is_clean_under_mypy_strict(package: Path) -> None:
    done = run("mypy", at=package)
    assert done.returncode == 0, done.stdout


def test_it_is_clean_under_ruff(package: Path) -> None:
    for arguments in (("check",), ("format", "--check")):
        done = run("ruff", *arguments, "--isolated", "--line-length=110", "--no-cache", ".", at=package)
        assert done.returncode == 0, done.stdout


def test_nothing_is_left_to_be_filled_in(package: Path) -> None:
    for path in package.rglob("*.*"):
        if path.is_file() and path.suffix in (".py", ".md", ".toml"):
            assert "{{" not in path.read_text("utf-8"), path


def test_the_contract_passes_from_the_tree_and_from_the_wheel(package: Path, wheel: Path) -> None:
    for path in (package, wheel):
        done = run("gateway", "plugin", "test", path, at=package.parent)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == len(CONTRACT)
        assert all(line.startswith("ok    no_spam  ") for line in done.stdout.splitlines())


def test_the_gateway_finds_the_wheel_beside_its_own_and_plans_it(package: Path, wheel: Path) -> None:
    config = package.parent / "mxgate.toml"
    config.write_text(CONFIG)
    done = run("gateway", "plugin", "list", "--config", config, at=package.parent, path=[wheel])
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if "no_spam" in line]
    assert line.split() == ["1", "no_spam", "enforce", "mxgate-no-spam", "0.1.0", "mail"]
    wrong = run(
        "gateway", "check-config", "--config", config, "--set", "policy.no_spam.settings.domain=[]",
        at=package.parent, path=[wheel],
    )  # fmt: skip
    assert wrong.returncode == 78
    assert "policy.no_spam.settings.domain: unknown key; did you mean domains?" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("No", "is no name"),
        ("1a", "is no name"),
        ("a-b", "is no name"),
        ("spf", "already offers a policy spf"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(NewError, match=why):
        new_package(name, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    new_package("sunday", tmp_path)
    readme = tmp_path / "mxgate-sunday" / "README.md"
    readme.write_text("mine")
    with pytest.raises(NewError, match="is there already"):
        new_package("sunday", tmp_path)
    assert readme.read_text() == "mine"
