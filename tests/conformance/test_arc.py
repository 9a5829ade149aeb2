"""ARC: each case of the published suite, as our rulings have it."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import pytest

from policies.verify.arc.chain import prepare, validate
from tests.conformance.vectors import disputed, suite, zone_of
from tests.mailkit import arrive, message_of

SUITE = "arc-valimail/validation"
CASES = suite(SUITE)
NOW = 1_700_000_000.0


def result(case: dict[str, Any]) -> str:
    message = message_of(b64decode(case["msg"]))
    chain = prepare(message.header, message.digests)
    arrive(message)
    zone = zone_of(CASES["zones"][case["zone"]])
    return zone.run(validate(chain, message.header, message.digests, now=NOW)).result


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["id"])
def test_result_is_the_published_one_or_our_ruling(case: dict[str, Any]) -> None:
    expected = disputed(SUITE).get(case["id"], {}).get("expect", case["cv"])

    assert result(case) in expected
