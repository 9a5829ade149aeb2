"""Regular expressions that every Python which mxgate runs on reads alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(each for name in ("gateway", "policies") for each in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_group_is_possessive(path: Path) -> None:
    r"""Before Python 3.11.5 such a group may keep what its last, failed repetition took: (?:\.a)*+ matches ".".

    https://github.com/python/cpython/issues/106052. An atomic group around the repetition, (?>(?:\.a)*), is sound;
    so is a set of characters, [a-z]*+.
    """
    assert re.findall(r"\)(?:[?*+]|\{[0-9,]*\})\+", path.read_text("utf-8")) == []
