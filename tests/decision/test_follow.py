"""follow: each record once, in order, whatever workers answer when; and its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import as_line, to_json
from gateway.decision.follow import follow_decisions
from tests.decision.records import DENIED, decision


def followed(
    *answers: list[dict[str, Any]], take: int, is_truncated: bool = False
) -> tuple[list[str], list[Mapping[str, str]]]:
    """The ids that come of these answers, each the newest first, and what was asked."""
    asked: list[Mapping[str, str]] = []
    left: Iterator[list[dict[str, Any]]] = iter(answers)

    def ask(query: Mapping[str, str]) -> Mapping[str, object]:
        asked.append(query)
        return {"decisions": next(left), "truncated": is_truncated, "errors": []}

    records = follow_decisions(ask, {"rcpt": "example.org", "limit": "3"}, pause=lambda _: None)
    return [str(record["tx"]) for record in islice(records, take)], asked


def shown(number: int) -> dict[str, Any]:
    return to_json(decision(number))


def test_each_comes_once_the_oldest_first() -> None:
    one, two, three, late = shown(1), shown(2), shown(5), shown(4)
    found, asked = followed([two, one], [two, one], [], [three, two], [three, late, two], take=4)
    assert found == [one["tx"], two["tx"], three["tx"], late["tx"]]
    assert asked[0] == {"rcpt": "example.org", "limit": "3"}
    # what another worker said a little later than its time is not missed
    assert asked[1] == {"rcpt": "example.org", "limit": "1000", "since": "2001-09-09T01:46:32.000Z"}


def test_what_was_there_before_and_is_more_than_was_asked_for_is_not_told_later() -> None:
    one, two, three, four = shown(1), shown(2), shown(3), shown(4)
    found, _ = followed([three, two], [three, two, one], [four, three, two, one], take=3, is_truncated=True)
    assert found == [two["tx"], three["tx"], four["tx"]]


def test_nothing_yet_is_asked_again_as_it_was() -> None:
    found, asked = followed([], [], [shown(1)], take=1)
    assert len(found) == 1
    assert asked[2] == asked[0]


def test_a_line_for_each() -> None:
    record = to_json(decision(1, action="rejected", answer=DENIED, policy="relay_guard"))
    assert as_line(record) == (
        "2001-09-09T01:46:41.000Z rejected    192.0.2.7 <you@example.net> -> <ann@example.org> "
        "550 5.7.1 Relaying denied [relay_guard] tx 1m80vxzckjnp001-1"
    )


@given(st.text(), st.text())
def test_no_text_breaks_the_line(helo: str, error: str) -> None:
    record: dict[str, Any] = to_json(decision(1, error=error)) | {"mail_from": helo, "reason": error}
    assert as_line(record).isprintable()
