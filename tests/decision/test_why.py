"""why: whose doing it was, for every reason that the engine gives."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest

from gateway import gatekeeper, relaying
from gateway.decision import Judged
from gateway.decision.why import NO, RULE, TROUBLE, WHYS, why
from gateway.smtp import reply
from gateway.smtp.content import Fault
from gateway.verdict import Stage, defer
from tests.decision.records import DENIED, decision

BUSY = reply.INTERNAL


def of(**changed: Any) -> tuple[str, str]:
    return why(decision(action="rejected", answer=DENIED)._replace(**changed))


@pytest.mark.parametrize(
    ("changed", "ours"),
    [
        ({"action": "accepted", "policy": ""}, ""),
        ({"action": "quarantined", "policy": "dmarc", "reason": "dmarc_fail"}, ""),
        ({"action": "aborted", "reason": "client", "reply": None}, NO),
        ({"policy": "relay_guard", "reason": "relaying_denied"}, RULE),
        ({"policy": "greylist", "reason": "greylist_wait", "reply": BUSY}, RULE),
        ({"policy": "dmarc", "reason": "policy_failed", "reply": BUSY}, TROUBLE),
        ({"policy": "", "reason": "downstream"}, NO),
        ({"policy": "", "reason": "downstream", "reply": reply.DOWNSTREAM_TROUBLE}, TROUBLE),
        ({"policy": "", "reason": "refused"}, NO),
        ({"policy": "", "reason": "connect", "reply": reply.DOWNSTREAM_TROUBLE}, TROUBLE),
        ({"policy": "dmarc", "reason": "quarantine", "reply": BUSY}, TROUBLE),
        ({"policy": "", "reason": "something_new"}, RULE),
    ],
)
def test_says_whose_doing_it_was(changed: dict[str, Any], ours: str) -> None:
    said = of(**changed)
    assert said[0] == ours
    assert said[1]


def test_a_policy_that_failed_is_trouble_whatever_it_says() -> None:
    judged = Judged("x", Stage.EOM, "enforce", defer("late", BUSY), None, 0.1, "timeout")
    assert of(policy="x", reason="late", judged=[judged])[0] == TROUBLE
    assert of(policy="x", reason="late", judged=[judged._replace(failure="")])[0] == RULE


def test_knows_every_reason_of_the_engine() -> None:
    """Those of the gatekeeper's own words, of content's faults, and of a delivery."""
    words = {
        node.args[1].value
        for node in ast.walk(ast.parse(inspect.getsource(gatekeeper)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "_Word"
        and isinstance(node.args[1], ast.Constant)
    }
    words |= {fault.name.lower() for fault in Fault}
    told = inspect.getdoc(relaying.Delivery) or ""
    errors = {
        part for line in told.splitlines() if line.startswith("- ") for part in line.split('"')[1::2]
    } - {""}
    assert {"connect", "final_lost", "identity"} <= errors
    assert {"no_route", "other_group"} <= words
    assert (words | errors) - set(WHYS) == set()
