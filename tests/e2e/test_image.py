"""The image of deploy/Dockerfile, built without a daemon on a base that debootstrap makes, and run as the chart's pod.

Takes minutes. What cannot be had here, the base image of Docker's library, is replaced with Debian's own Python. A
builder in a chroot cannot mount the root read-only: that nothing but the volumes can be written follows from the user.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import gateway
from tests.chart.chartkit import CI, configuration, one, render
from tests.chart.chartkit import container as chart_container
from tests.e2e.certificates import Tls
from tests.e2e.downstream import Downstream
from tests.e2e.machine import require
from tests.e2e.pod import Plan, Pod, assert_drains, assert_serves, objects_for, secrets_for

# timeout: the first test waits for the image
pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SUITE, PYTHON = "bookworm", "3.11"
BASE, IMAGE = "localhost/base", "localhost/mxgate"


@dataclass(frozen=True, slots=True)
class Store:
    """Images and containers of buildah below a directory of the tests'."""

    directory: Path

    def command(self, *words: str | Path) -> list[str]:
        where = [
            "--root",
            self.directory / "store",
            "--runroot",
            self.directory / "run",
            "--storage-driver",
            "vfs",
        ]
        return ["buildah", *map(str, where), *map(str, words)]

    def __call__(self, *words: str | Path) -> str:
        """What a command that has to succeed prints."""
        done = subprocess.run(self.command(*words), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def run(self, container: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command that runs a program in a container."""
        return self.command("run", "--isolation", "chroot", *options, container, "--", *words)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with the base image and, built on that, the gateway's."""
    for program in ("buildah", "debootstrap"):
        require(program=program, root=True)
    directory = tmp_path_factory.mktemp("image")
    store = Store(directory)
    _make_base(store)
    _build(store)
    yield store
    # gigabytes, which pytest would keep
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def container(store: Store) -> Iterator[str]:
    name = store("from", "--pull-never", IMAGE)
    yield name
    store("rm", name)


@pytest.fixture
def running(store: Store, container: str, sink: Downstream, tls: Tls, tmp_path: Path) -> Iterator[Pod]:
    # pytest's directories are for the user of the tests alone, the mounts for that of the pod
    start = partial(_start_in_container, store, container)
    pod = Pod(objects_for(sink.address), secrets_for(tls), tmp_path, start)
    yield pod
    pod.close()


def test_serves_and_drains_as_the_charts_pod(running: Pod, sink: Downstream, tls: Tls) -> None:
    assert_serves(running, sink, tls)
    assert_drains(running, sink)


def test_has_the_version_and_its_policies(store: Store, container: str) -> None:
    done = subprocess.run(
        store.run(container, "mxgate", "version"), capture_output=True, text=True, check=True
    )
    assert f"mxgate {gateway.__version__} (Python {PYTHON}" in done.stdout
    assert "spf: mxgate" in done.stdout


def test_runs_as_nobody_and_can_write_only_its_state(store: Store, container: str) -> None:
    script = (
        "id -u; for d in / /etc/mxgate /opt/mxgate /usr /var/lib/mxgate; do test -w $d && echo $d; done; true"
    )
    done = subprocess.run(
        store.run(container, "sh", "-c", script), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["65532", "/var/lib/mxgate"]


@pytest.mark.parametrize("ci", CI)
def test_takes_the_configuration_that_the_chart_renders(
    store: Store, container: str, ci: str, tls: Tls, tmp_path: Path
) -> None:
    objects = render(ci)
    spec = chart_container(objects)
    secret = secrets_for(tls)
    contents = {
        "config": {"mxgate.json": json.dumps(configuration(objects)).encode()},
        "tls": secret["mx"],
        "admin": secret["admin"],
    }
    with contextlib.suppress(ValueError):
        policies = one(objects, "ConfigMap", "mail-mxgate-policies")["data"]
        contents["policies"] = {name: text.encode() for name, text in policies.items()}
    options = []
    for mount in spec["volumeMounts"]:
        directory = tmp_path / mount["name"]
        directory.mkdir()
        directory.chmod(0o777)
        for name, content in contents.get(mount["name"], {}).items():
            (directory / name).write_bytes(content)
        options.append(f"--volume={directory}:{mount['mountPath']}")
    of_secrets = {"REDIS_PASSWORD": "secret", "MXGATE__STATE__URL": "redis://redis.example.org"}
    options += [
        f"--env={each['name']}={each.get('value', of_secrets.get(each['name']))}" for each in spec["env"]
    ]
    command = store.run(container, "mxgate", "check-config", options=tuple(options))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: listen 0.0.0.0:2525")


def test_lists_what_is_installed_in_it(store: Store, container: str) -> None:
    command = store.run(container, "cat", "/opt/mxgate/share/mxgate/mxgate.cdx.json")
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert made["metadata"]["component"]["version"] == gateway.__version__
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^(\S+)==([^ ;]+)", lock, re.MULTILINE))
    assert {each["name"]: each["version"] for each in made["components"]}.items() <= pinned.items()
    assert len(made["components"]) > 20


def test_has_no_installer(store: Store, container: str) -> None:
    script = "import importlib.util as u; print([m for m in ('pip', 'setuptools') if u.find_spec(m)])"
    done = subprocess.run(
        store.run(container, "python3", "-c", script), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_says_how_it_is_run_and_checked(store: Store, running: Pod, container: str) -> None:
    about = json.loads(store("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    assert (about["User"], about["Entrypoint"], about["Cmd"]) == ("65532:65532", ["mxgate"], ["serve"])
    assert about["Labels"]["org.opencontainers.image.version"] == gateway.__version__
    _, *check = about["Healthcheck"]["Test"]
    here = [word.replace(":9464/", f":{running.admin[1]}/") for word in check]
    assert subprocess.run(store.run(container, *here), check=False).returncode == 0
    running.close()
    assert subprocess.run(store.run(container, *here), capture_output=True, check=False).returncode != 0


def _make_base(store: Store) -> None:
    root = store.directory / "rootfs"
    words = [
        "debootstrap",
        "--variant=minbase",
        "--include=python3,python3-venv,ca-certificates",
        SUITE,
        root,
    ]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    container = store("from", "scratch")
    store("copy", "--quiet", container, root, "/")
    store("commit", "--quiet", container, BASE)
    store("rm", container)


def _build(store: Store) -> None:
    """Build from a copy of the context, so that dist/ has this checkout's wheel and no other."""
    context = store.directory / "context"
    for name in ("deploy/Dockerfile", "deploy/requirements.lock", "deploy/sbom.py", ".dockerignore"):
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    _module("hatchling", "build", "-t", "wheel", "-d", context / "dist")
    # The build sees no network: it finds what the lock names in a directory. A package that only another Python needs
    # does no harm in it.
    wheels = store.directory / "wheels"
    lock = store.directory / "all.lock"
    lock.write_text(re.sub(r" ; [^\\\n]*", " ", (ROOT / "deploy" / "requirements.lock").read_text()))
    only = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--python-version", PYTHON]
    _module("pip", "download", "--quiet", *only, "--requirement", lock, "--dest", wheels)
    settings = store.directory / "pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    mounts = [f"--volume={wheels}:/wheels:ro", f"--volume={settings}:/etc/pip.conf:ro"]
    options = ["--format", "docker", "--isolation", "chroot", "--pull-never", "--build-arg", f"BASE={BASE}"]
    store("bud", *options, *mounts, "--file", context / "deploy" / "Dockerfile", "--tag", IMAGE, context)


def _module(module: str, *words: str | Path) -> None:
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _start_in_container(store: Store, container: str, plan: Plan, log: Path) -> subprocess.Popen[bytes]:
    options = [f"--user={plan.user}:{plan.user}"]
    options += [f"--env={name}={value}" for name, value in plan.environment.items()]
    options += [f"--volume={directory}:{path}" for path, directory in plan.mounts.items()]
    command = store.run(container, "mxgate", *plan.container["args"], options=tuple(options))
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
