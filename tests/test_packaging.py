"""What is published and what is installed: the wheel, the lock file, the metadata."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest

import gateway
from deploy.sbom import bill, locked

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
FUZZ_LOCK = (ROOT / "tests" / "fuzz" / "requirements.lock").read_text()


def normalised(requirement: str) -> str:
    """The distribution's name in a requirement, as PEP 503 compares names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def pinned() -> dict[str, str]:
    """Name -> the whole entry of the lock file, with its hashes."""
    text = "\n".join(line for line in LOCK.splitlines() if not line.lstrip().startswith("#"))
    entries = re.split(r"\n(?=\S)", text.replace("\\\n", " "))
    return {normalised(entry): entry for entry in entries}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = directory.glob("*.whl")
    return zipfile.Path(path)


def test_the_wheel_holds_two_typed_packages_and_nothing_else(wheel: zipfile.Path) -> None:
    assert {entry.name for entry in wheel.iterdir()} == {
        "gateway",
        "policies",
        f"mxgate-{gateway.__version__}.data",
        f"mxgate-{gateway.__version__}.dist-info",
    }
    assert (wheel / "gateway" / "py.typed").exists()
    assert (wheel / "policies" / "py.typed").exists()


def test_the_wheel_names_its_version_licence_and_python(wheel: zipfile.Path) -> None:
    info = wheel / f"mxgate-{gateway.__version__}.dist-info"
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {gateway.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()


def test_the_wheel_runs_on_any_platform(wheel: zipfile.Path) -> None:
    assert "Tag: py3-none-any\n" in (wheel / f"mxgate-{gateway.__version__}.dist-info" / "WHEEL").read_text()


def test_the_wheel_brings_manual_pages_completions_and_the_unit(wheel: zipfile.Path) -> None:
    shared = wheel / f"mxgate-{gateway.__version__}.data" / "data" / "share"
    # where man-db, bash-completion, zsh and fish look, as Debian's packages have it
    for name in (
        "man/man1/mxgate.1",
        "man/man5/mxgate.toml.5",
        "bash-completion/completions/mxgate",
        "zsh/site-functions/_mxgate",
        "fish/vendor_completions.d/mxgate.fish",
        "mxgate/mxgate.service",
    ):
        assert (shared / name).is_file(), name


def test_the_bill_of_materials_is_what_the_lock_of_the_image_pins() -> None:
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    made = bill({*locked(lock)})
    assert made["metadata"]["component"]["purl"] == f"pkg:pypi/mxgate@{gateway.__version__}"
    versions = dict(re.findall(r"^(\S+)==([^ ;]+)", lock, re.MULTILINE))
    found = {each["name"]: each["version"] for each in made["components"]}
    assert found.items() <= versions.items()
    assert {"aiohttp", "cryptography", "redis", "uvloop"} <= found.keys()
    assert not {"pytest", "ruff"} & found.keys()
    references = {each["bom-ref"] for each in (*made["components"], made["metadata"]["component"])}
    assert {each["ref"] for each in made["dependencies"]} == references
    assert all({*each["dependsOn"]} <= references for each in made["dependencies"])
    (own,) = [each for each in made["dependencies"] if each["ref"].startswith("pkg:pypi/mxgate@")]
    assert f"pkg:pypi/click@{found['click']}" in own["dependsOn"]
    assert all(each.get("licenses") for each in made["components"])


def test_the_bill_of_materials_needs_nothing_but_python() -> None:
    words = [sys.executable, "-I", "deploy/sbom.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    assert "pytest" in {each["name"] for each in made["components"]}


def test_the_relay_guard_arrives_by_entry_point() -> None:
    (relay_guard,) = entry_points(group="gateway.policies", name="relay_guard")
    assert relay_guard.value == "policies.relay_guard:RelayGuard"
    assert isinstance(relay_guard.load(), type)


def test_the_command_is_the_cli() -> None:
    (mxgate,) = entry_points(group="console_scripts", name="mxgate")
    assert mxgate.value == "gateway.cli:main"
    assert callable(mxgate.load())


@pytest.mark.parametrize("lock", [LOCK, FUZZ_LOCK], ids=["all", "fuzz"])
def test_the_lock_names_no_address(lock: str) -> None:
    assert "://" not in lock
    assert " @ " not in lock
    options = [line for line in lock.splitlines() if line.startswith("-")]
    assert options == []


def test_atheris_is_installed_only_where_it_is_asked_for() -> None:
    assert re.findall(r"^(\S+)==", FUZZ_LOCK, re.MULTILINE) == [
        "atheris",
        "atheris",
    ]  # for older Pythons and newer
    assert "atheris" not in pinned()


def test_the_lock_pins_each_package_once_and_with_hashes() -> None:
    for name, entry in pinned().items():
        assert re.match(r"\S+==[0-9]\S* ", entry), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", entry), name
    assert len(pinned()) == len(re.findall(r"^\S+==", LOCK, re.MULTILINE))


def test_the_lock_pins_every_dependency_that_pyproject_names() -> None:
    named = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["fast"],
        *PROJECT["dependency-groups"]["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    assert {normalised(requirement) for requirement in named} <= pinned().keys()


def test_the_layer_contract_forbids_every_runtime_dependency() -> None:
    (contract,) = [
        contract
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["name"] == "layers 1 and 2 use the standard library only"
    ]
    needed = {normalised(requirement) for requirement in PROJECT["project"]["dependencies"]}
    needed |= {normalised(requirement) for requirement in PROJECT["project"]["optional-dependencies"]["fast"]}
    modules = {
        module
        for module, distributions in packages_distributions().items()
        if needed & {normalised(distribution) for distribution in distributions}
        and not module.startswith("_")
    }
    assert modules <= set(contract["forbidden_modules"])
    assert len(modules) >= len(needed)
