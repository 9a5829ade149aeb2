"""commands: one check from the shell says what was found, what it went by, and tells scripts by its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gateway.cli import Given
from gateway.errors import GatewayError
from policies.commands import arc, dkim, dmarc, spf
from tests.mailkit import compose, dkim_sign, ed25519_key, rsa_key, seal, txt_line, zone_text

AUTHOR, LIST = rsa_key("author.example"), ed25519_key("list.example")
SIGNED = dkim_sign(compose(), AUTHOR)


@pytest.fixture(autouse=True)
def no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MXGATE_CONFIG", raising=False)
    monkeypatch.setattr("gateway.cli.DEFAULT_CONFIG", str(tmp_path / "none.toml"))


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    file = tmp_path / "zone"
    file.write_text(
        zone_text(AUTHOR, LIST)
        + txt_line("author.example", "v=spf1 ip4:192.0.2.0/24 -all")
        + txt_line("broken.example", "v=spf1 nonsense:")
        + txt_line("_dmarc.author.example", "v=DMARC1; p=reject")
    )
    return file


def run(command: click.Command, *arguments: str | Path, stdin: bytes | None = None) -> Result:
    runner = CliRunner()
    result = runner.invoke(command, [*map(str, arguments)], obj=Given(), input=stdin, standalone_mode=False)
    assert result.exception is None or isinstance(result.exception, click.UsageError), result.exception
    return result


def told(result: Result) -> Any:
    return json.loads(result.stdout)


def found(result: Result) -> list[str]:
    return [f"{each['method']}={each['result']}" for each in told(result)["results"]]


@pytest.mark.parametrize(
    ("ip", "mail_from", "word", "code"),
    [
        ("192.0.2.1", "a@author.example", "pass", 0),
        ("::ffff:192.0.2.1", "<a@author.example>", "pass", 0),
        ("198.51.100.1", "a@author.example", "fail", 1),
        ("192.0.2.1", "a@broken.example", "permerror", 1),
        ("192.0.2.1", "a@nothing.example", "none", 0),
    ],
)
def test_spf_of_a_client(zone: Path, ip: str, mail_from: str, word: str, code: int) -> None:
    result = run(spf, "--ip", ip, "--mail-from", mail_from, "--helo", "x.example", "--zone", zone, "--json")
    assert (found(result), result.return_value) == ([f"spf={word}"], code)
    assert told(result)["results"][0]["properties"] == [["smtp.mailfrom", mail_from.strip("<>")]]
    assert told(result)["evidence"]
    assert told(result)["dns"][0]["rrtype"] == "TXT"


def test_spf_of_the_helo_where_there_is_no_reverse_path(zone: Path) -> None:
    result = run(spf, "--ip", "192.0.2.1", "--helo", "author.example", "--zone", zone)
    assert result.return_value == 0
    assert result.stdout.startswith("spf=pass smtp.helo=author.example\n")
    assert "    author.example TXT\n            v=spf1 ip4:192.0.2.0/24 -all\n" in result.stdout


def test_dkim_of_a_message(zone: Path, tmp_path: Path) -> None:
    mail = tmp_path / "mail.eml"
    mail.write_bytes(SIGNED)
    good = run(dkim, mail, "--zone", zone, "--json")
    assert (found(good), good.return_value) == (["dkim=pass"], 0)
    # a mail file has other line ends, and the same signature
    unix = run(dkim, "-", "--zone", zone, "--json", stdin=SIGNED.replace(b"\r\n", b"\n"))
    assert (found(unix), unix.return_value) == (["dkim=pass"], 0)
    changed = run(dkim, "-", "--zone", zone, stdin=SIGNED + b"More.\r\n")
    assert changed.return_value == 1
    assert "dkim=fail" in changed.stdout
    assert "changed since it was signed" in changed.stdout
    none = run(dkim, "-", "--zone", zone, "--json", stdin=compose())
    assert (found(none), none.return_value) == (["dkim=none"], 0)


@pytest.mark.parametrize("octets", [b"A: b\r\n\r\na\nb\r\n", b" a continuation first\r\n\r\n"])
def test_a_message_that_a_session_would_refuse_is_told(zone: Path, octets: bytes) -> None:
    with pytest.raises(GatewayError, match="would be refused"):
        CliRunner().invoke(
            dkim,
            ["-", "--zone", str(zone)],
            obj=Given(),
            input=octets,
            standalone_mode=False,
            catch_exceptions=False,
        )


def test_a_message_without_a_body_has_signatures_too(zone: Path) -> None:
    header = SIGNED.partition(b"\r\n\r\n")[0] + b"\r\n"
    assert found(run(dkim, "-", "--zone", zone, "--json", stdin=header)) == ["dkim=fail"]
    assert found(run(dkim, "-", "--zone", zone, "--json", stdin=b"")) == ["dkim=none"]


def test_dkim_of_a_large_body_in_blocks(zone: Path) -> None:
    large = dkim_sign(compose(body="A line that is rather long.\r\n" * 20_000), AUTHOR)
    assert found(run(dkim, "-", "--zone", zone, "--json", stdin=large)) == ["dkim=pass"]


def test_arc_of_a_message(zone: Path) -> None:
    sealed = seal(SIGNED, LIST, "mx.list.example; dkim=pass header.d=author.example")
    good = run(arc, "-", "--zone", zone, "--json", stdin=sealed)
    assert (found(good), good.return_value) == (["arc=pass"], 0)
    changed = run(arc, "-", "--zone", zone, "--json", stdin=sealed + b"footer\r\n")
    assert (found(changed), changed.return_value) == (["arc=fail"], 1)


@pytest.mark.parametrize(
    ("arguments", "word", "code"),
    [
        ((), "fail", 0),  # the policy is told; that nobody has authenticated anything is no finding
        (("--dkim", "author.example"), "pass", 0),
        (("--spf", "mail.author.example"), "pass", 0),
        (("--spf", "mail.author.example", "--psl"), "pass", 0),
        (("--spf", "other.example"), "fail", 1),
    ],
)
def test_dmarc_of_a_domain(zone: Path, arguments: tuple[str, ...], word: str, code: int) -> None:
    result = run(dmarc, "author.example", *arguments, "--zone", zone, "--json")
    assert (found(result), result.return_value) == ([f"dmarc={word}"], code)
    assert ["policy.dmarc", "reject"] in told(result)["results"][0]["properties"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (spf, ["--ip", "nonsense", "--mail-from", "a@b.example"]),
        (spf, ["--ip", "192.0.2.1"]),
        (spf, ["--mail-from", "a@b.example"]),
        (dkim, []),
        (dkim, ["/nonexistent"]),
        (arc, ["-", "--zone", "/nonexistent"]),
        (dmarc, ["a..example"]),
        (dmarc, ["a.example", "--spf", "-"]),
    ],
)
def test_wrong_usage_is_told(command: click.Command, arguments: list[str]) -> None:
    assert isinstance(run(command, *arguments).exception, click.UsageError)


def test_text_of_strangers_drives_no_terminal(zone: Path) -> None:
    zone.write_text('evil.example. 60 IN TXT "v=spf1 exp=\\027[31m -all"\n')
    result = run(spf, "--ip", "192.0.2.1", "--mail-from", "\x1b[31m@evil.example", "--zone", zone)
    assert all(line.isprintable() for line in result.stdout.splitlines())
