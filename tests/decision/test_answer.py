"""answer: complete, bounded, made in small steps; and what workers say becomes one answer."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from gateway.decision import DecisionRing, DecisionsAnswer, FilterError, merge_decisions
from gateway.decision.answer import MAX_ANSWER_BYTES
from tests.decision.records import decision


def ring_of(*numbers: int, **given: Any) -> DecisionRing:
    ring = DecisionRing(1 << 30)
    for number in numbers:
        ring.add(decision(number, **given))
    return ring


def answered(ring: DecisionRing, **query: object) -> dict[str, Any]:
    answer = DecisionsAnswer(ring, query)
    while not answer.step():
        pass
    return cast("dict[str, Any]", answer.result)


def numbers(answer: dict[str, Any]) -> list[int]:
    return [int(record["tx"].rpartition("-")[2]) for record in answer["decisions"]]


def test_the_newest_come_first_and_as_many_as_were_asked_for() -> None:
    ring = ring_of(*range(1, 101))
    whole = answered(ring, limit=1000)
    assert (numbers(whole), whole["truncated"]) == ([*range(100, 0, -1)], False)
    part = answered(ring, limit="40")
    assert (numbers(part), part["truncated"]) == ([*range(100, 60, -1)], True)
    exact = answered(ring, limit="100")
    assert (len(exact["decisions"]), exact["truncated"]) == (100, False)
    assert numbers(answered(ring)) == [*range(100, 80, -1)]
    assert answered(DecisionRing()) == {"decisions": [], "truncated": False}


def test_a_step_is_small_and_mail_between_two_changes_nothing() -> None:
    ring = ring_of(*range(1, 101))
    answer = DecisionsAnswer(ring, {"limit": 100})
    steps = 1
    while not answer.step():
        ring.add(decision(1000 + steps))
        steps += 1
    assert steps == 7
    assert numbers(cast("dict[str, Any]", answer.result)) == [*range(100, 0, -1)]


def test_an_answer_is_bounded_in_bytes() -> None:
    ring = ring_of(*range(1, 300), rcpts=[f"user{at}@example.org" for at in range(100)])
    answer = answered(ring, limit=1000)
    assert MAX_ANSWER_BYTES * 0.9 < len(json.dumps(answer)) < MAX_ANSWER_BYTES * 1.1
    assert answer["truncated"]
    assert numbers(answer)[0] == 299


def test_a_first_record_is_shown_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.decision.answer.MAX_ANSWER_BYTES", 10)
    answer = answered(ring_of(1, 2, 3))
    assert (numbers(answer), answer["truncated"]) == ([3], True)


def test_the_header_is_shown_of_what_is_asked_for_by_its_id() -> None:
    ring = ring_of(1, header=b"From: a@example.org\r\n")
    (record,) = answered(ring, tx="1m80vxzckjnp001-1")["decisions"]
    assert record["header"] == [{"name": "From", "value": "a@example.org"}]
    (record,) = answered(ring)["decisions"]
    assert "header" not in record


def test_a_bad_query_is_refused() -> None:
    with pytest.raises(FilterError, match="limit"):
        DecisionsAnswer(DecisionRing(), {"limit": "all"})


def test_the_answers_of_workers_become_one_by_time() -> None:
    first, second = answered(ring_of(1, 4, 5, 8)), answered(ring_of(2, 3, 6, 7))
    merged = cast(
        "dict[str, Any]",
        merge_decisions(
            [
                {"worker": 1, "pid": 11, "decisions": first},
                {"worker": 2, "pid": 12, "decisions": second},
                {"worker": 3, "pid": 13, "error": "no answer within 5 s"},
            ],
            limit=6,
        ),
    )
    assert numbers(merged) == [8, 7, 6, 5, 4, 3]
    assert [record["worker"] for record in merged["decisions"]] == [1, 2, 2, 1, 1, 2]
    assert merged["truncated"]
    assert merged["errors"] == [{"worker": 3, "pid": 13, "error": "no answer within 5 s"}]


@pytest.mark.parametrize("truncated", [False, True])
def test_the_whole_is_truncated_where_a_part_is(truncated: bool) -> None:
    one = answered(ring_of(1)) | {"truncated": truncated}
    merged = merge_decisions([{"worker": 1, "pid": 11, "decisions": one}], limit=6)
    assert merged["truncated"] is truncated
