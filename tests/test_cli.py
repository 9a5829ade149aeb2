"""gateway.cli: what the commands print, and the exit codes of the contract."""

import json
import os
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
import trustme
from click.testing import CliRunner, Result

from gateway import __version__
from gateway.cli import COMMANDS_GROUP, Given, cli
from gateway.config import Config

CONFIG = """\
[server]
hostname = "mx.example.org"
listen = ["127.0.0.1:2525"]
[relay]
domains = ["example.org"]
[[relay.routes]]
downstream = ["192.0.2.5:25"]
"""


@pytest.fixture(autouse=True)
def no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MXGATE"):
            monkeypatch.delenv(name)
    # not every machine that runs tests has the directory of the default
    monkeypatch.setenv("MXGATE__STATE__URL", "memory:")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mxgate.toml"
    path.write_text(CONFIG)
    return path


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_check_config_says_what_was_found(file: Path) -> None:
    result = run("check-config", "--config", file)
    assert result.exit_code == 0
    expected = (
        "ok: listen 127.0.0.1:2525; domains example.org; routes * to 192.0.2.5:25; policies relay_guard"
    )
    assert result.stdout.startswith(expected)
    assert (
        result.stderr
        == f"warning: {file}:1:1: server.tls.cert_file: no certificate: mail arrives unencrypted\n"
    )


def test_check_config_says_which_downstreams_stand_in_for_which(file: Path) -> None:
    more = """
    [[relay.routes]]
    domains = ["example.net"]
    downstream = [["mta:25", "mta2:25"], ["192.0.2.9:25"]]
    """
    file.write_text(CONFIG + more)
    routes = json.loads(run("check-config", "--json", "--config", file).stdout)["routes"]
    assert routes == ["* to 192.0.2.5:25", "example.net to mta:25, mta2:25, else 192.0.2.9:25"]


def test_check_config_warns_of_what_is_allowed_but_odd(file: Path) -> None:
    more = """
    [policy.greylits]
    mode = "off"
    [policy.greylist.settings]
    delay_s = 300
    """
    file.write_text(
        CONFIG.replace("[relay]", '[relay]\ntrusted_networks = ["10.0.0.0/8", "0.0.0.0/0"]') + more
    )
    result = run("--set", "server.hostname=mx", "check-config", "--config", file)
    assert result.exit_code == 0
    warnings = [
        line.removeprefix(f"warning: {file}:").partition(": ")[0::2] for line in result.stderr.splitlines()
    ]
    assert (
        "5:35",
        "relay.trusted_networks[1]: everybody in 0.0.0.0/0 may relay anywhere through this gateway",
    ) in warnings
    assert ("10:5", "policy.greylits: no policy of this name is known; it is off") in warnings
    assert "server.hostname: mx is not fully qualified" in result.stderr
    assert "trusted_networks[0]" not in result.stderr


def test_a_problem_is_one_line_with_the_offending_line_and_a_caret(file: Path) -> None:
    file.write_text(CONFIG + "\tidenity = 'none'\n")
    result = run("check-config", "--config", file)
    assert result.exit_code == 78
    assert result.stdout == ""
    assert result.stderr == (
        f"{file}:8:2: relay.routes[0].idenity: unknown key; did you mean identity?\n"
        "    \tidenity = 'none'\n"
        "    \t^\n"
    )


def test_check_config_tells_of_files_and_policies_in_one_go(file: Path) -> None:
    file.write_text(CONFIG + "[policy.nonexistent]\n")
    result = run("check-config", "--config", file, "--set", "server.spool_dir=/nonexistent")
    assert result.exit_code == 78
    assert "--set server.spool_dir: server.spool_dir: /nonexistent cannot hold files" in result.stderr
    assert f"{file}:8:1: policy.nonexistent: policy nonexistent is not installed" in result.stderr


def test_check_config_speaks_json(file: Path) -> None:
    result = run("check-config", "--json", "--config", file)
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["listen"] == ["127.0.0.1:2525"]
    assert found["policies"][0] == "relay_guard"
    assert found["warnings"][0]["path"] == "server.tls.cert_file"
    result = run("check-config", "--json", "--config", file, "--set", "log.format=x")
    assert result.exit_code == 78
    assert json.loads(result.stdout) == {
        "ok": False,
        "problems": [
            {
                "path": "log.format",
                "message": "must be one of json, logfmt, console, text",
                "source": "--set log.format",
                "line": None,
                "column": None,
            }
        ],
    }


def test_the_file_comes_from_the_command_the_group_the_environment_or_its_place(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace("mx.", "other."))
    monkeypatch.setattr("gateway.cli.DEFAULT_CONFIG", str(other))
    assert "other.example.org" in run("config", "show").stdout
    monkeypatch.setenv("MXGATE_CONFIG", str(file))
    assert "mx.example.org" in run("config", "show").stdout
    assert "other.example.org" in run("--config", other, "config", "show").stdout
    assert "mx.example.org" in run("--config", other, "config", "show", "--config", file).stdout


def test_overrides_of_the_command_come_after_those_of_the_group(file: Path) -> None:
    result = run(
        "--set", "server.max_errors=1", "config", "show", "--config", file, "--set", "server.max_errors=2"
    )
    assert "server.max_errors = 2\n" in result.stdout


def test_config_show_tells_where_values_come_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXGATE__STATE__URL", "redis://:hunter2@redis")
    lines = run("config", "show", "--origin", "--config", file).stdout.splitlines()
    assert f'server.hostname = "mx.example.org"  # {file}:2:1' in lines
    assert 'state.url = "redis://***@redis"  # environment MXGATE__STATE__URL' in lines
    assert "server.max_recipients = 200  # default" in lines
    shown = json.loads(run("config", "show", "--origin", "--json", "--config", file).stdout)
    assert shown["server.hostname"] == {"value": "mx.example.org", "origin": f"{file}:2:1"}
    assert (
        json.loads(run("config", "show", "--json", "--config", file).stdout)["server.max_recipients"] == 200
    )


def test_schema_and_reference_are_printed() -> None:
    assert json.loads(run("config", "schema").stdout)["title"] == "Config"
    assert run("config", "docs").stdout.startswith("# Configuration\n")


def test_plan_says_who_runs_when(file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from gateway.api import Policy\n"
        "class Own(Policy):\n"
        "    name = 'own'\n"
        "    requires = ('relay_guard',)\n"
        "    after = ('recipient',)\n"
        "    async def on_rcpt(self, tx, rcpt): ...\n"
        "    def on_header(self, tx): ...\n"
    )
    with file.open("a") as config:
        config.write(
            f"[policy.own]\nfile = '{own}'\nmode = 'observe'\nexempt = ['192.0.2.0/24', 'trusted']\n"
            "domains.'example.org' = { mode = 'enforce' }\ndomains.'.example.org'.mode = 'off'\n"
        )

    result = run("plan", "--config", str(file))

    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    table = lines[: lines.index("")]
    names = [line.split()[0] for line in table if not line.startswith(" ")]
    assert names == ["relay_guard", "spf", "dkim", "arc", "dmarc", "greylist", "own"]
    assert lines[0].startswith("relay_guard  enforce, 10 s, on_error defer, from mxgate ")
    assert lines[len(table) - 6 :] == [
        f"own          observe, 10 s, on_error continue, from {own}",
        "             requires relay_guard",
        "             after recipient",
        "             exempt 192.0.2.0/24, trusted",
        "             example.org: enforce",
        "             .example.org: off",
        "",
        "connect  20 s",
        "ehlo     20 s",
        "mail     20 s  spf",
        "rcpt     20 s  relay_guard > recipient > own > greylist",
        "eom      25 s  dkim, arc > dmarc, own",
    ]
    plan = json.loads(run("plan", "--json", "--config", str(file)).stdout)
    assert plan["stages"]["rcpt"] == {
        "budget_s": 20.0,
        "ranks": [["relay_guard"], ["recipient"], ["own"], ["greylist"]],
    }
    assert plan["policies"][-1] == {
        "name": "own",
        "source": str(own),
        "mode": "observe",
        "timeout_s": 10.0,
        "on_error": "continue",
        "stages": ["rcpt", "eom"],
        "requires": ["relay_guard"],
        "after": ["recipient"],
        "exempt": ["192.0.2.0/24", "trusted"],
        "domains": {"example.org": "enforce", ".example.org": "off"},
    }


def test_plan_of_a_configuration_that_cannot_be_used_is_78(file: Path) -> None:
    with file.open("a") as config:
        config.write("[policy.own]\n")

    result = run("plan", "--config", str(file))

    assert result.exit_code == 78
    assert "policy own is not installed" in result.stderr


def test_version_names_the_policies_that_are_installed() -> None:
    assert run("version").stdout.startswith(f"mxgate {__version__} (Python 3.")
    found = json.loads(run("version", "--json").stdout)
    assert found["version"] == __version__
    assert found["policies"]["relay_guard"].startswith("mxgate ")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["serve", "--nonsense"], [], ["config"], ["version", "x"]]
)
def test_wrong_usage_is_64(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 64


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "check-config",
        "config",
        "config show",
        "config schema",
        "config docs",
        "plan",
        "version",
        "explain",
        "demo",
    ],
)
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_serve_hands_the_configuration_to_the_supervisor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def supervise(config: Config, *, config_path: str, overrides: tuple[str, ...]) -> int:
        called.append((config.server.max_errors, config_path, overrides))
        return 3

    stand_in(monkeypatch, "supervisor", run=supervise)
    assert run("serve", "--config", file, "--set", "server.max_errors=7").exit_code == 3
    assert called == [(7, str(file), ("server.max_errors=7",))]


def test_serve_refuses_to_start_with_a_file_that_it_cannot_use(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "supervisor")
    result = run(
        "serve", "--config", file, "--set", "server.tls={cert_file='/nonexistent', key_file='/nonexistent'}"
    )
    assert result.exit_code == 78
    assert "server.tls.cert_file: /nonexistent cannot be read" in result.stderr


def test_demo_runs_in_the_directory_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Path] = []

    def first_hour(directory: Path) -> int:
        called.append(directory)
        return 0

    stand_in(monkeypatch, "demo", run=first_hour)
    assert run("demo", "--dir", tmp_path).exit_code == 0
    assert run("demo").exit_code == 0
    assert called == [tmp_path, Path("mxgate-demo")]


def offer(monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Other distributions offer these commands."""
    found = [EntryPoint(name, value, COMMANDS_GROUP) for name, value in commands.items()]
    monkeypatch.setattr("gateway.cli.entry_points", lambda *, group: found if group == COMMANDS_GROUP else [])


def test_commands_of_policies_are_listed_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, theirs="no_such_module:command", plan="no_such_module:command")
    result = run("--help")
    assert result.exit_code == 0
    ours, _, others = result.stdout.partition("Commands of policies:")
    assert "  plan " in ours
    assert others.split()[:1] == ["theirs"]
    assert "plan" not in others


def test_a_command_of_a_policy_runs_with_what_the_group_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("their_commands")

    @click.command()
    @click.pass_obj
    def theirs(given: Given) -> int:
        click.echo(given.config)
        return 1

    vars(module).update(theirs=theirs, nothing=3)
    monkeypatch.setitem(sys.modules, "their_commands", module)
    offer(
        monkeypatch,
        theirs="their_commands:theirs",
        broken="no_such_module:command",
        nothing="their_commands:nothing",
    )
    done = run("--config", "x.toml", "theirs")
    assert (done.exit_code, done.stdout) == (1, "x.toml\n")
    for name in ("broken", "nothing"):
        done = run(name)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"Error: {name} of ")
    assert run("others").exit_code == 64


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = types.ModuleType(f"gateway.{name}")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, f"gateway.{name}", module)
    monkeypatch.setattr(f"gateway.{name}", module, raising=False)


@pytest.mark.e2e
def test_the_real_command_reads_standard_input_and_keeps_its_exit_codes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway"]

    def finished(arguments: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
        )

    good = finished(["check-config", "--config", "-"], CONFIG)
    assert (good.returncode, good.stdout[:3]) == (0, "ok:")
    bad = finished(["serve", "--config", "-"], CONFIG.replace("hostname", "host_name"))
    assert bad.returncode == 78
    assert bad.stderr.startswith("/dev/stdin:2:1: server.host_name: unknown key; did you mean hostname?\n")
    assert finished(["serve", "--config", str(tmp_path / "none.toml")]).returncode == 78
    assert finished(["nonsense"]).returncode == 64


@pytest.mark.e2e
def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    process = subprocess.run(
        f"{sys.executable} -m gateway config schema | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == ""


def test_submission_has_its_own_part_in_what_commands_say(file: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("mx.example.org")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "tls.pem"))
    written = file.read_text("utf-8")
    added = (
        '[[relay.routes]]\nname = "out"\ndomains = []\ndownstream = ["192.0.2.5:587"]\n'
        '[submission]\nlisten = ["0.0.0.0:587"]\nroute = "out"\nauth.address = "unix:/run/auth"\n'
        f'[server.tls]\ncert_file = "{tmp_path}/tls.pem"\nkey_file = "{tmp_path}/tls.pem"\n'
        '[state]\nurl = "memory:"\n'
    )
    file.write_text(written + added, "utf-8")

    checked = run("check-config", "--config", file)
    assert checked.exit_code == 0, checked.output
    assert "submission 0.0.0.0:587; submission policies relay_guard, sender_login" in checked.stdout
    assert "submission to 192.0.2.5:587" in checked.stdout
    plan = run("plan", "--config", file).stdout.partition("\nsubmission:\n")
    assert "spf" in plan[0]
    assert "spf" not in plan[2]
    assert "sender_login" in plan[2]
    shown = json.loads(run("plan", "--json", "--config", file).stdout)
    assert [each["name"] for each in shown["submission"]["policies"]] == ["relay_guard", "sender_login"]

    file.write_text(written + added + "[submission.policy.dkim_sign]\n", "utf-8")
    checked = run("check-config", "--config", file)
    assert checked.exit_code == 78
    assert "submission.policy.dkim_sign" in checked.output
