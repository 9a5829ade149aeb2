"""SPF beside the published cases: results and explanations (see tests/conformance/vectors.py)."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api import Result
from gateway.session import client_address
from policies.verify.spf import SpfResult, check_host, identity
from tests.conformance.vectors import disputed, suite, zone_of

RFC7208 = "spf-rfc7208/rfc7208-tests"
PYSPF = "spf-pyspf/test"


def checked(path: str, case: dict[str, Any]) -> SpfResult:
    domain, mail_from = identity(case["mailfrom"], case["helo"])
    zone = zone_of(suite(path)["zones"][case["zone"]])
    return zone.run(check_host(client_address(case["ip"]), domain, mail_from, case["helo"]))


def cases(path: str) -> list[Any]:
    return [pytest.param(path, case, id=case["id"]) for case in suite(path)["cases"]]


@pytest.mark.parametrize(("path", "case"), [*cases(RFC7208), *cases(PYSPF)])
def test_result_is_the_published_one_or_our_ruling(path: str, case: dict[str, Any]) -> None:
    ruling = disputed(path).get(case["id"])
    expected = case["result"] if ruling is None else ruling["expect"]
    found = checked(path, case)
    assert found.result in expected, "\n".join(found.lines())


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["id"]) for case in suite(RFC7208)["cases"] if case["explanation"]]
)
def test_explanation_is_the_published_one(case: dict[str, Any]) -> None:
    found = checked(RFC7208, case)
    assert found.result is Result.FAIL
    assert (found.explanation or case["default_explanation"]) == case["explanation"]
