"""The public surface: what gateway.api and gateway.testing promise under semantic versioning does not change unseen."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from pathlib import Path

import pytest

from gateway.authoring.reference import MODULES, reference, signatures

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "api.txt"


def test_no_name_and_no_signature_has_changed() -> None:
    """What is lost or changed here breaks others' policies: a new major version (before 1.0: a line in CHANGELOG.md).

    What was meant: python -c 'from gateway.authoring.reference import *; print(signatures(), end="")' > tests/api.txt
    """
    assert signatures().splitlines() == SNAPSHOT.read_text("utf-8").splitlines()


def test_the_reference_is_up_to_date() -> None:
    """If this fails: ./.venv/bin/mxgate plugin api > docs/api.md."""
    assert (ROOT / "docs" / "api.md").read_text("utf-8") == reference()


@pytest.mark.parametrize("module_name", MODULES)
def test_every_public_name_is_there_and_says_what_it_means(module_name: str) -> None:
    module = importlib.import_module(module_name)
    text = reference()
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        assert f"## `{name}`" in text
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name


# The engine's own, which a policy meets and does not work with.
NOT_A_POLICYS = {
    "Body",  # of a Message, whose `blocks()` is what is public
    "Content",  # what FakeRelay is given
    "Delivery",
    "GatewayError",
    "Instruments",  # what Services are more than
    "Judged",  # what Played is made of
    "Offer",
    "Spool",
    "Store",  # behind a Keyspace
}


def test_types_that_public_signatures_name_are_public_too() -> None:
    """Nobody has to import from elsewhere to annotate what a policy is given or gives."""
    public = {name for module in MODULES for name in vars(importlib.import_module(module))}
    ours = {
        name
        for module in [*sys.modules.values()]
        if module.__name__.startswith("gateway.")
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__.startswith("gateway.")
    }
    named = set(re.findall(r"\b[A-Z]\w+", re.sub(r"'[^']*'", "", signatures())))
    assert named & ours - public - NOT_A_POLICYS - set(vars(typing)) == set()
