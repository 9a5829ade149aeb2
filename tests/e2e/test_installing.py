"""Installing it as its documents say: the wheel in a clean environment, and the README on a fresh Debian.

Both fetch from a package index, as a stranger would, and take minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import gateway
from tests.e2e.debian import Debian
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, config_for
from tests.e2e.net import LOOPBACK, Address, is_listening, wait_until
from tests.test_docs import README, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
CONTENT = b"From: <sender@client.example.net>\r\nSubject: installed\r\n\r\nHello\r\n"
DEMO = (LOOPBACK, 2525)


def pythons() -> dict[str, str]:
    """Version -> interpreter, of those that the project says it runs on and that are here."""
    found = {}
    for version in VERSIONS:
        places = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
        on_path = shutil.which(f"python{version}", path="/usr/local/bin:/usr/bin:/bin")
        if program := next(iter([*map(str, sorted(places)), *([on_path] if on_path else [])]), None):
            found[version] = program
    return found


def greeting(address: Address) -> bytes:
    """What is said within a second."""
    with socket.create_connection(address, timeout=1) as client, suppress(TimeoutError):
        return client.recv(100)
    return b""


def without_the_tests_own() -> dict[str, str]:
    """The environment but for what would let another Python see this one's packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the source distribution."""
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(directory)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return directory


@pytest.mark.parametrize("version", pythons())
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_with_plain_pip_and_serves(
    built: Path, kind: str, version: str, sink: Downstream, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    (package,) = built.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    for words in (
        [pythons()[version], "-m", "venv", environment],
        [environment / "bin" / "pip", "install", "-q", "--only-binary", "cryptography", f"{package}[fast]"],
        [environment / "bin" / "pip", "check"],
    ):
        done = subprocess.run(
            list(map(str, words)), env=without_the_tests_own(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (environment / "share" / "man" / "man1" / "mxgate.1").is_file()
    # a directory of its own: the checkout must not be what is imported
    running = Gateway(
        config_for(sink.address), tmp_path, ["env", "-C", str(tmp_path), str(environment / "bin" / "mxgate")]
    )
    try:
        running.wait_ready()
        status = running.admin("/metrics")[1]
        assert re.search(rf'mxgate_build_info\{{.*"{re.escape(gateway.__version__)}"', status)
        with running.connect() as client:
            client.hello()
            assert client.submit("sender@client.example.net", ["user@example.org"], CONTENT).code == 250
        assert sink.messages[-1].content.endswith(CONTENT)
        running.stop()
    finally:
        running.kill()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_image_pins_has_wheels_for(version: str, tmp_path: Path) -> None:
    # pip goes by the markers of the Python that it runs on; what only another one needs does no harm
    lock = tmp_path / "all.lock"
    lock.write_text(re.sub(r" ; [^\\\n]*", " ", (ROOT / "deploy" / "requirements.lock").read_text()))
    only = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--python-version", version]
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        *only,
        "-r",
        str(lock),
        "-d",
        str(tmp_path / "wheels"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "wheels")


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    root = tmp_path_factory.mktemp("fresh") / "root"
    yield Debian(root, "python3", "python3-venv", "git", "ca-certificates")
    # hundreds of megabytes, which pytest would keep
    shutil.rmtree(root)


@pytest.fixture
def demo(debian: Debian, tmp_path: Path) -> Iterator[Path]:
    """What the README begins with runs there; the checkout."""
    # REPOSITORY of the README
    bundle = debian.root / "root" / "mxgate.bundle"
    subprocess.run(["git", "bundle", "create", "-q", str(bundle), "HEAD"], cwd=ROOT, check=True)
    assert not is_listening(DEMO), "port 2525 is in use"
    first_hour = commands_with("./dev run").replace("REPOSITORY", "/root/mxgate.bundle")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            debian.command("sh", "-ec", f"cd /root\n{first_hour}"),
            env=debian.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def serves() -> bool:
        assert process.poll() is None, log.read_text()
        # the supervisor listens before its worker has opened the store
        return is_listening(DEMO) and greeting(DEMO).startswith(b"220 ")

    try:
        wait_until(serves, within_s=600, what="the demo serves")
        yield debian.root / "root" / "mxgate"
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not is_listening(DEMO)


def test_the_readme_works_on_a_fresh_debian(debian: Debian, demo: Path) -> None:
    def run(script: str) -> str:
        return debian("sh", "-ec", f"cd /root/mxgate\n{script}")

    run(commands_with("greylist allow"))
    (send,) = (line for line in commands_with("swaks", "python3 -c").splitlines() if "python3" in line)
    run(send)
    (stored,) = (demo / "mxgate-demo" / "Maildir" / "new").iterdir()
    assert "dmarc=pass" in stored.read_text()
    assert "dmarc" in run(commands_with("mxgate decisions", "mxgate explain"))
    # in front of one's own MTA: the example is right but for what only an operator has
    checked = commands_with("mxgate check-config")
    done = subprocess.run(
        debian.command("sh", "-ec", f"cd /root/mxgate\n{checked}"),
        env=debian.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert "/etc/mxgate/tls/fullchain.pem" in done.stderr
    given = "--set server.tls.cert_file= --set server.tls.key_file= --set state.url=memory:"
    assert run(f"{checked} {given}").startswith("ok: ")
    # nothing of the machine on which it was tested
    for file in (demo / ".venv" / "pyvenv.cfg", demo / "mxgate-demo" / "mxgate.toml"):
        assert str(ROOT) not in file.read_text()


def commands_with(*parts: str) -> str:
    """The README's first block of commands that has all these in it."""
    return next(block for block in blocks(README, "sh") if all(part in block for part in parts)).strip()
