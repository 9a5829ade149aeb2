"""sunday: on which days mail is deferred."""

from __future__ import annotations

import pytest
from mxgate_sunday import CLOSED, Sunday, SundaySettings

from gateway.testing import Harness, PolicyContract

DAY_S = 86_400


class TestContract(PolicyContract):
    policy = Sunday


@pytest.mark.parametrize(("days", "is_closed"), [(0, False), (4, False), (5, True), (6, False)])
def test_mail_waits_for_monday(days: int, *, is_closed: bool) -> None:
    with Harness(Sunday) as harness:  # its clock stands on a Tuesday
        harness.clock.advance(days * DAY_S)
        played = harness.deliver()
    assert (played.reply == CLOSED) == is_closed
    assert (played.message is None) == is_closed


def test_the_days_are_the_operators() -> None:
    with Harness(Sunday, SundaySettings(weekdays=(2,))) as harness:
        assert harness.deliver().reply == CLOSED
