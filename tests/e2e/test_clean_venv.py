"""The wheels in an environment of their own, with what the image's lock has and nothing of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.authoring.new import new_package
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, config_for

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONTENT = b"From: ann@client.example.net\r\nSubject: x\r\n\r\nHello.\r\n"


def run(*command: str | Path, at: Path) -> str:
    """What a program prints that has to succeed; it sees no setting of this machine and no module of this checkout."""
    environment = {
        n: v for n, v in os.environ.items() if not n.startswith(("MXGATE", "PYTHON", "PYTEST", "VIRTUAL"))
    }
    done = subprocess.run(
        [*map(str, command)],
        cwd=at,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the gateway's wheel, a wheel that `plugin new` made, and their dependencies."""
    directory = tmp_path_factory.mktemp("clean")
    wheels = directory / "wheels"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels, at=ROOT)
    new_package("no_spam", directory)
    package = directory / "mxgate-no-spam"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels, at=package)
    venv.create(directory / "venv", with_pip=True)
    pip: list[str | Path] = [
        directory / "venv" / "bin" / "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    lock = ROOT / "deploy" / "requirements.lock"
    run(*pip, "--only-binary", ":all:", "--require-hashes", "-r", lock, at=directory)
    run(*pip, "--no-index", *sorted(wheels.glob("*.whl")), at=directory)
    return directory


@pytest.fixture(scope="module")
def gateway(clean: Path, shared_sink: Downstream) -> Iterator[Gateway]:
    """`mxgate serve` out of that environment."""
    overrides: Config = {"policy": {"no_spam": {"settings": {"domains": ["spam.example"]}}}}
    shared_sink.behave()
    running = Gateway(
        config_for(shared_sink.address, overrides=overrides), clean, [str(clean / "venv" / "bin" / "mxgate")]
    )
    try:
        running.wait_ready()
        yield running
        running.stop()
    finally:
        running.kill()


def test_nothing_of_the_checkout_is_in_it(clean: Path) -> None:
    program = "import gateway, policies, mxgate_no_spam as m; print(gateway.__file__, policies.__file__, m.__file__)"
    printed = run(clean / "venv" / "bin" / "python", "-c", program, at=clean)
    assert [Path(each).is_relative_to(clean / "venv") for each in printed.split()] == [True] * 3


def test_the_running_gateway_asks_the_policy_about_real_mail(
    gateway: Gateway, shared_sink: Downstream, clean: Path
) -> None:
    with gateway.connect() as client:
        client.hello()
        refused = client.envelope("ann@mail.spam.example", ["user@example.org"])
        assert [(reply.code, reply.enhanced) for reply in refused][-1] == (550, "5.7.1")
        client.command("RSET")
        assert client.submit("ann@client.example.net", ["user@example.org"], CONTENT).code == 250
    (message,) = shared_sink.messages
    assert message.content.endswith(CONTENT)
    listed = run(
        clean / "venv" / "bin" / "mxgate", "plugin", "list", "--config", gateway.config_file, at=clean
    )
    (line,) = [line for line in listed.splitlines() if "no_spam" in line]
    assert line.split()[1:] == ["no_spam", "enforce", "mxgate-no-spam", "0.1.0", "mail"]
    assert "from mxgate-no-spam 0.1.0" in run(
        clean / "venv" / "bin" / "mxgate", "plan", "--config", gateway.config_file, at=clean
    )
    docs = run(clean / "venv" / "bin" / "mxgate", "config", "docs", at=clean)
    assert "| `domains` | `[]` |  | domains whose mail is refused, with their subdomains |" in docs


def test_use_from_outside_is_clean_under_mypy_strict_and_does_what_its_types_say(clean: Path) -> None:
    project = clean / "outside"
    project.mkdir()
    (project / "outside.py").write_text((Path(__file__).parent / "outside.py.txt").read_text("utf-8"))
    mypy: list[str | Path] = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--warn-unreachable",
        "--no-incremental",
    ]
    run(*mypy, "--python-executable", clean / "venv" / "bin" / "python", "outside.py", at=project)
    program = (
        "import outside as o; o.test_it(); t = o.TestOutside();\n"
        "[getattr(t, n)() for n in dir(t) if n.startswith('test_')]; print('done')"
    )
    assert run(clean / "venv" / "bin" / "python", "-c", program, at=project) == "done\n"
    (project / "wrong.py").write_text(
        "from gateway.api import Policy, Verdict, reject\nreject('no', 550)\nx: Verdict = Policy.name\n"
    )
    command = [*mypy, "--python-executable", clean / "venv" / "bin" / "python", "wrong.py"]
    done = subprocess.run([*map(str, command)], cwd=project, capture_output=True, text=True, check=False)
    assert done.stdout.count("error:") == 2, done.stdout + done.stderr
