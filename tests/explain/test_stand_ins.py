"""stand_ins: DNS of a record says again what it said to each policy, also what came too late."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

from gateway.explain.stand_ins import Answers, RecordedAnswers, TakesAll
from gateway.lookup import NO_DATA, OUT_OF_TIME, TRAIL, Answer, Asked, Found, Question, RRType, ask
from gateway.session import Envelope, Session, Transaction
from gateway.smtp.address import parse_forward_path

NAME = Question("a.example", RRType.TXT)
FOUND = Answer(Found.RECORDS, (b"x",))


def transaction() -> Transaction:
    return Transaction("S-1", Session("S", ip_address("192.0.2.1"), 25), Envelope(None))


def answer(dns: Answers, tx: Transaction | None = None, question: Question = NAME) -> Answer:
    (found,) = asyncio.run(dns.run(ask(question), tx))
    return found


def test_one_question_has_one_answer_for_all() -> None:
    recorded = RecordedAnswers([Asked("spf", NAME, FOUND)])
    dns = Answers(recorded)
    assert answer(dns.for_policy("dkim", 1)) == FOUND
    assert answer(dns, question=Question("A.EXAMPLE.", RRType.TXT)) == FOUND
    assert recorded.missing == []


def test_what_came_too_late_for_one_policy_is_late_for_that_one_only() -> None:
    recorded = RecordedAnswers([Asked("spf", NAME, OUT_OF_TIME), Asked("dmarc", NAME, FOUND)])
    dns, tx = Answers(recorded), transaction()
    assert answer(dns.for_policy("spf", 1), tx) == OUT_OF_TIME
    assert answer(dns.for_policy("dmarc", 1), tx) == FOUND
    # from then on the transaction knows it
    assert answer(dns.for_policy("spf", 1), tx) == FOUND
    assert [asked.answer for asked in TRAIL.get(tx) or ()] == [OUT_OF_TIME, FOUND]


def test_what_was_late_and_never_came_stays_late() -> None:
    dns = Answers(RecordedAnswers([Asked("spf", NAME, OUT_OF_TIME)])).for_policy("spf", 1)
    tx = transaction()
    assert [answer(dns, tx) for _ in range(3)] == [OUT_OF_TIME] * 3


def test_what_nobody_had_asked_is_a_temporary_failure_and_told() -> None:
    recorded = RecordedAnswers([Asked("spf", NAME, FOUND)])
    found = answer(Answers(recorded), question=NAME._replace(rrtype=RRType.A))
    assert (found.is_temporary, found.why) == (True, "not recorded")
    assert recorded.missing == [NAME._replace(rrtype=RRType.A)]


def test_behind_the_last_question_of_a_message_nothing_is_missing() -> None:
    asked = [Asked("spf", Question(f"{n}.example", RRType.TXT), NO_DATA) for n in range(160)]
    recorded = RecordedAnswers(asked)
    assert answer(Answers(recorded)).why == "limit"
    assert recorded.missing == []


def test_recipients_go_to_the_route_of_the_closest_domain() -> None:
    relay = TakesAll({"*": "main", ".example.org": "below", "example.org": "own"})

    def route(address: str) -> str | None:
        return relay.route(parse_forward_path(f"<{address}>", smtputf8=False))

    assert [route(a) for a in ("a@example.org", "a@b.example.org", "a@example.net", "postmaster")] == [
        "own",
        "below",
        "main",
        "main",
    ]
    assert TakesAll({"example.org": "own"}).route(parse_forward_path("<a@b.example>", smtputf8=False)) is None
