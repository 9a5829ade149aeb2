"""docs/write-a-policy.md, word for word: its files are written, its commands run, its output is what comes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import gateway.api
from gateway.policy import Policy
from gateway.services import Services
from tests.authorkit import environment

pytestmark = [pytest.mark.e2e, pytest.mark.full]

TEXT = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_everything_that_it_shows_works(tmp_path: Path) -> None:
    output = ""
    kinds = []
    for kind, block in BLOCKS:
        kinds.append(kind)
        if kind == "sh":
            done = subprocess.run(
                ["bash", "-euc", block], cwd=tmp_path, env=environment(), capture_output=True, text=True,
                timeout=110, check=False,
            )  # fmt: skip
            assert done.returncode == 0, (block, done.stdout, done.stderr)
            output = done.stdout
        elif kind == "text":
            assert output == block
        else:
            name = re.match(r"# (\S+)\n", block)
            assert name, block
            (tmp_path / name[1]).write_text(block, "utf-8")
    assert kinds.count("sh") == 6
    assert kinds.count("python") == 3


def test_it_names_every_hook_and_service_and_only_public_names() -> None:
    hooks = {name for name in vars(Policy) if name.startswith("on_")} - {"on_error"}
    assert set(re.findall(r"^\| `(on_\w+)\(", TEXT, re.MULTILINE)) == hooks
    services = {each for base in Services.__mro__ for each in getattr(base, "__annotations__", {})}
    assert set(re.findall(r"^\| `services\.(\w+)` \|", TEXT, re.MULTILINE)) == services
    named = set(re.findall(r"`([A-Z][a-zA-Z]+)`", TEXT)) - {"Harness", "Settings"}
    assert named <= set(gateway.api.__all__)
