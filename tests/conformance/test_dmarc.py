"""The DMARC cases of mailauth (RFC 9989), but for those that our rulings set aside."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.smtp.address import Domain
from gateway.testing.zone import Zone
from gateway.verdict import Result
from policies.verify.dmarc.judge import DmarcResult, Identifier, judge
from tests.conformance.vectors import disputed, suite, zone_of

PATH = "dmarc-mailauth/dmarc"
CASES: list[dict[str, Any]] = suite(PATH)["cases"]


def expected(case: dict[str, Any]) -> dict[str, Any] | None:
    """What our rulings make of the published expectation; None where the case does not count."""
    ruling = disputed(PATH).get(case["id"], case)["expect"]
    return None if ruling is None else dict(ruling)


def judged(case: dict[str, Any]) -> tuple[DmarcResult, Zone]:
    zone = zone_of(case["zone"])
    identifiers = [
        Identifier(method, domain, Result.PASS) for method in ("spf", "dkim") for domain in case[method]
    ]
    return zone.run(judge(Domain(case["from"]), identifiers)), zone


@pytest.mark.parametrize("case", [c for c in CASES if expected(c) is not None], ids=lambda case: case["id"])
def test_case(case: dict[str, Any]) -> None:
    result, zone = judged(case)
    asked = [each.question.name for each in zone.trail if each.question.name.startswith("_dmarc.")]
    for key, value in (expected(case) or {}).items():
        match key:
            case "result":
                assert result.result in value
            case "policy":
                assert result.policy == value
            case "org_or_policy_domain":
                assert value in {result.org_domain, result.record_at}
            case "queries":
                assert asked == value
            case _:
                pytest.fail(f"{key} is not looked at")
