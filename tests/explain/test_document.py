"""docs/explain.md shows what the commands print: its files are written, its commands run, and their output compared."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import cli

DOCUMENT = (Path(__file__).parents[2] / "docs" / "explain.md").read_text("utf-8")
CONFIG = """
[server]
hostname = "mx.example.org"
[relay]
domains = ["example.org"]
[[relay.routes]]
downstream = ["192.0.2.5:25"]
[policy.greylist]
mode = "off"
"""
# What no two runs have in common.
VARIES = (
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r"\b1m[0-9a-z]{12,}-1\b", "ID"),
    (r"\(?[\d.e-]+ ms\b[^)\n]*\)?", "MS"),
    (r"\((policies|delivery) [^)]*\) ", ""),
    (r"mxgate \d\S+", "mxgate VERSION"),
)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def command(name: str) -> list[str]:
    """The one that is shown with files of its own."""
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL))
    (found,) = [
        line
        for line in lines.replace("\\\n", " ").splitlines()
        if line.startswith(f"mxgate {name} ") and "--zone" in line
    ]
    return shlex.split(found)[1:]


def masked(text: str) -> list[str]:
    for pattern, instead in VARIES:
        text = re.sub(pattern, instead, text)
    return text.splitlines()


@pytest.mark.parametrize("name", ["explain", "dkim", "dmarc"])
def test_what_is_shown_is_what_is_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in (("zone", block("zone")), ("list.eml", block("eml")), ("mxgate.toml", CONFIG)):
        Path(file).write_text(text)
    done = CliRunner().invoke(cli, command(name))
    assert masked(done.stdout) == masked(block(name))
