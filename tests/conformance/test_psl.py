"""The cases of the Public Suffix List."""

from __future__ import annotations

import idna
import pytest

from policies.verify.org_domain import registrable
from tests.conformance.vectors import suite

CASES: list[tuple[str | None, str | None]] = suite("psl/psl")["cases"]


def a_labels(name: str | None) -> str:
    """In the form that the verifiers use; what is no name stays what it is."""
    lower = (name or "").lower()
    return lower if lower.isascii() else idna.encode(lower).decode("ascii")


@pytest.mark.parametrize(("name", "expected"), CASES)
def test_case(name: str | None, expected: str | None) -> None:
    assert (registrable(a_labels(name)) or "") == a_labels(expected)
