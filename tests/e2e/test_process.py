"""The processes: draining, dying, and refusing to start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import Config, StartGateway, Value, config_for, is_running, run_mxgate, to_toml
from tests.e2e.net import Address, is_listening, wait_until

pytestmark = pytest.mark.e2e
full = pytest.mark.full

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: drain\r\n\r\nHello\r\n"
NOWHERE: Address = ("127.0.0.1", 9)
# sysexits.h EX_CONFIG, and EX_USAGE
EX_CONFIG = 78
EX_USAGE = 64


def begin_content(client: Client, rcpt: str) -> None:
    """A transaction in the middle of its content."""
    client.hello()
    assert [reply.code for reply in client.envelope(SENDER, [rcpt])] == [250, 250]
    assert client.command("DATA").code == 354
    client.send(CONTENT[:40])


# --- the end -------------------------------------------------------------------------------------------------


def test_finishes_the_message_that_it_receives_at_sigterm(
    start_gateway: StartGateway, sink: Downstream, rcpt: str
) -> None:
    gateway = start_gateway(sink.address)
    with gateway.connect() as client:
        begin_content(client, rcpt)
        gateway.terminate()
        wait_until(lambda: not is_listening(gateway.address), within_s=5, what="new connections are refused")
        assert gateway.process.poll() is None
        client.send(CONTENT[40:] + b".\r\n")
        assert client.read_reply().code == 250
    assert gateway.wait_exit() == 0
    assert [message.rcpts for message in sink.messages] == [(f"<{rcpt}>",)]
    assert sink.messages[0].content.endswith(CONTENT)


@full
def test_is_not_ready_while_it_drains(start_gateway: StartGateway, sink: Downstream, rcpt: str) -> None:
    gateway = start_gateway(sink.address)
    with gateway.connect() as client:
        begin_content(client, rcpt)
        gateway.terminate()
        wait_until(lambda: gateway.admin_status("/readyz") == 503, within_s=5, what="/readyz says 503")
        assert gateway.admin_status("/livez") == 200
        client.send(CONTENT[40:] + b".\r\n")
        assert client.read_reply().code == 250
    assert gateway.wait_exit() == 0


@full
def test_waits_for_the_downstreams_answer_at_sigterm(
    start_gateway: StartGateway, sink: Downstream, rcpt: str
) -> None:
    gateway = start_gateway(sink.address)
    sink.behave({Step.BODY: Fault.SLOW, Step.EOD: Fault.SLOW})
    with gateway.connect() as client:
        begin_content(client, rcpt)
        client.send(CONTENT[40:] + b"0123456789abcdef\r\n" * 5000 + b".\r\n")
        wait_until(lambda: "DATA" in sink.commands, within_s=5, what="the delivery begins")
        assert sink.dots == 0
        gateway.terminate()
        assert client.read_reply().code == 250
    assert gateway.wait_exit() == 0
    assert len(sink.messages) == 1


@full
def test_tells_an_idle_client_at_sigterm_that_it_goes(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address)
    with gateway.connect() as client:
        client.hello()
        gateway.terminate()
        reply = client.read_reply()
        assert (reply.code, reply.enhanced) == (421, "4.3.2")
        assert client.is_at_eof()
    assert gateway.wait_exit() == 0


def test_workers_end_when_the_supervisor_is_killed(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address)
    pids = gateway.worker_pids()
    assert pids
    gateway.process.send_signal(signal.SIGKILL)
    assert gateway.wait_exit() == -signal.SIGKILL
    wait_until(lambda: not any(map(is_running, pids)), within_s=10, what="the workers have ended")
    assert not is_listening(gateway.address)


@full
def test_serves_again_when_a_worker_was_killed(
    start_gateway: StartGateway, sink: Downstream, new_rcpt: Callable[[], str]
) -> None:
    gateway = start_gateway(sink.address)
    (worker,) = gateway.worker_pids()
    os.kill(worker, signal.SIGKILL)

    def is_served() -> bool:
        try:
            with gateway.connect() as client:
                client.hello()
                return client.submit(SENDER, [new_rcpt()], CONTENT).code == 250
        except OSError:
            return False

    wait_until(is_served, within_s=10, what="a new worker serves")
    assert worker not in gateway.worker_pids()
    # the log may tell what has happened, but it is no error of ours
    gateway.assert_clean_log()


# --- no start -------------------------------------------------------------------------------------------------


def broken(name: str, tmp_path: Path, tls: Tls) -> tuple[Config, str]:
    """An override that must keep the gateway from starting, and what the message has to name."""
    missing, garbage = tmp_path / "missing.pem", tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", encoding="ascii")
    files: dict[str, tuple[Path, Path, Path]] = {
        "certificate-missing": (missing, tls.key_file, missing),
        "certificate-garbage": (garbage, tls.key_file, garbage),
        "key-missing": (tls.cert_file, missing, missing),
        "key-garbage": (tls.cert_file, garbage, garbage),
    }
    if name in files:
        cert_file, key_file, culprit = files[name]
        section: dict[str, Value] = {"cert_file": str(cert_file), "key_file": str(key_file)}
        return {"server": {"tls": section}}, culprit.name
    others: dict[str, tuple[Config, str]] = {
        "spool-missing": ({"server": {"spool_dir": str(tmp_path / "no-spool")}}, "no-spool"),
        "spool-is-a-file": ({"server": {"spool_dir": str(garbage)}}, garbage.name),
        "no-domains": ({"relay": {"domains": []}}, "domains"),
        "no-routes": ({"relay": {"routes": []}}, "routes"),
        "relay-guard-off": ({"policy": {"relay_guard": {"mode": "off"}}}, "relay_guard"),
        "unknown-policy": ({"policy": {"nonesuch": {"mode": "enforce"}}}, "nonesuch"),
        "tls-listener-without-certificate": ({"server": {"listen_tls": ["127.0.0.1:20465"]}}, "listen_tls"),
    }
    return others[name]


NAMES = [
    *("certificate-missing", "certificate-garbage", "key-missing", "key-garbage", "spool-missing"),
    *("spool-is-a-file", "no-domains", "no-routes", "relay-guard-off", "unknown-policy"),
    "tls-listener-without-certificate",
]
QUICK = {"certificate-missing", "spool-missing", "no-domains"}


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=full) for name in NAMES]
)
def test_refuses_to_start(name: str, command: str, tmp_path: Path, tls: Tls) -> None:
    overrides, culprit = broken(name, tmp_path, tls)
    file = tmp_path / "mxgate.toml"
    file.write_text(to_toml(config_for(NOWHERE, overrides=overrides)), encoding="utf-8")
    done = run_mxgate(command, "--config", str(file))
    assert done.returncode == EX_CONFIG, done
    assert culprit in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def write_config(tmp_path: Path, old: str, new: str) -> tuple[Path, int]:
    """A sound configuration in which `old` became `new`; the file, and the number of that line."""
    text = to_toml(config_for(NOWHERE))
    assert text.count(old) == 1
    text = text.replace(old, new)
    file = tmp_path / "mxgate.toml"
    file.write_text(text, encoding="utf-8")
    return file, text[: text.index(new)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("\ndomains = [", "\ndomans = [", "domains"),
        ('hostname = "mx', 'hostnam = "mx', "hostname"),
        ("[admin]", "[admni]", "admin"),
        ('hostname = "mx.example.org"', 'hostname = "mx..example.org"', "server.hostname"),
        ('hostname = "mx.example.org"', "hostname = 5", "server.hostname"),
        ('hostname = "mx.example.org"', 'hostname = "mx.example.org', ""),
    ],
    ids=["unknown-key", "unknown-server-key", "unknown-table", "bad-value", "bad-type", "no-toml"],
)
def test_check_config_points_at_the_line(old: str, new: str, named: str, tmp_path: Path) -> None:
    # a mistake that begins with a line end is on the next line
    file, line = write_config(tmp_path, old, new)
    line += new.startswith("\n")
    done = run_mxgate("check-config", "--config", str(file))
    assert done.returncode == EX_CONFIG, done
    output = done.stdout + done.stderr
    assert f"{file}:{line}" in output or f"line {line}" in output, output
    assert named in output


def test_check_config_is_content_with_a_sound_file(tmp_path: Path) -> None:
    file, _ = write_config(tmp_path, "[admin]", "[admin]")
    done = run_mxgate("check-config", "--config", str(file))
    assert done.returncode == 0, done


@full
def test_refuses_a_missing_file(tmp_path: Path) -> None:
    done = run_mxgate("serve", "--config", str(tmp_path / "missing.toml"))
    assert done.returncode == EX_CONFIG, done
    assert "missing.toml" in done.stderr


@full
def test_refuses_wrong_usage() -> None:
    assert run_mxgate("serve", "--no-such-option").returncode == EX_USAGE
