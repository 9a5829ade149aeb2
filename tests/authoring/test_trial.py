"""`mxgate plugin test` and `plugin list`: what authors and operators are told of policies, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli import cli

POLICY = """\
from dataclasses import dataclass, field
from gateway.api import Policy, Transaction, Verdict, proceed

@dataclass(frozen=True)
class Limits:
    most: int = field(metadata={"doc": "how many"})

class Mine(Policy[Limits]):
    name = "mine"
    Settings = Limits

    async def on_mail(self, tx: Transaction) -> Verdict:
        self.services.log.info("mail.seen", domain=tx.envelope.mail_from.domain)
        return proceed()
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(POLICY)
    (tmp_path / "settings.toml").write_text("most = 3\n")
    return path


def test_a_failing_test_is_told_with_the_authors_own_line(file: Path) -> None:
    result = run("plugin", "test", file, "--settings", file.with_name("settings.toml"))
    assert result.exit_code == 1
    failed = result.stdout.index("FAIL  mine  takes the null reverse path")
    assert f"\n      {file}:13" in result.stdout[failed:]
    assert result.stdout.count("FAIL") == 1


def test_it_is_the_same_in_json(file: Path) -> None:
    result = run("plugin", "test", file, "--settings", file.with_name("settings.toml"), "--json")
    tried = json.loads(result.stdout)
    assert [each["test"] for each in tried if each["failure"]] == ["takes_the_null_reverse_path"]
    assert {each["policy"] for each in tried} == {"mine"}


def test_settings_that_are_missing_or_wrong_are_told(file: Path) -> None:
    result = run("plugin", "test", file)
    assert (result.exit_code, result.stderr) == (1, "Error: settings of mine: most: is required\n")
    settings = file.with_name("settings.toml")
    settings.write_text("mots = 3\nmost = 'x'\n")
    result = run("plugin", "test", file, "--settings", settings)
    assert "mots: unknown key; did you mean most?" in result.stderr
    assert "most: must be a whole number" in result.stderr
    settings.write_text("most")
    assert run("plugin", "test", file, "--settings", settings).stderr.startswith(f"Error: {settings}: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0\n", "mine.py:1: 1 / 0: ZeroDivisionError: division by zero"),
        ("def\n", "mine.py:1: def: SyntaxError: invalid syntax"),
        ("x = 1\n", "mine.py offers no policy"),
    ],
)
def test_a_file_without_a_policy_is_told(file: Path, source: str, message: str) -> None:
    file.write_text(source)
    result = run("plugin", "test", file)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_directory_without_a_project_is_told(file: Path) -> None:
    result = run("plugin", "test", file.parent)
    assert result.exit_code == 1
    assert "pyproject.toml" in result.stderr
    (file.parent / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert run("plugin", "test", file.parent).stderr.strip().endswith("offers no policy")


def test_the_list_has_what_runs_in_its_order_and_then_what_does_not(file: Path) -> None:
    config = file.with_name("mxgate.toml")
    config.write_text(
        'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'
        'relay.routes = [{ downstream = ["192.0.2.5:25"] }]\n'
        f'[policy.mine]\nmode = "observe"\nfile = "{file}"\nsettings = {{ most = 3 }}\n'
    )
    result = run("plugin", "list", "--config", config, "--json")
    assert result.exit_code == 0
    found = {each["name"]: each for each in json.loads(result.stdout)}
    assert found["mine"] == {
        "name": "mine",
        "source": str(file),
        "mode": "observe",
        "order": 0,
        "hooks": ["mail"],
        "error": "",
    }
    assert found["dmarc"]["order"] > found["spf"]["order"]
    assert found["dkim"]["hooks"] == ["header", "eom"]
    assert (found["dnsbl"]["mode"], found["dnsbl"]["order"]) == ("", -1)
    lines = run("plugin", "list", "--config", config).stdout.splitlines()
    assert [line.split()[1] for line in lines] == [*found]
    assert any(line.startswith(" -  dnsbl") and "not enabled" in line for line in lines)
