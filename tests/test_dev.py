"""The script ./dev: its decisions, and the guard that keeps services from starting."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dev() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("mxgate_dev", str(ROOT / "dev"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while they are made
    sys.modules[loader.name] = module
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = cached
    return module


# the command line


def test_help_names_every_command(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("setup", "run", "test", "check", "bench", "fuzz", "chaos", "dist", "clean"):
        assert f"\n  {name} " in shown


def test_without_a_command_it_shows_the_help_and_fails(
    dev: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev.main([]) == 64
    assert "usage: ./dev COMMAND" in capsys.readouterr().err


def test_refuses_an_unknown_command(dev: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["tset"]) == 64
    assert "'tset'" in capsys.readouterr().err


def test_refuses_arguments_that_a_command_would_ignore(
    dev: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev.main(["check", "--fast"]) == 64
    assert "check takes no arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("debians", "its_pip", "running", "is_replaced"),
    [
        ("usr/python3.11", "ensurepip", "pyenv/python3.11", True),
        ("usr/python3.11", "ensurepip", "usr/python3.11", False),
        ("usr/python3.11", "ensurepip", "venv/python", False),  # made with Debian's
        ("usr/python3.12", "ensurepip", "pyenv/python3.12", False),  # not installed
        ("usr/python3.11", "nothing", "pyenv/python3.11", False),  # to install it takes root
        ("usr/python3.10", "ensurepip", "pyenv/python3.11", False),  # nobody may run it
    ],
)
def test_goes_on_with_debians_python(
    dev: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    debians: str,
    its_pip: str,
    running: str,
    is_replaced: bool,
) -> None:
    for name in ("usr/python3.10", "usr/python3.11", "pyenv/python3.11", "pyenv/python3.12"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o644 if name == "usr/python3.10" else 0o755)
    (tmp_path / "ensurepip").mkdir()
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/python").symlink_to(tmp_path / "usr/python3.11")
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: called.append(words))
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "dev", "./dev", "test"])
    dev.go_on_with(tmp_path / debians, tmp_path / its_pip, tmp_path / running)
    assert called == ([[str(tmp_path / debians), "-X", "dev", "./dev", "test"]] if is_replaced else [])


@pytest.fixture
def pytest_words(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `./dev test` would run; filled when it is called."""
    words: list[str] = []
    monkeypatch.setattr(dev, "setup", lambda: None)
    monkeypatch.setattr(dev, "need_packages", lambda: None)
    monkeypatch.setattr(dev, "replace", lambda command, **_: words.extend(command))
    return words


def test_leaves_the_long_tests_out(dev: ModuleType, pytest_words: list[str]) -> None:
    dev.main(["test", "tests/smtp", "-x"])
    assert pytest_words[-4:] == ["-m", "not full", "tests/smtp", "-x"]


def test_all_means_the_long_tests_too(dev: ModuleType, pytest_words: list[str]) -> None:
    dev.main(["test", "-x", "--all"])
    assert "not full" not in pytest_words
    assert "--all" not in pytest_words
    assert pytest_words[-1] == "-x"


@pytest.fixture
def fuzz_words(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `./dev fuzz` would run, behind "atheris" when that was to be installed; filled when it is called."""
    words: list[str] = []

    def replace(command: list[str], **_: str) -> None:
        words.extend(command)
        raise SystemExit  # nothing comes back from it

    monkeypatch.setattr(dev, "setup", lambda: None)
    monkeypatch.setattr(dev, "need_atheris", lambda: words.append("atheris"))
    monkeypatch.setattr(dev, "replace", replace)
    return words


def test_fuzz_runs_the_properties_and_installs_nothing(dev: ModuleType, fuzz_words: list[str]) -> None:
    with pytest.raises(SystemExit):
        dev.main(["fuzz", "-k", "address"])
    assert fuzz_words[0] == dev.python()
    assert fuzz_words[-3:] == ["tests/fuzz", "-k", "address"]


@pytest.mark.parametrize(
    "words", [["--atheris", "spf", "--seconds", "9"], ["spf", "--seconds", "9", "--atheris"]]
)
def test_fuzz_searches_with_atheris_where_it_is_asked_to(
    dev: ModuleType, fuzz_words: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        dev.main(["fuzz", *words])
    assert fuzz_words == ["atheris", dev.python(), "-m", "tests.fuzz.guided", "spf", "--seconds", "9"]


@pytest.mark.parametrize(
    ("words", "seed", "seconds", "rest"),
    [
        ([], "", "60.0", []),
        (["--seed", "7", "-x", "--minutes", "0.5"], "7", "30.0", ["-x"]),
        (["--minutes", "10"], "", "600.0", []),
    ],
)
def test_chaos_says_the_seed_and_the_time(
    dev: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    seed: str,
    seconds: str,
    rest: list[str],
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def replace(command: list[str], **variables: str) -> None:
        ran.append((command, variables))
        raise SystemExit  # nothing comes back from it

    monkeypatch.setattr(dev, "setup", lambda: None)
    monkeypatch.setattr(dev, "need_packages", lambda: None)
    monkeypatch.setattr(dev, "replace", replace)
    with pytest.raises(SystemExit):
        dev.main(["chaos", *words])
    ((command, variables),) = ran
    assert (variables["CHAOS_SEED"], variables["CHAOS_SECONDS"]) == (seed, seconds)
    place = command.index("tests/e2e/test_chaos.py::test_chaos[8]")
    assert command[place + 1 :] == rest


def test_chaos_takes_numbers(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "setup", lambda: None)
    monkeypatch.setattr(dev, "need_packages", lambda: None)
    with pytest.raises(SystemExit, match="take numbers"):
        dev.main(["chaos", "--seed", "x"])


def test_says_so_where_there_is_no_wheel_of_atheris(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dev, "succeeds", asked.extend)  # None: it did not
    with pytest.raises(
        SystemExit, match=rf"no wheel of atheris for Python 3\.{sys.version_info[1]} on {sys.platform} "
    ):
        dev.need_atheris()
    assert {"--require-hashes", "--only-binary", str(ROOT / "tests" / "fuzz" / "requirements.lock")} <= {
        *asked
    }


# the environment


def test_the_stamp_changes_with_what_is_installed(dev: ModuleType) -> None:
    place, content = dev.stamp("3.11.7 (main)", ROOT, b"lock", b"project")
    assert dev.stamp("3.11.7 (main)", ROOT, b"lock", b"project") == [place, content]
    assert dev.stamp("3.11.7 (main)", ROOT, b"lock 2", b"project") != [place, content]
    # where one input ends and the next begins matters
    assert dev.stamp("3.11.7 (main)", ROOT, b"lockp", b"roject")[1] != content


def test_the_stamp_tells_when_the_environment_has_to_be_made_anew(dev: ModuleType) -> None:
    place, _ = dev.stamp("3.11.7 (main)", ROOT, b"lock")
    assert dev.stamp("3.11.7 (main)", ROOT, b"other")[0] == place
    assert dev.stamp("3.12.1 (main)", ROOT, b"lock")[0] != place
    assert dev.stamp("3.11.7 (main)", ROOT / "copy", b"lock")[0] != place


# Debian packages


@pytest.mark.parametrize(
    ("known", "missing"),
    [
        ("", ["openssl", "postfix", "swaks"]),
        ("openssl installed\npostfix installed\nswaks installed\n", []),
        ("openssl installed\npostfix config-files\nswaks installed\n", ["postfix"]),
        ("openssl installed\npostfix half-configured\n", ["postfix", "swaks"]),
        ("postfix-doc installed\nswaks\nopenssl installed\n", ["postfix", "swaks"]),
    ],
)
def test_a_package_counts_only_when_it_is_installed(dev: ModuleType, known: str, missing: list[str]) -> None:
    assert dev.not_installed(["openssl", "postfix", "swaks"], known) == missing


def test_root_needs_no_sudo(dev: ModuleType) -> None:
    assert dev.root_prefix(0, lambda: False) == []


def test_others_need_sudo_or_nothing_can_be_done(dev: ModuleType) -> None:
    assert dev.root_prefix(1000, lambda: True) == ["sudo"]
    assert dev.root_prefix(1000, lambda: False) is None


def test_says_what_is_lacking_where_it_may_not_install(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "root_prefix", lambda *_: None)
    monkeypatch.setattr(dev.shutil, "which", lambda *_, **__: "apt-get")
    with pytest.raises(SystemExit, match=r"swaks.*as root: apt-get install swaks"):
        dev.apt_install(["swaks"])


def test_says_what_is_lacking_where_there_is_no_apt(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"not installed: postfix, swaks\. There is no apt-get"):
        dev.apt_install(["postfix", "swaks"])


class Guard:
    """The guarded installation with an apt-get of our own, which writes down what it finds in policy-rc.d's place."""

    def __init__(self, script: str, directory: Path) -> None:
        self.script = script
        self.path = directory / "policy-rc.d"
        self.directory = directory
        self.seen = directory / "seen"
        self.asked = directory / "asked"

    def install(self, *packages: str, apt_does: str = "exit 0") -> int:
        programs = self.directory / "bin"
        programs.mkdir()
        apt = programs / "apt-get"
        apt.write_text(
            f"#!/bin/sh\n"
            f"case $* in *update*) exit 100;; esac\n"  # no network is no reason to give up
            f'echo "$*" > {self.asked}\n'
            f"{self.path}; echo $? > {self.seen}\n"
            f"{apt_does}\n"
        )
        apt.chmod(0o755)
        command = ["sh", "-c", self.script, "dev", str(self.path), *packages]
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, check=False
        ).returncode


@pytest.fixture
def guard(dev: ModuleType, tmp_path: Path) -> Guard:
    return Guard(dev.APT_GUARDED, tmp_path)


def test_no_service_may_start_while_apt_works(guard: Guard) -> None:
    assert guard.install("postfix", "swaks") == 0
    assert guard.asked.read_text().split()[-3:] == ["install", "postfix", "swaks"]
    assert guard.seen.read_text() == "101\n"
    assert not guard.path.exists()


@pytest.mark.parametrize("apt_does", ["exit 100", "kill -TERM $PPID; exit 0"])
def test_the_guard_goes_when_apt_fails_or_we_are_told_to_end(guard: Guard, apt_does: str) -> None:
    assert guard.install("postfix", apt_does=apt_does) != 0
    assert guard.seen.read_text() == "101\n"
    assert not guard.path.exists()


@pytest.mark.parametrize("apt_does", ["exit 0", "exit 100"])
def test_the_machines_own_policy_comes_back(guard: Guard, apt_does: str) -> None:
    guard.path.write_text("#!/bin/sh\nexit 104\n")
    guard.path.chmod(0o750)
    guard.install("postfix", apt_does=apt_does)
    assert guard.seen.read_text() == "101\n"
    assert guard.path.read_text() == "#!/bin/sh\nexit 104\n"
    assert guard.path.stat().st_mode & 0o777 == 0o750
    assert sorted(p.name for p in guard.directory.glob("policy*")) == ["policy-rc.d"]


def test_a_policy_that_is_a_link_comes_back_as_one(guard: Guard) -> None:
    guard.path.symlink_to("/nonexistent/policy")
    guard.install("postfix")
    assert guard.seen.read_text() == "101\n"
    assert guard.path.readlink() == Path("/nonexistent/policy")


def test_what_a_killed_run_left_behind_is_cleared_up(guard: Guard) -> None:
    guard.install("postfix", apt_does="kill -KILL $PPID; exit 0")
    assert guard.path.exists()
    (guard.directory / "bin" / "apt-get").unlink()
    (guard.directory / "bin").rmdir()
    assert guard.install("postfix") == 0
    assert list(guard.directory.glob("policy*")) == []


# the wheel


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project with the right shape."""
    files = {
        "pyproject.toml": '[project.scripts]\nmxgate = "gateway.cli:main"\n'
        '[project.entry-points."gateway.policies"]\nrelay_guard = "policies.relay_guard:RelayGuard"\n',
        "gateway/py.typed": "",
        "gateway/cli.py": "",
        "gateway/__pycache__/cli.pyc": "",
        "policies/py.typed": "",
        "policies/relay_guard.py": "",
    }
    for name, content in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "tree"


RIGHT = {
    "gateway/py.typed": "",
    "gateway/cli.py": "",
    "policies/py.typed": "",
    "policies/relay_guard.py": "",
    "mxgate-1.dist-info/METADATA": "",
    "mxgate-1.dist-info/entry_points.txt": "[console_scripts]\nmxgate = gateway.cli:main\n\n"
    "[gateway.policies]\nrelay_guard = policies.relay_guard:RelayGuard\n",
}


def problems_with(dev: ModuleType, tree: Path, contents: dict[str, str]) -> list[str]:
    wheel = tree.parent / "mxgate.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    problems: list[str] = dev.wheel_problems(wheel, tree)
    return problems


def test_finds_nothing_wrong_with_a_right_wheel(dev: ModuleType, tree: Path) -> None:
    assert problems_with(dev, tree, RIGHT) == []


def test_finds_what_does_not_belong_into_the_wheel(dev: ModuleType, tree: Path) -> None:
    assert problems_with(dev, tree, {**RIGHT, "tests/test_x.py": ""}) == [
        "only in the wheel: tests/test_x.py"
    ]


def test_finds_a_module_that_did_not_get_into_the_wheel(dev: ModuleType, tree: Path) -> None:
    (tree / "gateway" / "late.py").touch()
    assert problems_with(dev, tree, RIGHT) == ["not in the wheel: gateway/late.py"]


def test_finds_a_package_that_is_not_typed(dev: ModuleType, tree: Path) -> None:
    (tree / "policies" / "py.typed").unlink()
    contents = {name: content for name, content in RIGHT.items() if name != "policies/py.typed"}
    assert problems_with(dev, tree, contents) == ["not in the wheel: policies/py.typed"]


def test_finds_an_entry_point_that_is_missing(dev: ModuleType, tree: Path) -> None:
    (problem,) = problems_with(
        dev,
        tree,
        {**RIGHT, "mxgate-1.dist-info/entry_points.txt": "[console_scripts]\nmxgate = gateway.cli:main\n"},
    )
    assert problem.startswith("entry points are")


def test_finds_an_entry_point_that_leads_nowhere(dev: ModuleType, tree: Path) -> None:
    (tree / "gateway" / "cli.py").unlink()
    contents = {name: content for name, content in RIGHT.items() if name != "gateway/cli.py"}
    (problem,) = problems_with(dev, tree, contents)
    assert "gateway.cli:main" in problem


# what clean removes is what git ignores


def test_git_ignores_what_clean_removes(dev: ModuleType) -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = {line.strip("/") for line in lines if line and not line.startswith("#")}
    assert ignored == {*dev.GENERATED, "__pycache__", "*.pyc"}


# the layer contracts of pyproject.toml, against small trees that break them


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("gateway/verdict.py", "import gateway.pipeline", "layers of the engine"),
        ("gateway/pipeline.py", "import gateway.gatekeeper", "layers of the engine"),
        ("gateway/gatekeeper.py", "import gateway.adapters.relay", "layers of the engine"),
        ("gateway/adapters/relay.py", "import gateway.app", "layers of the engine"),
        ("gateway/helpers.py", "", "layers of the engine"),
        ("gateway/adapters/relay.py", "import gateway.adapters.tls", "adapters do not import each other"),
        ("gateway/app.py", "import policies.relay_guard", "the engine does not know the policies"),
        ("policies/relay_guard.py", "import gateway.verdict", "policies import gateway.api and nothing else"),
        ("policies/relay_guard.py", "import policies.spf", "policies do not import each other"),
        ("gateway/verdict.py", "import pydantic", "layers 1 and 2 use the standard library only"),
        ("gateway/pipeline.py", "import structlog", "layers 1 and 2 use the standard library only"),
        ("gateway/smtp/server.py", "import asyncio", "protocol and message are pure"),
    ],
)
def test_a_broken_layer_rule_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    report = lint_imports(tmp_path, {module: line})
    assert report.returncode == 1, report.stdout
    broken = [shown for shown in report.stdout.splitlines() if shown.endswith(" BROKEN")]
    assert [shown.startswith(contract) for shown in broken] == [True], report.stdout


def test_what_the_layer_rule_allows_is_not_found(tmp_path: Path) -> None:
    allowed = {
        "gateway/app.py": "import pydantic, gateway.gatekeeper, gateway.adapters.relay",
        "gateway/adapters/relay.py": "import asyncio, uvloop, gateway.smtp.address",
        "gateway/gatekeeper.py": "import gateway.pipeline",
        "gateway/pipeline.py": "import asyncio, gateway.verdict",
        "gateway/smtp/address.py": "import idna",
        "policies/relay_guard.py": "import gateway.api",
    }
    report = lint_imports(tmp_path, allowed)
    assert report.returncode == 0, report.stdout


def lint_imports(tree: Path, lines: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run lint-imports with our contracts on a tree of empty modules that only have these lines."""
    modules = [
        *(f"gateway/{name}.py" for name in ("__init__", "api", "app", "gatekeeper", "pipeline", "verdict")),
        *(f"gateway/adapters/{name}.py" for name in ("__init__", "relay", "tls")),
        *(f"gateway/{package}/__init__.py" for package in ("smtp", "mail")),
        *(f"policies/{name}.py" for name in ("__init__", "relay_guard", "spf")),
    ]
    for name in {*modules, *lines}:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines.get(name, "") + "\n")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert len(contracts) == 7, "a new contract wants its row above"
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
