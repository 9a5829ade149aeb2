"""SECURITY.md names tests: each is there, and each invariant has one of its own."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")
INVARIANTS = (ROOT / "tests" / "e2e" / "test_invariants.py").read_text("utf-8")


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`([\w/]+)::(test_\w+)`", SECURITY)
    assert len(named) > 60
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(
            rf"^\s*(?:async )?def {test}\(", (ROOT / "tests" / f"{file}.py").read_text("utf-8"), re.MULTILINE
        )
    ]
    assert missing == []


def test_every_dialogue_that_is_named_is_there() -> None:
    named = re.findall(r"`(dialogues/[\w-]+\.txt)`", SECURITY)
    assert named
    assert [each for each in named if not (ROOT / "tests" / each).is_file()] == []


def test_every_invariant_has_a_test_of_its_number() -> None:
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| ", SECURITY, re.MULTILINE)]
    assert numbers == [*range(1, 19)]
    tests = {int(number): name for name, number in re.findall(r"def (test_invariant_(\d+)_\w+)", INVARIANTS)}
    assert sorted(tests) == numbers
    for number, name in tests.items():
        assert re.search(rf"^\| {number} \| .*`e2e/test_invariants::{name}`", SECURITY, re.MULTILINE), name
