"""`mxgate explain`: what it prints and its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli import cli

OWN = """\
from dataclasses import dataclass, field
from gateway.api import AuthResult, Policy, Question, Reply, Result, RRType, ask, proceed, reject, AddField

class Evidence:
    def lines(self):
        return ["saw \\x1b[31m this"]

@dataclass(frozen=True)
class Settings:
    refuse: bool = field(default=False, metadata={"doc": "."})
    crash: bool = field(default=False, metadata={"doc": "."})

class Own(Policy[Settings]):
    name = "own"
    Settings = Settings
    method = "x-own"

    async def on_mail(self, tx):
        (answer,) = await self.services.dns.run(ask(Question("a.example", RRType.TXT)), tx)
        if self.settings.crash:
            raise RuntimeError("cannot \\x1b[31m")
        found = [AuthResult("x-own", Result.PASS, str(len(answer.texts)))]
        return proceed(reason="own_seen", results=found, evidence=Evidence())

    async def on_eom(self, tx):
        if self.settings.refuse:
            return reject("own_refused", Reply(550, "5.7.1", "Not this"))
        return proceed(edits=[AddField("X-Own", "yes")])
"""
MESSAGE = b"From: a@example.net\nX-Mxgate-Quarantine: forged\n\nhello\n"
CLIENT = ("--ip", "192.0.2.1", "--helo", "mail.example.net", "--mail-from", "a@example.net")


@pytest.fixture(autouse=True)
def no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("MXGATE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("gateway.cli.DEFAULT_CONFIG", str(tmp_path / "none.toml"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "mail.eml").write_bytes(MESSAGE)
    (tmp_path / "zone").write_text('a.example. 60 IN TXT "one" " text" \na.example. 60 IN TXT "\\007"\n')
    (tmp_path / "mxgate.toml").write_text(
        f"""
        [server]
        hostname = "mx.example.org"
        [relay]
        domains = ["example.org"]
        routes = [{{ domains = ["*"], downstream = ["127.0.0.1:9"] }}]
        [policy]
        spf.mode = "off"
        dkim.mode = "off"
        arc.mode = "off"
        dmarc.mode = "off"
        greylist.mode = "off"
        [policy.own]
        file = "{tmp_path / "own.py"}"
        """
    )
    return tmp_path


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(cli, ["explain", *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def explain(files: Path, *more: str | Path, rcpt: str = "ann@example.org") -> Result:
    config = ("--config", files / "mxgate.toml", "--zone", files / "zone")
    return run(files / "mail.eml", *CLIENT, "--rcpt", rcpt, *config, *more)


def test_says_what_each_policy_saw_and_what_would_leave(files: Path) -> None:
    done = explain(files)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert "mail     20 s  own" in lines
    assert r"            saw \x1b[31m this" in lines
    assert "            x-own=pass (2)" in lines
    at = lines.index("  dns")
    assert lines[at + 1].startswith("    own: a.example TXT")
    assert sorted(lines[at + 2 : at + 4]) == [f"            {text}" for text in (r"\007", "one text")]
    assert "+ X-Own: yes" in lines
    assert "- X-Mxgate-Quarantine: forged" in lines
    assert any(line.startswith("+ Authentication-Results: mx.example.org;") for line in lines)
    assert lines[-1] == "answer 250 2.0.0 Ok, here the downstream would answer"


def test_json_has_the_plan_the_record_the_fields_and_the_log(files: Path) -> None:
    told = json.loads(explain(files, "--json").stdout)
    assert sorted(told) == ["decision", "fields", "log", "plan"]
    assert [each["name"] for each in told["plan"]["policies"]] == ["relay_guard", "own"]
    decision = told["decision"]
    assert (decision["action"], decision["code"], decision["authserv_id"]) == (
        "accepted",
        250,
        "mx.example.org",
    )
    (asked,) = decision["dns"]
    assert (asked["policy"], asked["name"], asked["rrtype"]) == ("own", "a.example", "TXT")
    assert [field["name"] for field in told["fields"]["removed"]] == ["X-Mxgate-Quarantine"]
    assert {field["name"] for field in told["fields"]["added"]} == {
        "Authentication-Results",
        "Received",
        "X-Own",
    }


def test_a_refusal_is_told_and_nothing_would_be_delivered(files: Path) -> None:
    done = explain(files, "--set", "policy.own.settings.refuse=true")
    assert done.exit_code == 0
    assert "nothing would be delivered" in done.stdout
    assert done.stdout.endswith("answer 550 5.7.1 Not this\n")
    assert "answered 550 5.7.1 Not this at eom [own own_refused]" in done.stdout


def test_a_domain_that_is_not_ours_is_told(files: Path) -> None:
    done = explain(files, rcpt="ann@example.com")
    assert "answered 550 5.7.1 Relaying denied at rcpt [relay_guard relaying_denied]" in done.stdout


def test_a_policy_that_fails_says_why(files: Path) -> None:
    done = explain(files, "--set", "policy.own.settings.crash=true")
    assert done.exit_code == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: policy.failed")]
    assert "policy=own" in line
    assert r"\\x1b" in line
    assert line.isprintable()


def test_the_message_may_be_standard_input(files: Path) -> None:
    done = run("-", *CLIENT, "--rcpt", "a@example.org", "--config", files / "mxgate.toml", stdin=MESSAGE)
    assert done.exit_code == 0


def test_the_null_reverse_path_and_addresses_beyond_ascii_are_taken(files: Path) -> None:
    arguments = ("--config", files / "mxgate.toml", "--rcpt", "b\u00fccher@example.org", "--json")
    done = run(files / "mail.eml", "--ip", "2001:db8::1", "--mail-from", "<>", *arguments)
    decision = json.loads(done.stdout)["decision"]
    assert (decision["mail_from"], decision["smtputf8"]) == ("", True)
    assert decision["helo"] == "[IPv6:2001:db8::1]"


def test_without_a_configuration_the_default_plan_runs_for_the_recipients_domains(files: Path) -> None:
    done = run(files / "mail.eml", *CLIENT, "--rcpt", "ann@example.com", "--zone", files / "zone")
    assert done.exit_code == 0
    assert done.stderr.startswith("no configuration: the default plan")
    assert "relay_guard: continue" in done.stdout


def test_a_configuration_that_was_named_has_to_be_there(files: Path) -> None:
    done = run(files / "mail.eml", *CLIENT, "--rcpt", "a@example.com", "--config", files / "no.toml")
    assert done.exit_code == 78


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["{mail}", "--ip", "192.0.2.1"],
        ["{mail}", "--ip", "nonsense", "--mail-from", "a@b.example", "--rcpt", "c@d.example"],
        ["{mail}", "--ip", "192.0.2.1", "--mail-from", "a@b", "--rcpt", "c d@example.org"],
        ["{mail}", "--ip", "192.0.2.1", "--mail-from", "a\r\nb@x", "--rcpt", "c@example.org"],
        ["{mail}", "--ip", "192.0.2.1", "--helo", "a b", "--mail-from", "", "--rcpt", "c@example.org"],
        ["/nonexistent", "--ip", "192.0.2.1", "--mail-from", "", "--rcpt", "c@example.org"],
        ["{mail}", "--record", "{mail}"],
    ],
)
def test_wrong_usage_is_64(files: Path, arguments: list[str]) -> None:
    done = run(*[each.format(mail=files / "mail.eml") for each in arguments])
    assert done.exit_code == 64
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("zone", ["nonsense without an end (", "\xff"])
def test_what_is_no_zone_is_told(files: Path, zone: str) -> None:
    (files / "zone").write_text(zone, "latin-1")
    done = explain(files)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {files / 'zone'}: ")


@pytest.mark.parametrize("hook", ["__init__", "start"])
def test_a_policy_that_does_not_start_is_told(files: Path, hook: str) -> None:
    makes = "def __init__(self, settings, services)" if hook == "__init__" else "async def start(self)"
    (files / "own.py").write_text(f"{OWN}\n    {makes}:\n        raise RuntimeError('no disk')\n")
    done = explain(files)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "no disk" in done.stderr


def recorded(files: Path, *more: str | Path) -> Any:
    return json.loads(explain(files, "--json", *more).stdout)["decision"]


def test_a_record_is_judged_again(files: Path) -> None:
    (files / "1.json").write_text(json.dumps({"decisions": [recorded(files)]}))
    done = run("--record", files / "1.json", "--config", files / "mxgate.toml")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "replayed: the same action, reply, verdicts and results" in done.stdout
    again = run(
        "--record", "-", "--config", files / "mxgate.toml", "--json", stdin=(files / "1.json").read_bytes()
    )
    assert json.loads(again.stdout)["replay"] == {"same": True, "differences": [], "missing": []}


def test_a_record_that_comes_to_something_else_is_a_finding(files: Path) -> None:
    record = recorded(files, "--set", "policy.own.settings.refuse=true")
    (files / "1.json").write_text(json.dumps(record | {"dns": []}))
    done = run("--record", files / "1.json", "--config", files / "mxgate.toml")
    assert done.exit_code == 1
    assert "not in the record: the answer to a.example TXT" in done.stdout
    assert "different: action: 'rejected' then, 'accepted' now" in done.stdout


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 10_000, "{}", "[]", '{"decisions": []}'])
def test_what_is_no_record_is_told(files: Path, text: str) -> None:
    (files / "1.json").write_text(text)
    done = run("--record", files / "1.json", "--config", files / "mxgate.toml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_a_policy_that_remembers_is_observed_so_that_the_others_are_heard(files: Path) -> None:
    """Who sends is a stranger to it, always."""
    file = files / "mxgate.toml"
    file.write_text(file.read_text().replace('greylist.mode = "off"', ""))
    told = json.loads(explain(files, "--json").stdout)
    assert told["decision"]["action"] == "accepted"
    would_be = told["decision"]["would_be"]
    assert (would_be["policy"], would_be["action"], would_be["code"]) == ("greylist", "defer", 451)
