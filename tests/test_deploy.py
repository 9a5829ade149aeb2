"""What runs it on a machine of one's own: the unit, its user, its directories."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gateway
from deploy.generate import generated
from gateway.activation import SocketName
from gateway.app import EXIT_CONFIG
from gateway.config import load
from gateway.config.model import Server
from gateway.plugins import plan
from tests.chart.chartkit import helm
from tests.e2e.machine import require
from tests.test_docs import blocks

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "mxgate.service"
SOCKET = DEPLOY / "mxgate.socket"
# `systemd-analyze security`: 0 is nothing, 10 is everything
MAX_EXPOSURE = 2.5


def settings(section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]  # names are case-sensitive
    parser.read(UNIT)
    return dict(parser[section])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty system that has the two files where packages put them."""
    for kind in ("sysusers", "tmpfiles"):
        directory = tmp_path / "usr" / "lib" / f"{kind}.d"
        directory.mkdir(parents=True)
        shutil.copy(DEPLOY / f"mxgate.{kind}", directory / "mxgate.conf")
    (tmp_path / "etc").mkdir()
    return tmp_path


def test_the_unit_is_hardly_exposed() -> None:
    require(program="systemd-analyze")
    command = ["systemd-analyze", "security", "--offline=true", "--json=short", "--no-pager", str(UNIT)]
    judged = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # what it finds weak, in tenths, each with its share of 10 as the command sums it up
    command.remove("--json=short")
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exposure = re.search(r"Overall exposure level for mxgate.service: ([0-9.]+)", text)
    assert exposure
    weak = [each["json_field"] for each in judged if not each["set"]]
    assert float(exposure[1]) < MAX_EXPOSURE, weak


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    require(program="systemd-analyze")
    # the program is there only where it was installed
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/mxgate/bin/mxgate", "/bin/true"))
    units = [str(unit), shutil.copy(SOCKET, tmp_path)]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_sockets_are_those_that_the_gateway_takes() -> None:
    text = SOCKET.read_text()
    (name,) = re.findall(r"^FileDescriptorName=(.*)$", text, re.MULTILINE)
    assert SocketName(name) is SocketName.SMTP
    # one socket for both families would show clients of IPv4 with addresses of IPv6
    assert "\nBindIPv6Only=ipv6-only\n" in text
    assert re.findall(r"^ListenStream=(.*)$", text, re.MULTILINE) == ["0.0.0.0:25", "[::]:25"]


@pytest.mark.parametrize("name", sorted(generated()))
def test_is_what_dev_manual_would_write(name: str) -> None:
    assert (DEPLOY / name).read_text("utf-8") == generated()[name]


@pytest.mark.parametrize("page", ["mxgate.1", "mxgate.toml.5"])
def test_groff_has_nothing_to_say_about_the_manual(page: str) -> None:
    require(program="groff")
    words = ["groff", "-ww", "-man", "-Tutf8", "-P-cbou", str(DEPLOY / "man" / page)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    if page == "mxgate.1":
        for name in ("serve", "check-config", "greylist allow", "dmarc"):
            assert f"mxgate {name} [OPTIONS]" in shown
        assert "--config FILE" in shown
    else:
        for key in Server.model_fields:
            assert key in shown, key


def test_bash_completes_commands_and_options() -> None:
    require(program="bash")
    script = (
        f"source {DEPLOY}/completion/mxgate.bash; COMP_WORDS=($WORDS); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_mxgate_completion mxgate; printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def completed(words: str) -> list[str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "WORDS": words}
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("mxgate che") == ["check-config"]
    assert completed("mxgate greylist al") == ["allow"]
    assert "--mail-from" in completed("mxgate spf --")


def test_is_not_started_again_with_a_wrong_configuration() -> None:
    service = settings("Service")
    assert service["Restart"] == "on-failure"
    assert str(EXIT_CONFIG) in service["RestartPreventExitStatus"].split()


def test_systemd_waits_longer_than_the_drain() -> None:
    drain_s = Server.model_fields["drain_timeout_s"].default
    assert int(settings("Service")["TimeoutStopSec"]) >= drain_s + 15


def test_the_configuration_is_for_the_gateway_to_read_and_for_root_to_write(root: Path) -> None:
    require(program="systemd-sysusers", root=True)
    require(program="systemd-tmpfiles", root=True)
    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create"]):
        subprocess.run([*command, f"--root={root}", "mxgate.conf"], capture_output=True, check=True)
    _, _, _, gid, _, _, shell = (root / "etc" / "passwd").read_text().strip().split(":")
    assert shell == "/usr/sbin/nologin"
    for directory in (root / "etc" / "mxgate", root / "etc" / "mxgate" / "tls"):
        state = directory.stat()
        assert (state.st_uid, state.st_gid, state.st_mode & 0o777) == (0, int(gid), 0o750)


def test_every_example_of_a_route_is_accepted(tmp_path: Path) -> None:
    examples = blocks((ROOT / "docs" / "install.md").read_text("utf-8"), "toml")
    assert len(examples) == 4
    for example in examples:
        file = tmp_path / "mxgate.toml"
        file.write_text(f'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n{example}')
        assert load(file, environ={}).relay.routes


def test_every_configuration_of_who_comes_from_elsewhere_is_accepted(tmp_path: Path) -> None:
    examples = blocks((ROOT / "docs" / "migrate.md").read_text("utf-8"), "toml")
    assert len(examples) == 2
    for example in examples:
        file = tmp_path / "mxgate.toml"
        file.write_text(f'auth.authserv_id = "mx.example.org"\nstate.url = "memory:"\n{example}')
        config = load(file, environ={})
        assert plan(config)
        # the example has no setting that its policy does not know
        assert config.relay.routes


def test_every_example_of_values_is_accepted(tmp_path: Path) -> None:
    examples = blocks((ROOT / "docs" / "kubernetes.md").read_text("utf-8"), "yaml")
    examples += blocks((ROOT / "helm" / "mxgate" / "README.md").read_text("utf-8"), "yaml")
    assert len(examples) == 5
    for example in examples:
        file = tmp_path / "values.yaml"
        file.write_text(example)
        assert "kind: Deployment" in helm("template", "--values", str(file))


def test_documents_and_image_have_the_version() -> None:
    for name in ("deploy/Dockerfile", "docs/deploy.md", "docs/install.md", "docs/kubernetes.md"):
        found = set(re.findall(r"(?:VERSION=|mxgate[:-])([0-9]+\.[0-9]+\.[0-9]+)", (ROOT / name).read_text()))
        assert found == {gateway.__version__}, name
