"""Policies in a running gateway: one of a file, one of an installed wheel, quarantine, and starts that are stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import Reply
from tests.e2e.downstream import Downstream, Fault, Step
from tests.e2e.gateway import COMMAND, QUICK_RELAY, Config, Gateway, StartGateway, config_for, to_toml
from tests.e2e.net import LOOPBACK, wait_until

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: x\r\n\r\nHello\r\n"

WHEEL = """
    from gateway.api import AuthResult, Policy, Result, Transaction, Verdict, proceed

    class Colour(Policy):
        name = "colour"

        async def on_eom(self, tx: Transaction) -> Verdict:
            subject = tx.message.header.all(b"subject")[0].value.strip()
            return proceed(results=[AuthResult("x-colour", Result.PASS, reason=subject.decode())])
"""
FILE = """
    from gateway.api import Policy, Transaction, Verdict, proceed, quarantine

    class Taste(Policy):
        name = "taste"
        requires = ("colour",)

        async def on_eom(self, tx: Transaction) -> Verdict:
            colours = [found.reason for found in tx.results if found.method == "x-colour"]
            return quarantine("red") if colours == ["red"] else proceed(reason="known")
"""


def wheel(directory: Path, distribution: str, source: str, name: str, value: str) -> Path:
    """Install a distribution with one policy as a wheel is installed: its files are laid out in a directory."""
    module = distribution.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    built = directory / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr(f"{module}.py", textwrap.dedent(source))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[gateway.policies]\n{name} = {module}:{value}\n")
        archive.writestr(f"{info}/RECORD", "")
    site = directory / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    return site


def file(directory: Path, source: str = FILE) -> Path:
    path = directory / "taste.py"
    path.write_text(textwrap.dedent(source), "utf-8")
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where wheels of this test are installed; the gateway's processes see it."""
    site = wheel(tmp_path, "mxgate-colour", WHEEL, "colour", "Colour")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    return site


@pytest.fixture
def jail() -> Iterator[Downstream]:
    sink = Downstream()
    yield sink
    sink.close()


def policies(path: Path) -> Config:
    return {"policy": {"colour": {"mode": "enforce"}, "taste": {"file": str(path)}}}


def submit(gateway: Gateway, subject: str, *rcpts: str) -> Reply:
    with gateway.connect() as client:
        client.hello()
        return client.submit(
            SENDER, rcpts or ["b@example.org"], CONTENT.replace(b"x\r\n", f"{subject}\r\n".encode())
        )


@pytest.mark.usefixtures("site")
def test_a_policy_of_a_file_requires_one_of_a_wheel_and_judges_what_it_found(
    tmp_path: Path, sink: Downstream, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(sink.address, policies(file(tmp_path)))

    assert submit(gateway, "red").code == 250
    assert submit(gateway, "blue").code == 250

    red, blue = (message.content for message in sink.messages)
    for content, subject, quarantined in (
        (red, b"red", b"X-Mxgate-Quarantine: red\r\n"),
        (blue, b"blue", b""),
    ):
        above, _, _ = content.partition(b"Received: ")
        assert above.startswith(b"Authentication-Results: mx.example.org;")
        assert b'\tx-colour=pass reason="%b";\r\n' % subject in above
        assert above.endswith(b"\tdmarc=none header.from=client.example.net\r\n" + quarantined)
    counted = {"policy": "taste", "stage": "eom", "action": "quarantine"}
    wait_until(
        lambda: gateway.metric("mxgate_policy_decisions_total", **counted) == 1,
        within_s=10,
        what="the verdict in /metrics",
    )


@pytest.mark.usefixtures("site")
def test_quarantined_mail_goes_to_its_own_route_and_a_refusal_there_is_a_451(
    tmp_path: Path, sink: Downstream, jail: Downstream, start_gateway: StartGateway
) -> None:
    routes: Config = {
        "relay": {
            **QUICK_RELAY,
            "routes": [
                {"downstream": [f"{LOOPBACK}:{sink.address[1]}"]},
                {"name": "jail", "domains": [], "downstream": [f"{LOOPBACK}:{jail.address[1]}"]},
            ],
        },
        "quarantine": {"route": "jail"},
    }
    gateway = start_gateway(sink.address, {**policies(file(tmp_path)), **routes})

    assert submit(gateway, "red").code == 250
    assert (len(sink.messages), len(jail.messages)) == (0, 1)

    for step in (Step.MAIL, Step.RCPT, Step.DATA, Step.EOD):
        for fault in (Fault.PERMANENT, Fault.TRANSIENT, Fault.CLOSE):
            jail.behave({step: fault})
            reply = submit(gateway, "red")
            assert (reply.code, reply.enhanced) == (451, "4.3.0"), (step, fault)
            assert submit(gateway, "blue").code == 250, (
                "what the jail said is not remembered for the recipient"
            )
    assert not [message for message in sink.messages if b"X-Mxgate-Quarantine" in message.content]
    jail.behave()
    assert submit(gateway, "red").code == 250


# --- starts that are stopped --------------------------------------------------------------------------


def refused_start(directory: Path, downstream: Downstream, overrides: Config) -> str:
    """What a start says that ends with 78, and check-config too."""
    path = directory / "mxgate.toml"
    path.write_text(to_toml(config_for(downstream.address, overrides=overrides)), "utf-8")
    said = []
    for command in ("serve", "check-config", "plan"):
        done = subprocess.run(
            [COMMAND, command, "--config", str(path)], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 78, (command, done.stderr)
        said.append(done.stderr)
    return said[0]


def test_a_missing_requirement_stops_the_start(tmp_path: Path, sink: Downstream) -> None:
    said = refused_start(tmp_path, sink, {"policy": {"taste": {"file": str(file(tmp_path))}}})

    assert "policy.taste: needs policy colour, which is off or not installed" in said


@pytest.mark.usefixtures("site")
def test_a_name_that_is_offered_twice_stops_the_start(tmp_path: Path, sink: Downstream) -> None:
    path = file(tmp_path, FILE.replace('"taste"', '"colour"').replace('requires = ("colour",)', ""))

    said = refused_start(tmp_path, sink, {"policy": {"colour": {"file": str(path)}}})

    assert f"policy.colour: {path} and mxgate-colour 1.0 both offer a policy of this name" in said


@pytest.mark.usefixtures("site")
def test_two_wheels_with_one_name_stop_the_start(tmp_path: Path, sink: Downstream) -> None:
    wheel(tmp_path, "other-colour", WHEEL, "colour", "Colour")

    said = refused_start(tmp_path, sink, {"policy": {"colour": {"mode": "enforce"}}})

    assert "mxgate-colour 1.0" in said
    assert "other-colour 1.0" in said
    assert "both offer a policy of this name" in said


@pytest.mark.usefixtures("site")
def test_a_broken_file_stops_the_start_and_shows_its_authors_line(tmp_path: Path, sink: Downstream) -> None:
    path = file(tmp_path, FILE + "    1 / 0\n")

    said = refused_start(tmp_path, sink, policies(path))

    line = path.read_text("utf-8").splitlines().index("1 / 0") + 1
    assert f"policy.taste: cannot load it from {path}: {path}:{line}: 1 / 0: ZeroDivisionError" in said


@pytest.mark.usefixtures("site")
def test_a_policy_that_does_not_start_stops_the_start(tmp_path: Path, sink: Downstream) -> None:
    source = FILE + '        async def start(self):\n            raise OSError("no model")\n'
    path = tmp_path / "mxgate.toml"
    overrides = policies(file(tmp_path, source))
    path.write_text(to_toml(config_for(sink.address, overrides=overrides)), "utf-8")

    done = subprocess.run(
        [COMMAND, "serve", "--config", str(path)], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.returncode == 78
    assert '"event":"policy.start_failed"' in done.stderr
    assert "no model" in done.stderr


@pytest.mark.usefixtures("site")
def test_plan_prints_the_order(tmp_path: Path, sink: Downstream) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(to_toml(config_for(sink.address, overrides=policies(file(tmp_path)))), "utf-8")

    done = subprocess.run(
        [sys.executable, "-m", "gateway", "plan", "--json", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )

    plan = json.loads(done.stdout)
    assert plan["stages"]["eom"] == {
        "budget_s": 25.0,
        "ranks": [["dkim", "arc", "colour"], ["dmarc", "taste"]],
    }
    assert plan["stages"]["rcpt"]["ranks"] == [["relay_guard"], ["recipient"]]
    assert [each["source"] for each in plan["policies"][-2:]] == [
        "mxgate-colour 1.0",
        str(tmp_path / "taste.py"),
    ]
