"""docs/write-a-policy.md, word for word: its files are written, its commands run, its output is what comes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

import gateway.api
from gateway.policy import Policy
from gateway.services import Services
from tests.authorkit import environment
from tests.e2e.net import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.full]

TEXT = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
# others may be using these on this machine
PORTS = {port: str(free_port()) for port in ("2625", "2626", "2627")}
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$",
    re.sub("|".join(PORTS), lambda port: PORTS[port[0]], TEXT),
    re.MULTILINE | re.DOTALL,
)


def shell(block: str, at: Path) -> str:
    """What a block prints; nothing that it started outlives it."""
    with subprocess.Popen(
        ["bash", "-euc", block], cwd=at, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as running:  # fmt: skip
        try:
            said, errors = running.communicate(timeout=110)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, (block, said, errors)
    return said


def test_everything_that_it_shows_works(tmp_path: Path) -> None:
    output = ""
    kinds = []
    for kind, block in BLOCKS:
        kinds.append(kind)
        if kind == "sh":
            output = shell(block, tmp_path)
        elif kind == "text":
            assert output == block
        else:
            name = re.match(r"# (\S+)\n", block)
            assert name, block
            (tmp_path / name[1]).write_text(block, "utf-8")
    assert kinds.count("sh") == 7
    assert kinds.count("python") == 4


def test_it_names_every_hook_and_service_and_only_public_names() -> None:
    hooks = {name for name in vars(Policy) if name.startswith("on_")} - {"on_error"}
    assert set(re.findall(r"^\| `(on_\w+)\(", TEXT, re.MULTILINE)) == hooks
    services = {each for base in Services.__mro__ for each in getattr(base, "__annotations__", {})}
    assert set(re.findall(r"^\| `services\.(\w+)` \|", TEXT, re.MULTILINE)) == services
    named = set(re.findall(r"`([A-Z][a-zA-Z]+)`", TEXT)) - {"Harness", "Settings"}
    assert named <= set(gateway.api.__all__)
