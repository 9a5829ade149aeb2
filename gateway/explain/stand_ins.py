"""What an explained session has in place of the world: a relay that takes all, DNS of a zone or of a record, a log.

Everything else, from the gatekeeper to the policies, is what `mxgate serve` runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import inf
from typing import TypeVar

from gateway.adapters.dns.memory import MAX_QUESTIONS, OVER_LIMIT
from gateway.adapters.dns.upstream import Answered
from gateway.decision import Judged
from gateway.lookup import BUDGET, OUT_OF_TIME, TRAIL, Answer, Asked, Found, Lookup, Question, RRType
from gateway.mail.body import Body, Spool
from gateway.mail.message import Field, Header
from gateway.pipeline import Decided, Pipeline, Trail
from gateway.plan import Step, closest_pattern
from gateway.relaying import Content, Delivery, Offer
from gateway.services import Services
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp import reply
from gateway.smtp.address import Mailbox
from gateway.smtp.content import unstuff
from gateway.smtp.reply import Reply
from gateway.testing import Zone

T = TypeVar("T")

ACCEPTED = Reply(250, "2.0.0", "Ok, here the downstream would answer")
NOT_RECORDED = "not recorded"
"""`Answer.why` of a question that the record has no answer for."""


class TakesAll:
    """The Relay of a session that is explained: it opens no connection, accepts everything and keeps nothing.

    `routes` are the names of the routes by the patterns of their domains. `fields` is the header as it would leave.
    """

    def __init__(self, routes: Mapping[str, str]) -> None:
        self.fields: tuple[Field, ...] | None = None
        self._routes = routes
        self._offer = Offer(eightbitmime=True, smtputf8=True, dsn=True, size=0)

    def offer(self) -> Offer:
        return self._offer

    def route(self, mailbox: Mailbox) -> str | None:
        pattern = closest_pattern(mailbox.domain, self._routes)
        return None if pattern is None else self._routes[pattern]

    def refusal(self, route: str, envelope: Envelope) -> Reply | None:
        return None

    def max_recipients(self, route: str) -> int:
        return 0

    def state(self) -> Mapping[str, object]:
        return {}

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], last: float = inf
    ) -> Sequence[Reply]:
        return [reply.RECIPIENT_OK for _ in rcpts]

    async def deliver(self, tx: Transaction, content: Content, route: str = "") -> Delivery:
        self.fields = _fields(content)
        return Delivery(ACCEPTED, stored=True)


class SaysAgain(TakesAll):
    """The Relay of a replay: the downstream says what it said.

    `words` are its answers to recipients, `delivery` how the delivery ended; None when there was none.
    """

    def __init__(
        self, routes: Mapping[str, str], words: Mapping[Mailbox, Reply], delivery: Delivery | None
    ) -> None:
        super().__init__(routes)
        self._words = words
        self._delivery = delivery

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], last: float = inf
    ) -> Sequence[Reply]:
        return [self._words.get(rcpt.mailbox, reply.RECIPIENT_OK) for rcpt in rcpts]

    async def deliver(self, tx: Transaction, content: Content, route: str = "") -> Delivery:
        accepted = await super().deliver(tx, content, route)
        return self._delivery or accepted


def _fields(content: Content) -> tuple[Field, ...]:
    """The header of content that leaves."""
    octets = unstuff(content.prefix) if content.prefix else b""
    for block in content.blocks():
        # the header is complete before the body begins, and content that is explained is not stuffed
        octets += block
        if octets.startswith(b"\r\n") or b"\r\n\r\n" in octets:
            break
    octets = (
        b""
        if octets.startswith(b"\r\n")
        else octets.partition(b"\r\n\r\n")[0].removesuffix(b"\r\n") + b"\r\n"
    )
    return Header(octets, len(octets)).fields


class Answers:
    """The Resolver of one policy that has all answers at once, from `answer`, and keeps the trail as the real one."""

    def __init__(self, answer: Callable[[str, Question], Answer], policy: str = "") -> None:
        self._answer = answer
        self._policy = policy

    def for_policy(self, name: str, limit_s: float) -> Answers:
        """The same for another policy, which never waits."""
        return Answers(self._answer, name)

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        trail = _trail(tx)
        known = {_key(asked.question): asked.answer for asked in trail if asked.answer.why != BUDGET}
        try:
            questions = next(lookup)
            while True:
                answers = []
                for question in questions:
                    answer = known.get(_key(question))
                    if answer is None:
                        answer = self._answer(self._policy, question)
                        trail.append(Asked(self._policy, question, answer))
                        if answer.why != BUDGET:
                            known[_key(question)] = answer
                    answers.append(answer)
                questions = lookup.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        """There is nothing to wait for."""
        lookup.close()


class ZoneServer:
    """The only name server of the world: it has a zone, and nothing else exists."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone

    def answer(self, name: str, rrtype: RRType, done: Answered) -> None:
        done(self._zone.answer(Question(name, rrtype)), 0)


class RecordedAnswers:
    """The answers of a record; `missing` are the questions that it has none for.

    A question has one answer for all, but for those that came too late for one policy and not for another. Behind the
    last question that a message may ask there are none.
    """

    def __init__(self, dns: Sequence[Asked]) -> None:
        self._is_all_asked = len(dns) >= MAX_QUESTIONS
        self.missing: list[Question] = []
        self._late: dict[tuple[str, tuple[str, str]], int] = Counter()
        self._answers: dict[tuple[str, str], Answer] = {}
        for policy, question, answer, _ in dns:
            if answer.why == BUDGET:
                self._late[policy, _key(question)] += 1
            else:
                self._answers.setdefault(_key(question), answer)

    def __call__(self, policy: str, question: Question) -> Answer:
        key = _key(question)
        answer = self._answers.get(key)
        late = self._late.get((policy, key), 0)
        if late:
            # the last of them stands for all that follow, where there is no other answer
            self._late[policy, key] = late - 1 if late > 1 or answer else late
            return OUT_OF_TIME
        if answer is None and self._is_all_asked:
            return OVER_LIMIT
        if answer is None:
            self.missing.append(question)
            return Answer(Found.TEMPORARY_FAILURE, why=NOT_RECORDED)
        return answer


def _trail(tx: Transaction | None) -> list[Asked]:
    """The transaction's, begun where it has none."""
    if tx is None:
        return []
    trail = TRAIL.get(tx)
    if trail is None:
        trail = []
        TRAIL.put(tx, trail)
    return trail


def _key(question: Question) -> tuple[str, str]:
    name = question.name.removesuffix(".")
    # in the record a lone surrogate stands as an escape
    text = name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")
    return question.rrtype, text.lower()


class SizedSpool(Spool):
    """Makes bodies that count as if they had so many octets more, which are not here any more."""

    def __init__(self, missing_bytes: int) -> None:
        super().__init__()
        self._missing_bytes = missing_bytes

    def new(self, *, is_stuffed: bool) -> Body:
        body = super().new(is_stuffed=is_stuffed)
        body.size_bytes = self._missing_bytes
        return body


class StandingClock:
    """The clock of a replay: it shows when the message was judged."""

    def __init__(self, time: float, monotonic: Callable[[], float]) -> None:
        self._time = time
        self.monotonic = monotonic

    def now(self) -> float:
        return self._time


class KeptLog:
    """A Log that keeps what is out of the ordinary: policies that failed, and why."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def debug(self, event: str, **keys: object) -> None:
        """Not kept."""

    def info(self, event: str, **keys: object) -> None:
        """Not kept: the record says it."""

    def warning(self, event: str, **keys: object) -> None:
        self.lines.append(("warning", event, keys))

    def error(self, event: str, **keys: object) -> None:
        self.lines.append(("error", event, keys))


class EarlyPipeline(Pipeline):
    """A pipeline that keeps what was said before there was a transaction, for a client that is sent away then."""

    def __init__(self, steps: Sequence[Step], services: Services, *, reserved: AbstractSet[str]) -> None:
        super().__init__(steps, services, reserved=reserved)
        self.early: list[Judged] = []

    async def connect(self, session: Session, trail: Trail | None = None) -> Decided:
        return await self._kept(super().connect(session, trail), trail)

    async def ehlo(self, session: Session, trail: Trail | None = None) -> Decided:
        return await self._kept(super().ehlo(session, trail), trail)

    async def _kept(self, running: Awaitable[Decided], trail: Trail | None) -> Decided:
        decided = await running
        self.early += trail or ()
        return decided
