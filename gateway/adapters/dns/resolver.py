"""CachingResolver: drives Lookups with answers that are remembered, awaited together, and cut off in time.

A question goes through what the transaction knows, the cache, a flight that is under way for it, and only then to a
name server. A flight belongs to nobody who waits for it: it goes on when one gives up, within its own time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from gateway.adapters.dns.cache import Cache
from gateway.adapters.dns.memory import OVER_LIMIT, Budget, Memory, memory_of
from gateway.adapters.dns.names import can_exist, key_of
from gateway.adapters.dns.reply import FAILURES
from gateway.adapters.dns.upstream import Answered
from gateway.lookup import NO_SUCH_NAME, OUT_OF_TIME, Answer, Asked, Found, Lookup, Question, RRType
from gateway.services import Instruments
from gateway.session import Transaction

T = TypeVar("T")

PREFETCH_S = 8.0
"""Longest time for what is asked ahead."""

_CACHE_ENTRIES = 20_000
_CACHE_BYTES = 16_777_216
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0)
_FAILED = Answer(Found.TEMPORARY_FAILURE, why="failed")
_CLOSED = Answer(Found.TEMPORARY_FAILURE, why="closed")


class Answering(Protocol):
    """Asks the name servers: gateway.adapters.dns.upstream.Upstream."""

    def answer(self, name: str, rrtype: RRType, done: Answered) -> None:
        """Ask; `done` is told the answer once, maybe at once."""


class _Metrics:
    """Counters with their labels bound."""

    def __init__(self, instruments: Instruments) -> None:
        metrics = instruments.metrics
        questions = metrics.counters(
            "mxgate_dns_questions_total",
            "Questions to name servers by what came of them; from timeout on they are temporary failures",
            ("rrtype", "outcome"),
        )
        outcomes = [each for each in Found if each is not Found.TEMPORARY_FAILURE]
        self.questions = {
            (rrtype, str(outcome)): questions.labels(rrtype, outcome)
            for rrtype in RRType
            for outcome in (*outcomes, *FAILURES)
        }
        cache = metrics.counters(
            "mxgate_dns_cache_total",
            "Questions of policies; joined: they waited for one to a name server that was under way",
            ("outcome",),
        )
        self.hit, self.joined, self.miss = (cache.labels(word) for word in ("hit", "joined", "miss"))
        cut = metrics.counters(
            "mxgate_dns_cut_total",
            "Questions of policies that were not asked: no time was left, or the message has caused too many",
            ("reason",),
        )
        self.out_of_time, self.over_limit = (cut.labels(word) for word in ("budget", "limit"))
        self.duration = metrics.histograms(
            "mxgate_dns_duration_seconds",
            "Seconds from a question to name servers to its answer, all that were tried included",
            (),
            _BUCKETS,
        ).labels()


class _Run(NamedTuple):
    """Who drives a Lookup, until when, and which budgets are charged while he waits."""

    policy: str
    memory: Memory
    last: float
    own_budget: bool
    budgets: tuple[Budget, ...]


class _Flight:
    """A question to name servers: its answer as soon as there is one, and who waits for that."""

    __slots__ = ("answer", "waits")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.waits: list[_Wait] = []


class _Wait:
    """What a run asks at once: the questions, their keys, what is known of each, and the flights of the others.

    `left` counts the flights that have not landed; with the last one `wake` is called. None while flights begin, of
    which some may land meanwhile.
    """

    __slots__ = ("begun", "flights", "keys", "known", "left", "questions", "wake")

    def __init__(self, pending: _Pending, begun: float) -> None:
        self.questions, self.keys, self.known = pending
        self.begun = begun
        self.flights: dict[str, _Flight] = {}
        self.left = 0
        self.wake: Callable[[], None] | None = None

    def add(self, key: str, flight: _Flight) -> None:
        """Wait for one more."""
        self.flights[key] = flight
        if flight.answer is None:
            self.left += 1
            flight.waits.append(self)

    def landed(self) -> None:
        """One of the flights has landed."""
        self.left -= 1
        wake = self.wake
        if not self.left and wake is not None:
            self.wake = None  # it may lead back here
            wake()


_Pending = tuple[Sequence[Question], Sequence[str], Sequence[Answer | None]]
"""Questions, their keys, and the answers that are known."""


class CachingResolver:
    """gateway.services.Resolver without a policy's name and time; `for_policy` gives those. Made in a running loop.

    `question_timeout_s`: how long `upstream` takes for an answer at most.
    """

    def __init__(
        self,
        upstream: Answering,
        instruments: Instruments,
        *,
        total_timeout_s: float,
        question_timeout_s: float = inf,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._upstream = upstream
        self._total_s = total_timeout_s
        self._question_s = question_timeout_s
        self._now = instruments.clock.monotonic
        self._log = instruments.log
        self._metrics = _Metrics(instruments)
        self._cache = Cache(_CACHE_ENTRIES, _CACHE_BYTES)
        self._flights: dict[str, _Flight] = {}
        self._is_closed = False

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        """See gateway.services.Resolver."""
        return await self.run_for("", inf, lookup, tx, timeout_s=timeout_s, own_budget=own_budget)

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        """See gateway.services.Resolver."""
        self.prefetch_for("", lookup, tx, own_budget=own_budget)

    def for_policy(self, name: str, limit_s: float) -> PolicyResolver:
        """The resolver of one policy, none of whose hooks waits for more than `limit_s` seconds."""
        return PolicyResolver(self, name, limit_s)

    async def close(self) -> None:
        """End all that is under way; from now on every question has a temporary failure."""
        self._is_closed = True
        for key, flight in list(self._flights.items()):
            self._land(key, flight, _CLOSED)

    async def run_for(
        self,
        policy: str,
        limit_s: float,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        """Drive a Lookup for a policy, which is charged for its waiting."""
        memory = memory_of(tx, self._total_s)
        try:
            pending = self._go_on(policy, lookup, next(lookup), memory, own_budget=own_budget)
            last = inf if timeout_s is None else self._now() + timeout_s
            message = memory.own if own_budget else memory.strangers
            run = _Run(policy, memory, last, own_budget, (message, memory.hook(policy, tx, limit_s)))
            while True:
                answers = await self._asked(run, pending)
                pending = self._go_on(policy, lookup, lookup.send(answers), memory, own_budget=own_budget)
        except StopIteration as done:
            result: T = done.value
            return result

    def prefetch_for(
        self, policy: str, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False
    ) -> None:
        """Drive a Lookup on as answers come, unless it begins with what is known; nobody is charged for it."""
        memory = memory_of(tx, self._total_s)
        run = _Run(policy, memory, self._now() + PREFETCH_S, own_budget, ())
        self._prefetch(run, lookup, None)

    def _prefetch(self, run: _Run, lookup: Lookup[object], wait: _Wait | None) -> None:
        """Drive a Lookup on, behind what it has waited for."""
        try:
            while not self._is_closed:
                if wait is not None:
                    questions = lookup.send(self._answers(run, wait))
                elif self._knows(questions := next(lookup), run.memory):
                    return  # as nearly always: to go on here and once more in `run` costs more than what it may save
                pending = self._go_on(run.policy, lookup, questions, run.memory, own_budget=run.own_budget)
                wait = self._wait(pending, run.last)
                if wait.left:
                    wait.wake = partial(self._prefetch, run, lookup, wait)
                    return
        except StopIteration:
            pass
        except Exception as exc:  # noqa: BLE001  # a verifier's mistake; `run` shows it to who waits for the result
            self._log.debug("dns.prefetch_failed", policy=run.policy, error=repr(exc))

    def _go_on(
        self,
        policy: str,
        lookup: Lookup[object],
        questions: Sequence[Question],
        memory: Memory,
        *,
        own_budget: bool,
    ) -> _Pending:
        """Drive a Lookup while all that it asks for is known: the first questions that are not, with what is.

        Its end, with its result, is the StopIteration that it raises.
        """
        answers = memory.answers
        while True:
            keys = [key_of(question) for question in questions]
            known = [
                answers.get(key) or self._known(policy, question, key, memory, own_budget=own_budget)
                for key, question in zip(keys, questions, strict=True)
            ]
            if None in known:
                return questions, keys, known
            questions = lookup.send(cast("list[Answer]", known))

    def _knows(self, questions: Sequence[Question], memory: Memory) -> bool:
        """Whether all of them need no name server."""
        now = self._now()
        for question in questions:
            key = key_of(question)
            if key not in memory.answers and not self._cache.has(key, now):
                return False
        return True

    def _known(
        self, policy: str, question: Question, key: str, memory: Memory, *, own_budget: bool
    ) -> Answer | None:
        """The answer that needs no name server and is new to the transaction."""
        if memory.is_over(own_budget=own_budget):
            self._metrics.over_limit.inc()
            return OVER_LIMIT
        answer = self._cache.get(key, self._now())
        if answer is not None:
            self._metrics.hit.inc()
        elif can_exist(key.partition(" ")[2]):
            return None
        else:
            answer = NO_SUCH_NAME
        return memory.remember(key, Asked(policy, question, answer))

    async def _asked(self, run: _Run, pending: _Pending) -> list[Answer]:
        """The answers to all questions: those that are known, and those that flights bring in time."""
        begun = self._now()
        last = min([run.last, *[budget.ends_at(begun) for budget in run.budgets]])
        wait = self._wait(pending, last)
        if wait.left:
            future = self._loop.create_future()
            wait.wake = wake = partial(_wake, future)
            # flights land by themselves: only who has less time than they needs a timer
            left_s = last - begun
            timer = self._loop.call_later(left_s, wake) if left_s < self._question_s else None
            for budget in run.budgets:
                budget.begin(begun)
            try:
                await future
            finally:
                if timer is not None:
                    timer.cancel()
                now = self._now()
                for budget in run.budgets:
                    budget.end(now)
        return self._answers(run, wait)

    def _wait(self, pending: _Pending, last: float) -> _Wait:
        """Begin the flights for what is not known; none where the time is over."""
        begun = self._now()
        wait = _Wait(pending, begun)
        if last > begun:
            for key, question, answer in zip(wait.keys, wait.questions, wait.known, strict=True):
                if answer is None and key not in wait.flights:
                    wait.add(key, self._flight(key, question.rrtype))
        return wait

    def _answers(self, run: _Run, wait: _Wait) -> list[Answer]:
        """What is known, and what the flights have brought by now."""
        took_s = self._now() - wait.begun
        answers = []
        for key, question, answer in zip(wait.keys, wait.questions, wait.known, strict=True):
            heard = answer
            if heard is None:
                flight = wait.flights.get(key)
                heard = None if flight is None else flight.answer
                if heard is None:
                    self._metrics.out_of_time.inc()
                    heard = OUT_OF_TIME
                if run.budgets or heard is not OUT_OF_TIME:
                    heard = run.memory.remember(key, Asked(run.policy, question, heard, took_s))
            answers.append(heard)
        return answers

    def _flight(self, key: str, rrtype: RRType) -> _Flight:
        """The flight for a question, begun where there is none."""
        flight = self._flights.get(key)
        if flight is not None:
            self._metrics.joined.inc()
            return flight
        self._metrics.miss.inc()
        flight = self._flights[key] = _Flight()
        if self._is_closed:
            self._land(key, flight, _CLOSED)
            return flight
        done = partial(self._heard, key, flight, rrtype, self._now())
        try:
            self._upstream.answer(key.partition(" ")[2], rrtype, done)
        except Exception as exc:  # noqa: BLE001  # as of a type that nobody can ask for: who waits sees a failure
            self._log.error("dns.failed", question=key, error=repr(exc))
            self._land(key, flight, _FAILED)
        return flight

    def _heard(
        self, key: str, flight: _Flight, rrtype: RRType, begun: float, answer: Answer, ttl_s: int
    ) -> None:
        """What the name servers say."""
        if flight.answer is not None:  # closed meanwhile
            return
        now = self._now()
        self._metrics.questions[rrtype, answer.why or answer.found].inc()
        self._metrics.duration.observe(now - begun)
        # RFC 2308 7: temporary failures are nobody's answer, and are not remembered beyond the transaction.
        # A name server counts whole seconds: of the last one nobody knows how much is left.
        if ttl_s > 1 and not answer.is_temporary:
            self._cache.put(key, answer, now + ttl_s - 1)
        self._land(key, flight, answer)

    def _land(self, key: str, flight: _Flight, answer: Answer) -> None:
        del self._flights[key]
        flight.answer = answer
        waits, flight.waits = flight.waits, []
        for wait in waits:
            wait.landed()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class PolicyResolver:
    """gateway.services.Resolver of one policy: its name in the trail, and the time that the plan leaves it."""

    __slots__ = ("_limit_s", "_policy", "_resolver")

    def __init__(self, resolver: CachingResolver, policy: str, limit_s: float) -> None:
        self._resolver = resolver
        self._policy = policy
        self._limit_s = limit_s

    def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> Coroutine[Any, Any, T]:
        """See gateway.services.Resolver."""
        return self._resolver.run_for(
            self._policy, self._limit_s, lookup, tx, timeout_s=timeout_s, own_budget=own_budget
        )

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        """See gateway.services.Resolver."""
        self._resolver.prefetch_for(self._policy, lookup, tx, own_budget=own_budget)
