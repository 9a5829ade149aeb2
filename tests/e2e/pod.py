"""A pod of the chart on this machine: what kubelet would do with its container, its volumes and its Secrets.

The container's command, environment, user and mounts are those that helm renders. Only where it listens is changed, by
`MXGATE__...` variables as `extraEnv` would: a test needs free ports.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chart.chartkit import CHART, Object, container, one, pod, render
from tests.e2e.certificates import Tls
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import COMMAND
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

TOKEN = "a-token-of-16-characters"
CONTENT = b"From: <sender@client.example.net>\r\nSubject: pod\r\n\r\nHello\r\n"
_POLICY = '''"""Refuses nobody."""

from gateway.api import Policy, Session, Verdict, proceed


class Taste(Policy):
    name = "taste"

    async def on_connect(self, session: Session) -> Verdict:
        return proceed()
'''
# Secret -> key -> value
Secrets = Mapping[str, Mapping[str, bytes]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start: the container's own keys, its environment, and the directory behind each of its mounts."""

    container: Mapping[str, Any]
    user: int
    environment: Mapping[str, str]
    mounts: Mapping[str, Path]


Start = Callable[[Plan, Path], subprocess.Popen[bytes]]
"""Starts what a plan says and writes its output to a file."""


def objects_for(downstream: Address, *settings: str) -> Sequence[Object]:
    """The chart with a certificate, a token and a policy in a file, in front of one downstream."""
    return render(
        "minimal",
        f'config.relay.routes=[{{"downstream": ["{downstream[0]}:{downstream[1]}"]}}]',
        'tls.existingSecret="mx"',
        'admin.existingSecret="admin"',
        'config.policy={"taste": {"file": "/etc/mxgate/policies/taste.py"}, "greylist": {"mode": "off"}}',
        f"policies.files={json.dumps({'taste.py': _POLICY})}",
        *settings,
    )


def secrets_for(tls: Tls) -> Secrets:
    """The Secrets that `objects_for` names."""
    return {
        "mx": {"tls.crt": tls.cert_file.read_bytes(), "tls.key": tls.key_file.read_bytes()},
        "admin": {"token": TOKEN.encode()},
    }


@dataclass
class Pod:
    """One container that runs, from construction to `close`."""

    objects: Sequence[Object]
    secrets: Secrets
    directory: Path
    start: Start
    address: Address = field(default_factory=lambda: (LOOPBACK, free_port()))
    admin: Address = field(default_factory=lambda: (LOOPBACK, free_port()))

    def __post_init__(self) -> None:
        spec = container(self.objects)
        own = {
            "MXGATE__SERVER__LISTEN": f'["{self.address[0]}:{self.address[1]}"]',
            "MXGATE__ADMIN__LISTEN": f"{self.admin[0]}:{self.admin[1]}",
        }
        plan = Plan(
            spec,
            pod(self.objects)["securityContext"]["runAsUser"],
            {**{each["name"]: each["value"] for each in spec["env"]}, **own},
            self._mounts(),
        )
        self._log = self.directory / "log"
        self.process = self.start(plan, self._log)
        self.await_ready()

    def await_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log()
            return self.get("/readyz")[0] == 200

        wait_until(is_ready, within_s=60, what="/readyz answers 200")

    def update(self, volume: str, files: Mapping[str, bytes]) -> None:
        """A new content of the ConfigMap or the Secret of a volume."""
        _put(self.directory / volume, files)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and body of a page of the admin port; 0 when nobody answers."""
        url = f"http://{self.admin[0]}:{self.admin[1]}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, ""
        except OSError:
            return 0, ""

    def log(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def gateway_pid(self) -> int:
        """The supervisor: the one that was started, or the one that is in the container that was."""
        return next(
            pid
            for pid in _with_descendants(self.process.pid)
            if _command_line(pid).endswith(" serve") and "python" in _command_line(pid)
        )

    def close(self) -> None:
        """End it without any check."""
        if self.process.poll() is None:
            for pid in _with_descendants(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def _mounts(self) -> dict[str, Path]:
        directories = {each["name"]: self._volume(each) for each in pod(self.objects)["volumes"]}
        return {
            each["mountPath"]: directories[each["name"]] for each in container(self.objects)["volumeMounts"]
        }

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        directory = self.directory / str(volume["name"])
        directory.mkdir()
        match volume:
            case {"configMap": {"name": name}}:
                files = {k: v.encode() for k, v in one(self.objects, "ConfigMap", name)["data"].items()}
            case {"secret": {"secretName": name, "items": items}}:
                files = {each["path"]: self.secrets[name][each["key"]] for each in items}
            case {"secret": {"secretName": name}}:
                files = dict(self.secrets[name])
            case _:
                files = {}
                directory.chmod(0o777)
        if files:
            _put(directory, files)
        return directory


def _put(volume: Path, files: Mapping[str, bytes]) -> None:
    """Write a volume's files as kubelet does: links through `..data`, a link that a rename replaces."""
    data = Path(tempfile.mkdtemp(prefix="..", dir=volume))
    data.chmod(0o755)
    for name, content in files.items():
        (data / name).write_bytes(content)
    following = volume / "..data_tmp"
    following.symlink_to(data.name)
    following.rename(volume / "..data")
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")


def start_by_hand(plan: Plan, log: Path) -> subprocess.Popen[bytes]:
    """The program of this checkout; paths of mounts are replaced with those of the directories behind them."""
    paths = re.compile("|".join(sorted(map(re.escape, plan.mounts), key=len, reverse=True)))

    def here(text: str) -> str:
        return paths.sub(lambda found: str(plan.mounts[found[0]]), text)

    config = plan.mounts["/etc/mxgate/config"] / "mxgate.json"
    config.write_text(here(config.read_text()))
    environment = {name: here(value) for name, value in plan.environment.items()}
    environment["TMPDIR"] = str(plan.mounts["/tmp"])
    environment["MXGATE__STATE__URL"] = f"sqlite://{plan.mounts['/var/lib/mxgate']}/state.db"
    with log.open("wb") as output:
        return subprocess.Popen(
            [COMMAND, *plan.container["args"]],
            env={"PATH": os.defpath, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def assert_serves(running: Pod, sink: Downstream, tls: Tls) -> None:
    """Mail flows under TLS, the probes answer, `/api` asks for the token, and the chart's own test passes."""
    with Client(running.address) as client:
        client.hello()
        assert client.command("STARTTLS").code == 220
        client.start_tls(tls.trusting)
        client.command("EHLO client.example.net")
        reply = client.submit("sender@client.example.net", ["user@example.org"], CONTENT)
        assert reply.code == 250, running.log()
    assert sink.messages[-1].content.endswith(CONTENT)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert running.get(container(running.objects)[probe]["httpGet"]["path"])[0] == 200
    # as from outside: through a proxy
    assert running.get("/api/v1/status", Forwarded="for=192.0.2.1")[0] == 401
    shown = {"Authorization": f"Bearer {TOKEN}", "Forwarded": "for=192.0.2.1"}
    assert running.get("/api/v1/status", **shown)[0] == 200
    script = CHART / "files" / "smtp_test.py"
    url = f"http://{running.admin[0]}:{running.admin[1]}/readyz"
    words = [sys.executable, str(script), f"{running.address[0]}:{running.address[1]}", url]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RCPT for a stranger's domain: 550" in done.stdout


def assert_drains(running: Pod, sink: Downstream) -> None:
    """A message whose client is in the middle of it at SIGTERM is delivered and confirmed; then it ends with 0."""
    before = len(sink.messages)
    with Client(running.address) as client:
        client.hello()
        client.envelope("sender@client.example.net", ["user@example.org"])
        assert client.command("DATA").code == 354
        client.send(CONTENT)
        os.kill(running.gateway_pid(), signal.SIGTERM)
        wait_until(lambda: running.get("/readyz")[0] == 503, within_s=10, what="/readyz says that it drains")
        client.send(b".\r\n")
        assert client.read_reply().code == 250
    assert len(sink.messages) == before + 1
    assert running.process.wait(timeout=30) == 0, running.log()
    assert "Traceback" not in running.log()


def _with_descendants(pid: int) -> Sequence[int]:
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
