"""CachingResolver: drives Lookups with answers that are remembered, awaited together, and cut off in time.

A question goes through what the transaction knows, the cache, a flight that is under way for it, and only then to a
name server. A flight belongs to nobody who waits for it: it goes on when one gives up, within its own time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import inf
from typing import NamedTuple, Protocol, TypeVar, cast

from gateway.adapters.dns.cache import Cache
from gateway.adapters.dns.memory import OVER_LIMIT, Budget, Memory, memory_of
from gateway.adapters.dns.names import can_exist, key_of
from gateway.adapters.dns.reply import FAILURES
from gateway.lookup import NO_SUCH_NAME, OUT_OF_TIME, Answer, Asked, Found, Lookup, Question, RRType
from gateway.services import Instruments
from gateway.session import Transaction
from gateway.stepping import step

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

    async def answer(self, name: str, rrtype: RRType) -> tuple[Answer, int]:
        """The answer, and for how many seconds it may be remembered."""


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


class CachingResolver:
    """gateway.services.Resolver without a policy's name and time; `for_policy` gives those."""

    def __init__(self, upstream: Answering, instruments: Instruments, *, total_timeout_s: float) -> None:
        self._upstream = upstream
        self._total_s = total_timeout_s
        self._now = instruments.clock.monotonic
        self._log = instruments.log
        self._metrics = _Metrics(instruments)
        self._cache = Cache(_CACHE_ENTRIES, _CACHE_BYTES)
        self._flights: dict[str, asyncio.Task[Answer]] = {}
        self._ahead: set[asyncio.Task[None]] = set()
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
        tasks = (*self._flights.values(), *self._ahead)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
            questions, known = self._go_on(policy, lookup, next(lookup), memory, own_budget=own_budget)
        except StopIteration as done:
            result: T = done.value
            return result
        last = inf if timeout_s is None else self._now() + timeout_s
        message = memory.own if own_budget else memory.strangers
        run = _Run(policy, memory, last, own_budget, (message, memory.hook(policy, tx, limit_s)))
        return await self._rest(run, lookup, questions, known)

    def prefetch_for(
        self, policy: str, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False
    ) -> None:
        """Drive a Lookup as far as the cache goes, and then in the background, where nobody is charged for it."""
        if self._is_closed:
            return
        memory = memory_of(tx, self._total_s)
        try:
            questions, known = self._go_on(policy, lookup, next(lookup), memory, own_budget=own_budget)
        except StopIteration:
            return
        except Exception as exc:  # noqa: BLE001  # as in _prefetch
            self._note_failed_prefetch(policy, exc)
            return
        run = _Run(policy, memory, self._now() + PREFETCH_S, own_budget, ())
        task = step(self._prefetch(run, lookup, questions, known), asyncio.get_running_loop())
        if task is not None:
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)

    async def _prefetch(
        self,
        run: _Run,
        lookup: Lookup[object],
        questions: Sequence[Question],
        known: Sequence[Answer | None],
    ) -> None:
        try:
            await self._rest(run, lookup, questions, known)
        except Exception as exc:  # noqa: BLE001  # a verifier's mistake; `run` shows it to who waits for the result
            self._note_failed_prefetch(run.policy, exc)

    def _note_failed_prefetch(self, policy: str, exc: Exception) -> None:
        self._log.debug("dns.prefetch_failed", policy=policy, error=repr(exc))

    async def _rest(
        self, run: _Run, lookup: Lookup[T], questions: Sequence[Question], known: Sequence[Answer | None]
    ) -> T:
        """Drive a Lookup on that asks for what is not all known."""
        while True:
            answers = await self._asked(run, questions, known)
            try:
                questions, known = self._go_on(
                    run.policy, lookup, lookup.send(answers), run.memory, own_budget=run.own_budget
                )
            except StopIteration as done:
                result: T = done.value
                return result

    def _go_on(
        self,
        policy: str,
        lookup: Lookup[object],
        questions: Sequence[Question],
        memory: Memory,
        *,
        own_budget: bool,
    ) -> tuple[Sequence[Question], Sequence[Answer | None]]:
        """Drive a Lookup while all that it asks for is known: the first questions that are not, with what is.

        Its end, with its result, is the StopIteration that it raises.
        """
        answers = memory.answers
        while True:
            known = []
            is_complete = True
            for question in questions:
                key = key_of(question)
                answer = answers.get(key) or self._known(policy, question, key, memory, own_budget=own_budget)
                known.append(answer)
                if answer is None:
                    is_complete = False
            if not is_complete:
                return questions, known
            questions = lookup.send(cast("list[Answer]", known))

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

    async def _asked(
        self, run: _Run, questions: Sequence[Question], known: Sequence[Answer | None]
    ) -> list[Answer]:
        """The answers to all questions: those that are known, and those that a flight brings in time."""
        memory = run.memory
        begun = self._now()
        last = min([run.last, *(budget.ends_at(begun) for budget in run.budgets)])
        keys = [key_of(question) for question in questions]
        flights: dict[str, asyncio.Task[Answer]] = {}
        if last > begun:
            for key, answer in zip(keys, known, strict=True):
                if answer is None and key not in flights:
                    flights[key] = self._flight(key)
            for budget in run.budgets:
                budget.begin(begun)
            try:
                await asyncio.wait(flights.values(), timeout=None if last == inf else last - begun)
            finally:
                for budget in run.budgets:
                    budget.end(self._now())
        took_s = self._now() - begun
        answers = []
        for key, question, answer in zip(keys, questions, known, strict=True):
            heard = self._landed(flights.get(key)) if answer is None else answer
            if answer is None and (run.budgets or heard is not OUT_OF_TIME):
                heard = memory.remember(key, Asked(run.policy, question, heard, took_s))
            answers.append(heard)
        return answers

    def _landed(self, flight: asyncio.Task[Answer] | None) -> Answer:
        """What a flight has brought."""
        if flight is None or not flight.done():
            self._metrics.out_of_time.inc()
            return OUT_OF_TIME
        return _CLOSED if flight.cancelled() else flight.result()

    def _flight(self, key: str) -> asyncio.Task[Answer]:
        """The flight for a question, begun where there is none."""
        flight = self._flights.get(key)
        if flight is not None:
            self._metrics.joined.inc()
            return flight
        self._metrics.miss.inc()
        flight = self._flights[key] = asyncio.get_running_loop().create_task(self._fly(key))
        return flight

    async def _fly(self, key: str) -> Answer:
        if self._is_closed:
            return _CLOSED
        rrtype, _, name = key.partition(" ")
        begun = self._now()
        try:
            answer, ttl_s = await self._upstream.answer(name, RRType(rrtype))
        except Exception as exc:  # noqa: BLE001  # a library's surprise: who waits sees a failure, never an exception
            self._log.error("dns.failed", name=name, rrtype=rrtype, error=repr(exc))
            answer, ttl_s = _FAILED, 0
        finally:
            del self._flights[key]
        now = self._now()
        self._metrics.questions[RRType(rrtype), answer.why or str(answer.found)].inc()
        self._metrics.duration.observe(now - begun)
        # RFC 2308 7: temporary failures are nobody's answer, and are not remembered beyond the transaction.
        # A name server counts whole seconds: of the last one nobody knows how much is left.
        if ttl_s > 1 and not answer.is_temporary:
            self._cache.put(key, answer, now + ttl_s - 1)
        return answer


class PolicyResolver:
    """gateway.services.Resolver of one policy: its name in the trail, and the time that the plan leaves it."""

    __slots__ = ("_limit_s", "_policy", "_resolver")

    def __init__(self, resolver: CachingResolver, policy: str, limit_s: float) -> None:
        self._resolver = resolver
        self._policy = policy
        self._limit_s = limit_s

    async def run(
        self,
        lookup: Lookup[T],
        tx: Transaction | None = None,
        *,
        timeout_s: float | None = None,
        own_budget: bool = False,
    ) -> T:
        """See gateway.services.Resolver."""
        return await self._resolver.run_for(
            self._policy, self._limit_s, lookup, tx, timeout_s=timeout_s, own_budget=own_budget
        )

    def prefetch(self, lookup: Lookup[object], tx: Transaction, *, own_budget: bool = False) -> None:
        """See gateway.services.Resolver."""
        self._resolver.prefetch_for(self._policy, lookup, tx, own_budget=own_budget)
