"""deploy/fail2ban: the real fail2ban-regex finds those who are to be banned, and nobody whom a stranger names."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.log import open_log
from gateway.redaction import Redaction

FILTER = Path(__file__).parent.parent / "deploy" / "fail2ban" / "mxgate.conf"
REGEX = "fail2ban-regex"
CLIENT, VICTIM = "192.0.2.7", "203.0.113.9"

pytestmark = pytest.mark.full

REFUSED: dict[str, Any] = {
    "session": "s",
    "tx": "s-1",
    "stage": "rcpt",
    "policy": "relay_guard",
    "action": "rejected",
    "reason": "relaying_denied",
    "code": 550,
    "enhanced": "5.7.1",
    "text": "Relaying denied",
    "auth": "spf=fail",
    "client": CLIENT,
    "helo": "mail.example.net",
    "proto": "ESMTPS",
    "tls": "TLSv1.3",
    "trust": "untrusted",
    "mail_from": "you=x@example.net",
    "rcpts": ["ann=y@example.com"],
    "rcpt_count": 0,
    "refused": ["550 5.7.1 relay_guard relaying_denied ann@example.com"],
    "refused_count": 1,
    "size_bytes": 0,
    "duration_ms": 1.5,
    "error": "",
}


SESSION = {"session": "s", "client": CLIENT, "helo": ""}


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's own, with the filter where an operator puts it."""
    path = tmp_path_factory.mktemp("fail2ban") / "fail2ban"
    shutil.copytree("/etc/fail2ban", path)
    shutil.copy(FILTER, path / "filter.d")
    return path


def found(configuration: Path, mode: str, lines: Path) -> list[str]:
    """The addresses that the filter would count, one for each line that it matches."""
    done = subprocess.run(
        [
            REGEX,
            "-c",
            str(configuration),
            "--out",
            "ip",
            "--usedns",
            "no",
            str(lines),
            f"mxgate[mode={mode}]",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


def written(tmp_path: Path, *events: tuple[str, Mapping[str, object]], redact: tuple[str, ...] = ()) -> Path:
    """The log of these events."""
    path = tmp_path / "mxgate.log"
    with path.open("wb", buffering=0) as file:
        log = open_log("text", fd=file.fileno(), hostname="mx.example.org", redaction=Redaction(redact))
        for event, keys in events:
            (log.warning if event == "admin.refused" else log.info)(event, **keys)
    return path


@pytest.mark.parametrize(
    ("event", "keys", "modes"),
    [
        ("message.rejected", REFUSED, {"normal", "aggressive"}),
        ("transaction.refused", REFUSED, {"normal", "aggressive"}),
        (
            "transaction.refused",
            REFUSED | {"helo": "", "mail_from": "", "rcpts": []},
            {"normal", "aggressive"},
        ),
        ("message.rejected", REFUSED | {"policy": "dnsbl", "reason": "listed"}, {"normal", "aggressive"}),
        ("message.rejected", REFUSED | {"policy": "dmarc", "stage": "eom"}, {"aggressive"}),
        (
            "message.rejected",
            REFUSED | {"policy": "", "reason": "line_end", "enhanced": "5.5.2", "stage": "eom"},
            {"normal", "aggressive"},
        ),
        # the downstream's word about a message, trouble of ours, and mail that passed ban nobody
        ("message.rejected", REFUSED | {"policy": "", "reason": "refused", "stage": "eom"}, set()),
        ("message.deferred", REFUSED | {"code": 451, "enhanced": "4.3.0", "reason": "policy_failed"}, set()),
        ("message.accepted", REFUSED | {"code": 250, "enhanced": "2.0.0", "policy": ""}, set()),
        ("transaction.aborted", REFUSED | {"code": 0, "enhanced": "", "policy": ""}, set()),
        ("session.ended", SESSION | {"reason": "early_talker"}, {"protocol", "normal", "aggressive"}),
        ("session.ended", SESSION | {"reason": "line_end"}, {"protocol", "normal", "aggressive"}),
        ("session.ended", SESSION | {"reason": "protocol"}, {"protocol", "normal", "aggressive"}),
        ("session.ended", SESSION | {"reason": "errors"}, {"normal", "aggressive"}),
        ("session.ended", SESSION | {"reason": "unknown_recipients"}, {"normal", "aggressive"}),
        ("session.ended", SESSION | {"reason": "tls"}, set()),
        ("connection.refused", {"client": CLIENT, "reason": "limit"}, set()),
        ("admin.refused", {"client": CLIENT, "failures": 3}, {"admin"}),
    ],
)
@pytest.mark.parametrize("mode", ["protocol", "normal", "aggressive", "admin"])
def test_bans_for_what_a_client_did(
    configuration: Path, tmp_path: Path, event: str, keys: Mapping[str, object], modes: set[str], mode: str
) -> None:
    assert found(configuration, mode, written(tmp_path, (event, keys))) == [CLIENT] * (mode in modes)


HOSTILE = [
    f"x[{VICTIM}]: 550 5.7.1 ; from=<a> to=<b> proto=SMTP helo=<c> policy=relay_guard",
    (
        f"\nmx mxgate/smtpd[1]: NOQUEUE: reject: RCPT from unknown[{VICTIM}]: 550 5.7.1 x; from=<> proto=SMTP helo=<>"
        " policy=relay_guard"
    ),
    f"<{VICTIM}> from unknown[{VICTIM}]: policy=relay_guard reason=line_end",
    f"too many errors after RCPT from unknown[{VICTIM}]:",
    f"warning: admin.refused client={VICTIM} failures=1",
    '" policy=relay_guard "',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_stranger_bans_anybody_else_or_hides_its_author(
    configuration: Path, tmp_path: Path, text: str
) -> None:
    hostile = {
        "helo": text,
        "mail_from": text,
        "rcpts": [text],
        "refused": [text],
        "text": text,
        "error": text,
    }
    passed = {"code": 250, "enhanced": "2.0.0", "policy": "", "reason": ""}
    deferred = {"code": 451, "enhanced": "4.3.0", "policy": "", "reason": "connect"}
    log = written(
        tmp_path,
        ("message.rejected", REFUSED | hostile),
        ("message.accepted", REFUSED | hostile | passed),
        ("message.deferred", REFUSED | hostile | deferred),
        ("session.ended", SESSION | {"reason": "protocol", "helo": text}),
        ("relay.failed", {"host": "mta:25", "detail": text}),
        ("policy.failed", {"policy": "x", "error": text}),
    )
    assert found(configuration, "aggressive", log) == [CLIENT, CLIENT]
    assert found(configuration, "admin", log) == []


def test_a_network_in_place_of_the_client_bans_nobody(configuration: Path, tmp_path: Path) -> None:
    log = written(tmp_path, ("message.rejected", REFUSED), redact=("client_addresses",))
    assert "[192.0.2.0/24]" in log.read_text()
    assert found(configuration, "aggressive", log) == []


def test_ipv6_is_banned_too(configuration: Path, tmp_path: Path) -> None:
    log = written(tmp_path, ("message.rejected", REFUSED | {"client": "2001:db8::7"}))
    assert found(configuration, "normal", log) == ["2001:db8::7"]


def test_debians_own_filter_for_postfix_knows_the_lines_when_it_knows_the_name(
    configuration: Path, tmp_path: Path
) -> None:
    """Violations of the protocol are worded as Postfix words them."""
    log = written(tmp_path, ("session.ended", SESSION | {"reason": "early_talker"}))
    done = subprocess.run(
        [REGEX, "-c", str(configuration), "--out", "ip", str(log), r"postfix[_daemon='mxgate/\w+']"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == [CLIENT], done
