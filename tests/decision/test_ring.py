"""ring: the newest records within its bytes, and an estimate of those that can be believed."""

from __future__ import annotations

import gc
import hashlib
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from gateway.decision import Decision, DecisionRing, Filters, Judged
from gateway.decision.ring import MAX_HEADER_BYTES, MAX_RECORD_BYTES, estimate_bytes
from gateway.lookup import Answer, Asked, Found, Mx, Question, RRType
from gateway.mail.digest import BodyDigest, Canonicalization
from gateway.smtp.reply import OK
from gateway.verdict import AddField, AuthResult, Result, Stage, proceed, reject
from tests.decision.records import DENIED, decision, plain, session


def test_keeps_the_newest_and_forgets_the_oldest() -> None:
    size = estimate_bytes(decision(10))
    ring = DecisionRing(max_bytes=5 * size)
    for number in range(10, 99):
        ring.add(decision(number))
        assert ring.used_bytes <= ring.max_bytes
    assert [kept.time - 1e9 for kept in ring.latest(1000)] == [98, 97, 96, 95, 94]
    assert len(ring) == 5
    newest = ring.get(decision(98).id)
    assert newest is not None
    assert newest.size_bytes == 4098
    assert ring.get(decision(10).id) is None


def test_gives_as_many_as_are_wanted() -> None:
    ring = DecisionRing()
    assert [*ring.latest(5)] == []
    for number in range(1, 6):
        ring.add(decision(number, action="rejected" if number % 2 else "accepted"))
    assert [kept.time - 1e9 for kept in ring.latest(2)] == [5, 4]
    assert [kept.time - 1e9 for kept in ring.latest(2, filters=Filters(action="accepted"))] == [4, 2]
    assert [*ring.latest(0)] == []


def test_a_record_is_kept_as_it_is_given_and_not_copied() -> None:
    ring = DecisionRing()
    given = decision(1, judged=[plain()], header=b"From: a@example.org\r\n")
    ring.add(given)
    assert ring.get(given.id) is given


def test_a_ring_that_is_too_small_for_a_record_keeps_none() -> None:
    ring = DecisionRing(max_bytes=10)
    ring.add(decision())
    assert (len(ring), ring.used_bytes) == (0, 0)


def test_of_a_large_header_the_first_lines_are_kept() -> None:
    ring = DecisionRing()
    line = b"X: " + b"y" * 95 + b"\r\n"
    ring.add(decision(1, header=line * 1000))
    (kept,) = ring.latest(1)
    assert kept.header == line * (MAX_HEADER_BYTES // len(line))
    ring.add(decision(2, header=b"X: " + b"y" * 100_000))
    assert next(ring.latest(1)).header == b"X: " + b"y" * (MAX_HEADER_BYTES - 3)
    ring.add(decision(3, header=b"X: y\r\n" + b"y" * (MAX_HEADER_BYTES - 7) + b"\r\n"))
    assert next(ring.latest(1)).header == b"X: y\r\n"  # its last line end is half beyond the limit


def test_no_record_drives_many_others_out() -> None:
    ring = DecisionRing()
    refused = Judged("dmarc", Stage.EOM, "enforce", reject("dmarc_fail", DENIED), None, 0.1, "")
    huge = decision(
        1,
        rcpts=[f"user{number}@example.org" for number in range(1000)],
        judged=[plain()] * 1000 + [refused],
        header=b"From: a@example.org\r\n",
        error="x" * 10_000,
    )
    ring.add(huge)
    (kept,) = ring.latest(1)
    assert ring.used_bytes < MAX_RECORD_BYTES < estimate_bytes(huge)
    assert (len(kept.rcpts), kept.omitted_rcpts) == (100, 900)
    assert ([*kept.judged], kept.omitted_judged) == ([refused], 1000)
    assert (kept.envelope.mail_from, kept.envelope.rcpts) == (huge.envelope.mail_from, ())
    assert len(kept.error) == 500


def test_a_policy_that_writes_without_end_loses_its_place() -> None:
    ring = DecisionRing()
    endless = proceed(results=[AuthResult("dkim", Result.PASS, "x" * 1_000_000)])
    ring.add(decision(1, judged=[Judged("dkim", Stage.EOM, "enforce", endless, None, 0.1, "")]))
    (kept,) = ring.latest(1)
    assert ([*kept.judged], kept.omitted_judged) == ([], 1)
    assert ring.used_bytes < 10_000


def test_what_was_cut_is_told() -> None:
    ring = DecisionRing()
    question = Question("example.org", RRType.TXT)
    asked = [Asked("spf", question, Answer(Found.RECORDS, (b"%d" % at,))) for at in range(510)]
    ring.add(decision(1, header=b"X: y\r\n" * 3000)._replace(dns=asked))
    (kept,) = ring.latest(1)
    assert (len(kept.header) + kept.omitted_header_bytes, kept.omitted_dns) == (18_000, 10)
    assert kept.dns == asked[:500]
    ring.add(decision(2, rcpts=_many(2) * 30, header=b"X: y\r\n" * 3000)._replace(dns=asked))
    (kept,) = ring.latest(1)
    assert (kept.header, kept.omitted_header_bytes) == (b"", 18_000)
    assert (kept.dns, kept.omitted_dns) == ((), 510)


def test_evidence_of_a_long_text_goes_where_the_record_is_too_large() -> None:
    ring = DecisionRing()
    long = Asked("spf", Question("example.org", RRType.TXT), Answer(Found.RECORDS, (b"x" * 60_000,)))
    judged = _with_evidence(1, "of a record with thousands of networks")
    ring.add(decision(1, judged=[judged])._replace(dns=(long,)))
    (kept,) = ring.latest(1)
    assert [each.verdict for each in kept.judged] == [proceed()]
    assert kept.omitted_dns == 1
    ring.add(decision(2)._replace(dns=(long,)))
    assert next(ring.latest(1)).dns == (long,)


def _found(number: int, count: int, reason: str) -> list[Judged]:
    """Verdicts with results as a verifier of signatures makes them."""
    return [
        Judged(
            "dkim",
            Stage.EOM,
            "enforce",
            proceed(
                reason="found",
                results=[
                    AuthResult(
                        "dkim",
                        Result.PASS,
                        f"{reason}{number}",
                        (("header.d", f"example{number}.org"), ("header.s", f"s{number}.{at}")),
                    )
                ],
            ),
            None,
            0.001 * number,
            "",
        )
        for at in range(count)
    ]


@dataclass
class _Seen:
    """Evidence of one text."""

    text: str

    def lines(self) -> list[str]:
        return [self.text]


def _with_evidence(number: int, text: str) -> Judged:
    seen = proceed(evidence=_Seen(f"{number} {text}"))
    return Judged("spf", Stage.MAIL, "enforce", seen, None, 0.001 * number, "")


def _edited(number: int) -> list[Judged]:
    edits = [AddField("X-Seen", f"by {number} and {at} others" * 3) for at in range(10)]
    return [Judged("seen", Stage.EOM, "enforce", proceed(edits=edits), None, 0.001 * number, "")]


def _many(number: int, local: str = "user") -> list[str]:
    return [f"{local}{number}.{at}@example.org" for at in range(50)]


_SHARED = session(999)
SHAPES: dict[str, Callable[[int], Decision]] = {
    "smallest": lambda n: decision(n, shared=_SHARED, mail_from="", answer=OK),
    "usual": lambda n: decision(n, judged=[plain(n), plain(n), plain(n)], header=bytes(3000 + n)),
    "one session": lambda n: decision(n, judged=[plain(n)], shared=_SHARED),
    "large header": lambda n: decision(n, header=b"X: y\r\n" * 10_000 + b"%d" % n),
    "many recipients": lambda n: decision(n, rcpts=_many(n)),
    "many recipients, one reply": lambda n: decision(n, rcpts=_many(n), answer=DENIED),
    "not ascii": lambda n: decision(n, rcpts=_many(n, "\U0001f600" * 14)),
    "many policies": lambda n: decision(n, judged=[plain(n) for _ in range(20)]),
    "results": lambda n: decision(n, judged=_found(n, 5, "good signature ")),
    "long results": lambda n: decision(n, judged=_found(n, 5, "x" * 5000)),
    "long results, not ascii": lambda n: decision(n, judged=_found(n, 5, "\U0001f600" * 5000)),
    "edits": lambda n: decision(n, judged=_edited(n)),
    "observed": lambda n: decision(
        n,
        judged=[j._replace(mode="observe", verdict=proceed(), would_be=j.verdict) for j in _found(n, 5, "x")],
    ),
    "dns": lambda n: decision(n)._replace(
        dns=tuple(
            Asked(
                "spf",
                Question(f"{n}.{at}.example.org", RRType.TXT),
                Answer(Found.RECORDS, (b"v=spf1 %d %d" % (n, at),)),
                0.01 * n,
            )
            for at in range(20)
        )
    ),
    "exchanges": lambda n: decision(n)._replace(
        dns=tuple(
            Asked(
                "spf",
                Question(f"{n}.{at}.example.org", RRType.MX),
                Answer(Found.RECORDS, tuple(Mx(at, f"mx{each}.{n}.example.org") for each in range(10))),
            )
            for at in range(10)
        )
    ),
    "digests": lambda n: decision(n)._replace(
        digests={
            (kind, length): BodyDigest(hashlib.sha256(b"%d" % n).digest(), 1000 + n)
            for kind in Canonicalization
            for length in (None, 1000 * n)
        }
    ),
    "evidence": lambda n: decision(
        n, header=bytes(3000 + n), judged=[_with_evidence(n, "x" * 1500) for _ in range(4)]
    ),
    "cut": lambda n: decision(n, rcpts=_many(n) * 20),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_right_within_a_factor_of_two(shape: str) -> None:
    make = SHAPES[shape]

    def fill(ring: DecisionRing, numbers: range) -> None:
        for number in numbers:
            ring.add(make(number))

    fill(DecisionRing(), range(300, 310))  # what is cached for all is not a record's
    ring = DecisionRing(max_bytes=1 << 40)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        fill(ring, range(310, 360))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 < ring.used_bytes / (after - before) < 2


def test_a_record_has_no_place_for_what_would_keep_a_body_or_a_policys_notes_alive() -> None:
    kinds = " ".join(map(str, Decision.__annotations__.values()))
    assert "Session" in kinds
    assert not re.search(r"Transaction|Message|Body\b", kinds)
