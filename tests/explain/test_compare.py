"""`mxgate replay`: stored mail is judged as it came, and what another configuration would change is told."""

from __future__ import annotations

import json
import mailbox
import os
from email import message_from_bytes
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli import cli
from gateway.explain.run import ExplainError
from gateway.explain.stored import Assumed, Sent, Stored, sent
from gateway.testing import Harness
from gateway.testing.mail import compose
from policies.spf import Spf

CONFIG = """\
server.hostname = "mx.example.org"
relay.domains = ["example.org"]
relay.routes = [{ downstream = ["192.0.2.5:25"] }]
"""
STRICT = '[policy.spf.settings]\non_fail = "reject"\n'
ZONE = 'client.example. 60 IN TXT "v=spf1 ip4:192.0.2.1 -all"\n'
RETURN_PATH = b"Return-Path: <ann@client.example>\r\nDelivered-To: bob@example.org\r\n"
MESSAGE = compose("ann@client.example")


def stored(client: str = "192.0.2.1", message: bytes = MESSAGE) -> bytes:
    """A message as it lies in a mailbox behind the gateway."""
    with Harness(Spf) as harness:
        played = harness.deliver(message, client=client, mail_from="ann@client.example")
    assert played.message is not None
    return RETURN_PATH + played.message


@pytest.fixture(autouse=True)
def no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MXGATE"):
            monkeypatch.delenv(name)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.toml").write_text(CONFIG)
    (tmp_path / "b.toml").write_text(CONFIG + STRICT)
    (tmp_path / "world.zone").write_text(ZONE)
    mail = tmp_path / "mail"
    (mail / "new").mkdir(parents=True)
    (mail / "new" / "1").write_bytes(stored())
    (mail / "new" / "2").write_bytes(stored("192.0.2.7"))
    (mail / "new" / "3").write_bytes(b"From: ann@client.example\nSubject: nobody knows\n\nwho sent it\n")
    return tmp_path


def run(files: Path, path: str, *arguments: str | Path) -> Result:
    given = ["replay", files / path, "--zone", files / "world.zone", *arguments]
    result = CliRunner().invoke(cli, [*map(str, given)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_of_two_configurations_the_differences_are_told(files: Path) -> None:
    result = run(files, "mail", "--config", files / "a.toml", "--config", files / "b.toml")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "new/2:"
    assert lines[1] == "  action: accepted -> rejected"
    assert "  spf mail: continue spf_fail -> reject spf_fail" in lines
    assert any(line.startswith("  reply: 250 2.0.0 ") and " -> 550 5.7.23 SPF: " in line for line in lines)
    assert lines[-1] == "new/3: skipped, it does not say who sent it to whom: --ip, --mail-from, --rcpt"
    assert result.stderr == "3 replayed: 1 different, 1 skipped\n"


def test_two_configurations_that_say_the_same_differ_in_nothing(files: Path) -> None:
    result = run(files, "mail", "--config", files / "a.toml", "--config", files / "a.toml")
    assert result.exit_code == 0
    assert "different" not in result.stdout


def test_of_one_configuration_it_is_told_what_it_does(files: Path) -> None:
    result = run(files, "mail", "--config", files / "b.toml")
    assert result.exit_code == 0
    first, second, _ = result.stdout.splitlines()
    assert first.startswith("new/1: accepted (")
    assert second.startswith("new/2: rejected (spf spf_fail) 550 5.7.23 SPF: 192.0.2.7 is not permitted")


def test_what_a_message_does_not_say_can_be_given(files: Path) -> None:
    options = ("--ip", "192.0.2.9", "--mail-from", "", "--rcpt", "carl@example.org")
    result = run(files, "mail/new/3", "--config", files / "a.toml", *options, "--json")
    (outcome,) = json.loads(result.stdout)
    assert (outcome["name"], outcome["trouble"]) == ("3", "")
    assert outcome["said"][0]["action"] == "accepted"
    assert outcome["said"][0]["relay_guard rcpt carl@example.org"] == "continue"


def test_an_mbox_is_replayed_message_by_message(files: Path) -> None:
    box = mailbox.mbox(files / "box")
    for client in ("192.0.2.1", "192.0.2.7"):
        box.add(mailbox.mboxMessage(message_from_bytes(stored(client))))
    box.close()
    result = run(files, "box", "--config", files / "b.toml")
    assert [line.split(" (")[0] for line in result.stdout.splitlines()] == [
        "box:1: accepted",
        "box:2: rejected",
    ]


def test_a_recorded_decision_is_compared_with_what_it_says(files: Path) -> None:
    for config in (files / "a.toml", files / "b.toml"):
        config.write_text('policy.greylist.mode = "off"\n' + config.read_text())
    result = run(files, "mail/new/2", "--config", files / "a.toml", "--json")
    assert result.exit_code == 0
    explain = ["explain", str(files / "mail" / "new" / "2"), "--config", str(files / "a.toml"), "--json"]
    explain += ["--zone", str(files / "world.zone"), "--ip", "192.0.2.7", "--helo", "client.example"]
    explain += ["--mail-from", "ann@client.example", "--rcpt", "bob@example.org"]
    record = json.loads(CliRunner().invoke(cli, explain).stdout)["decision"]
    (files / "records").mkdir()
    (files / "records" / "1.json").write_text(json.dumps(record))
    (files / "records" / "2.json").write_text("[")
    same = run(files, "records", "--config", files / "a.toml")
    assert same.exit_code == 0, same.stdout
    assert "2.json: skipped, it is no JSON" in same.stdout
    other = run(files, "records", "--config", files / "b.toml")
    assert other.exit_code == 1
    assert "action: 'accepted' then, 'rejected' now" in other.stdout
    both = run(files, "records", "--config", files / "a.toml", "--config", files / "b.toml")
    assert "action: accepted -> rejected" in both.stdout


def test_three_configurations_are_too_many(files: Path) -> None:
    result = run(files, "mail", *(word for _ in range(3) for word in ("--config", files / "a.toml")))
    assert result.exit_code == 64


def test_a_stored_message_is_the_one_that_came() -> None:
    found = sent(Stored("x", stored("2001:db8::1")), "mx.example.org", Assumed())
    expected = Sent(
        "2001:db8::1", "client.example", "ann@client.example", ("bob@example.org",), MESSAGE, 1_700_000_000.0
    )
    assert found == expected


def test_a_received_field_of_another_host_says_nothing() -> None:
    with pytest.raises(ExplainError, match=r"whom: --ip$"):
        sent(Stored("x", stored()), "other.example.org", Assumed())


def test_a_mail_file_with_bare_lf_is_read_the_same() -> None:
    octets = stored().replace(b"\r\n", b"\n")
    assert sent(Stored("x", octets), "mx.example.org", Assumed()).octets == MESSAGE.replace(b"\r\n", b"\n")


@given(st.binary(max_size=300))
def test_any_file_is_a_message_or_is_told(octets: bytes) -> None:
    assumed = Assumed("192.0.2.1", "", "", ("bob@example.org",))
    assert sent(Stored("x", octets), "mx.example.org", assumed).octets == octets
    try:
        sent(Stored("x", octets), "mx.example.org", Assumed())
    except ExplainError:
        return
