"""Authentication-Results: every published case as we rule it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.mail.authres import is_ours, own_ids, parse
from tests.conformance.vectors import disputed, suite

PATH = "authres/authres"
CASES = suite(PATH)["cases"]


def expected(case: dict[str, Any]) -> tuple[str, list[list[str]]]:
    ruling = disputed(PATH).get(case["id"], {}).get("expect", case)
    return ruling["authserv_id"], ruling["results"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_reads_every_case(case: dict[str, Any]) -> None:
    read = parse(case["value"].encode())
    assert (read.authserv_id, [[each.method, each.result] for each in read.results]) == expected(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_knows_whose_field_it_is(case: dict[str, Any]) -> None:
    authserv_id, _ = expected(case)
    assert is_ours(case["value"].encode(), own_ids(authserv_id)) is bool(authserv_id)
    assert not is_ours(case["value"].encode(), own_ids("mx.example.invalid"))
