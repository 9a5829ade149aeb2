"""The resolver above the name servers: cache, single flight, what a transaction remembers, and its time."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.dns.cache import Cache
from gateway.adapters.dns.memory import MAX_QUESTIONS, OVER_LIMIT, Memory
from gateway.adapters.dns.names import can_exist, key_of, text_of
from gateway.adapters.dns.reply import NEGATIVE_S, POSITIVE_S, Reply, Resource, read
from gateway.adapters.dns.resolver import PREFETCH_S, CachingResolver, _Flight, _Wait
from gateway.adapters.dns.upstream import Answered
from gateway.lookup import (
    NO_DATA,
    NO_SUCH_NAME,
    OUT_OF_TIME,
    TRAIL,
    Answer,
    Asked,
    Found,
    Lookup,
    Mx,
    Question,
    RRType,
    ask,
)
from gateway.services import Instruments
from gateway.session import Recipient, Transaction
from gateway.smtp.address import parse_forward_path
from tests.adapters.dnskit import transaction
from tests.fakes import FakeLog, FakeMetrics, LoopTime

TXT = RRType.TXT
TIMEOUT = Answer(Found.TEMPORARY_FAILURE, why="timeout")


def question(number: int | str = 0) -> Question:
    return Question(f"q{number}.example.org", TXT)


def found(text: bytes = b"x") -> Answer:
    return Answer(Found.RECORDS, (text,))


class World:
    """A resolver whose upstream answers when the test says so; its clock is the loop's, which the test owns."""

    def __init__(self, time: LoopTime) -> None:
        self.time = time
        self.log, self.metrics = FakeLog(), FakeMetrics()
        self.asked: list[str] = []
        self.gates: dict[str, Answered] = {}
        self.at_once: tuple[Answer, int] | Exception | None = None
        self.resolver = CachingResolver(self, Instruments(self, self.log, self.metrics), total_timeout_s=20)

    def now(self) -> float:
        return 1_700_000_000 + self.time()

    def monotonic(self) -> float:
        return self.time()

    def answer(self, name: str, rrtype: RRType, done: Answered) -> None:
        self.asked.append(name)
        if isinstance(self.at_once, Exception):
            raise self.at_once
        if self.at_once is not None:
            done(*self.at_once)
        else:
            self.gates[name] = done

    async def settle(self, seconds: float = 0.0) -> None:
        """Let time pass, and what is due happen."""
        self.time.advance(seconds)
        for _ in range(6):
            await asyncio.sleep(0)

    def give(self, asked: Question, answer: Answer, ttl_s: int = 300) -> None:
        self.gates.pop(asked.name)(answer, ttl_s)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    loop = asyncio.get_running_loop()
    time = LoopTime(loop)
    monkeypatch.setattr(loop, "time", time)
    world = World(time)
    yield world
    await world.resolver.close()


def at_once(world: World, lookup: Lookup[object], tx: Transaction | None = None) -> object:
    """What a run returns that does not suspend."""
    with pytest.raises(StopIteration) as done:
        world.resolver.run(lookup, tx).send(None)
    return done.value.value


async def answered(world: World, answer: Answer, ttl_s: int = 300, tx: Transaction | None = None) -> None:
    """Ask the usual question, and answer it."""
    run = asyncio.create_task(world.resolver.run(ask(question()), tx))
    await world.settle()
    world.give(question(), answer, ttl_s)
    assert await run == [answer]


# --- the cache ----------------------------------------------------------------------------------------


async def test_an_answer_is_remembered_as_long_as_its_ttl_says(world: World) -> None:
    await answered(world, found(), ttl_s=300)
    await world.settle(298)
    assert at_once(world, ask(Question("Q0.Example.ORG.", TXT))) == [found()]
    await world.settle(2)
    await answered(world, found(b"new"))
    assert world.asked == ["q0.example.org"] * 2
    assert world.metrics["mxgate_dns_cache_total", "hit"] == 1
    assert world.metrics["mxgate_dns_cache_total", "miss"] == 2
    assert world.metrics["mxgate_dns_questions_total", "TXT", "records"] == 2


@pytest.mark.parametrize("answer", [NO_DATA, NO_SUCH_NAME])
async def test_nothing_is_remembered_too(world: World, answer: Answer) -> None:
    await answered(world, answer)
    assert at_once(world, ask(question())) == [answer]


@pytest.mark.parametrize("ttl_s", [0, 1])
async def test_a_ttl_of_which_nothing_is_left_is_not_remembered(world: World, ttl_s: int) -> None:
    await answered(world, found(), ttl_s=ttl_s)
    await answered(world, found())
    assert len(world.asked) == 2


async def test_a_temporary_failure_is_remembered_for_the_transaction_only(world: World) -> None:
    tx = transaction()
    await answered(world, TIMEOUT, tx=tx)
    assert at_once(world, ask(question()), tx) == [TIMEOUT]
    await answered(world, found(), tx=transaction())
    assert at_once(world, ask(question()), tx) == [TIMEOUT]
    assert world.metrics["mxgate_dns_questions_total", "TXT", "timeout"] == 1


def test_the_cache_drops_what_was_not_used_for_longest() -> None:
    cache = Cache(3, 1_000_000)
    for key in "abc":
        cache.put(key, found(), 10)
    cache.get("a", 0)
    cache.put("d", found(), 10)
    assert [key for key in "abcd" if cache.get(key, 0)] == ["a", "c", "d"]


def test_the_cache_is_bounded_in_octets() -> None:
    cache = Cache(1000, 100_000)
    cache.put("huge", found(b"x" * 60_000), 10)
    assert cache.get("huge", 0) is None
    for number in range(100):
        cache.put(str(number), found(b"x" * 5000), 10)
    assert 10 < len(cache) < 20
    assert cache.size_bytes <= 100_000
    for number in range(100):
        cache.get(str(number), 11)
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_names_in_the_cache_count_as_what_they_take() -> None:
    cache = Cache(1000, 1_000_000)
    # octets that are no UTF-8 are shown as four characters, and others beside them make each take four octets
    host = text_of([b"\xff" * 63, b"\xff" * 63, b"\xff" * 63, b"\xff" * 56 + "\U0001f600".encode()])
    for number in range(1000):
        cache.put(str(number), Answer(Found.RECORDS, (Mx(number, host),)), 10)
    assert len(cache) * sys.getsizeof(host) <= 1_000_000


# --- together -----------------------------------------------------------------------------------------


async def test_questions_of_one_step_are_asked_at_once_and_answered_in_their_order(world: World) -> None:
    run = asyncio.create_task(world.resolver.run(ask(question(1), question(2), question(1)), transaction()))
    await world.settle()
    assert world.asked == ["q1.example.org", "q2.example.org"]
    world.give(question(2), found(b"2"))
    world.give(question(1), found(b"1"))
    assert await run == [found(b"1"), found(b"2"), found(b"1")]


async def test_who_asks_the_same_waits_for_the_same_flight_and_may_leave_it(world: World) -> None:
    first = asyncio.create_task(world.resolver.run(ask(question())))
    await world.settle()
    second = asyncio.create_task(world.resolver.run(ask(question())))
    await world.settle()
    first.cancel()
    await world.settle()
    world.give(question(), found())
    assert await second == [found()]
    assert first.cancelled()
    assert world.asked == ["q0.example.org"]
    assert world.metrics["mxgate_dns_cache_total", "joined"] == 1


async def test_a_lookups_own_exception_is_its_callers(world: World) -> None:
    def fails() -> Lookup[None]:
        yield [Question("a..b", TXT)]
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # of the line above
        await world.resolver.run(fails())


async def test_a_lookup_without_questions_returns(world: World) -> None:
    def asks_nothing() -> Lookup[int]:
        yield []
        return 7

    assert at_once(world, asks_nothing()) == 7


async def test_a_surprise_of_a_library_is_a_failure_and_told(world: World) -> None:
    world.at_once = RuntimeError("surprise")
    (answer,) = await world.resolver.run(ask(question()))
    assert answer == Answer(Found.TEMPORARY_FAILURE, why="failed")
    (line,) = world.log.of("error")
    assert line.event == "dns.failed"


async def test_a_closed_resolver_answers(world: World) -> None:
    run = asyncio.create_task(world.resolver.run(ask(question())))
    await world.settle()
    await world.resolver.close()
    (answer,) = await run
    assert answer.is_temporary
    (answer,) = await world.resolver.run(ask(question(2)))
    assert answer.is_temporary
    world.resolver.prefetch(ask(question(3)), transaction())
    await world.settle()
    assert world.asked == ["q0.example.org"]


# --- time ---------------------------------------------------------------------------------------------


async def timed(world: World, run: asyncio.Task[object], most_s: int = 60) -> int:
    """After how many seconds of silence a run ends."""
    await world.settle()
    for second in range(most_s):
        if run.done():
            return second
        await world.settle(1)
    raise AssertionError("it does not end")


async def test_a_run_ends_in_its_time_and_what_was_cut_is_not_remembered(world: World) -> None:
    tx = transaction()
    run = asyncio.create_task(world.resolver.run(ask(question()), tx, timeout_s=3))
    assert await timed(world, run) == 3
    assert run.result() == [OUT_OF_TIME]
    world.give(question(), found())
    await world.settle()
    assert at_once(world, ask(question()), tx) == [found()]
    assert TRAIL.get(tx) == [Asked("", question(), OUT_OF_TIME, 3), Asked("", question(), found())]
    assert world.metrics["mxgate_dns_cut_total", "budget"] == 1


async def test_a_lookup_goes_on_without_waiting_when_its_time_is_over(world: World) -> None:
    def asks_on() -> Lookup[list[Answer]]:
        heard: list[Answer] = []
        for number in range(5):
            heard += yield [question(number)]
        return heard

    run = asyncio.create_task(world.resolver.run(asks_on(), timeout_s=3))
    assert await timed(world, run) == 3
    assert run.result() == [OUT_OF_TIME] * 5
    assert world.asked == ["q0.example.org"]


async def test_a_policys_hook_has_what_the_plan_leaves_it_for_all_its_runs_together(world: World) -> None:
    tx, spf = transaction(), world.resolver.for_policy("spf", 8)
    run = asyncio.create_task(spf.run(ask(question(1)), tx, timeout_s=5))
    assert await timed(world, run) == 5
    run = asyncio.create_task(spf.run(ask(question(2)), tx))
    assert await timed(world, run) == 3
    run = asyncio.create_task(spf.run(ask(question(3)), tx))
    assert await timed(world, run) == 0
    run = asyncio.create_task(world.resolver.for_policy("dkim", 4).run(ask(question(4)), tx))
    assert await timed(world, run) == 4
    assert [each.policy for each in TRAIL.get(tx) or ()] == ["spf", "spf", "spf", "dkim"]


async def test_each_good_recipient_gives_a_hook_its_time_anew(world: World) -> None:
    tx, policy = transaction(), world.resolver.for_policy("greylist", 6)
    run = asyncio.create_task(policy.run(ask(question(1)), tx))
    assert await timed(world, run) == 6
    mailbox = parse_forward_path("<ann@example.org>", smtputf8=False)
    later = replace(tx, envelope=replace(tx.envelope, rcpts=(Recipient(mailbox),)))
    run = asyncio.create_task(policy.run(ask(question(2)), later))
    assert await timed(world, run) == 6


async def test_a_message_has_one_budget_for_questions_of_strangers(world: World) -> None:
    tx = transaction()
    first = asyncio.create_task(world.resolver.run(ask(question(1)), tx, timeout_s=12))
    assert await timed(world, first) == 12
    # 8 s are left; two that wait at once are charged once
    second = asyncio.create_task(world.resolver.run(ask(question(2)), tx, timeout_s=5))
    third = asyncio.create_task(world.resolver.run(ask(question(3)), tx, timeout_s=5))
    assert await timed(world, second) == 5
    assert third.done()
    fourth = asyncio.create_task(world.resolver.run(ask(question(4)), tx))
    assert await timed(world, fourth) == 3
    assert fourth.result() == [OUT_OF_TIME]
    fifth = asyncio.create_task(world.resolver.run(ask(question(5)), tx))
    assert await timed(world, fifth) == 0
    assert "q5.example.org" not in world.asked


async def test_the_author_domain_has_its_own_budget(world: World) -> None:
    tx = transaction()
    stranger = asyncio.create_task(world.resolver.run(ask(question(1)), tx))
    assert await timed(world, stranger) == 20
    own = asyncio.create_task(world.resolver.run(ask(question(2)), tx, own_budget=True))
    assert await timed(world, own) == 8
    own = asyncio.create_task(world.resolver.run(ask(question(3)), tx, own_budget=True))
    assert await timed(world, own) == 0


async def test_time_in_which_nobody_waits_is_not_charged(world: World) -> None:
    tx = transaction()
    await answered(world, found(), tx=tx)
    await world.settle(100)
    run = asyncio.create_task(world.resolver.run(ask(question(2)), tx))
    assert await timed(world, run) == 20


async def test_who_gives_up_is_charged_no_longer(world: World) -> None:
    tx = transaction()
    run = asyncio.create_task(world.resolver.run(ask(question(1)), tx))
    await world.settle()
    await world.settle(6)
    run.cancel()
    await world.settle()
    await world.settle(50)
    run = asyncio.create_task(world.resolver.run(ask(question(2)), tx))
    assert await timed(world, run) == 14


async def test_a_transaction_has_a_limit_of_questions(world: World) -> None:
    world.at_once = found(), 300
    tx = transaction()
    many = [question(number) for number in range(MAX_QUESTIONS + 40)]
    answers = await world.resolver.run(ask(*many), tx)
    assert answers == [found()] * MAX_QUESTIONS + [OVER_LIMIT] * 40
    assert len(world.asked) == MAX_QUESTIONS
    # what it knows it may ask again
    assert await world.resolver.run(ask(question(0)), tx) == [found()]
    assert len(TRAIL.get(tx) or ()) == MAX_QUESTIONS
    assert world.metrics["mxgate_dns_cut_total", "limit"] == 40


async def test_strangers_cannot_use_up_the_author_domains_questions(world: World) -> None:
    world.at_once = found(), 300
    tx = transaction()
    await world.resolver.run(ask(*(question(number) for number in range(MAX_QUESTIONS))), tx)
    own = question("own")
    assert await world.resolver.run(ask(own), tx, own_budget=True) == [found()]
    assert await world.resolver.run(ask(question("other")), tx) == [OVER_LIMIT]


# --- the trail ----------------------------------------------------------------------------------------


async def test_the_trail_has_each_question_once_with_who_asked_and_how_long_it_took(world: World) -> None:
    tx = transaction()
    spf, dmarc = world.resolver.for_policy("spf", 8), world.resolver.for_policy("dmarc", 8)
    run = asyncio.create_task(spf.run(ask(question()), tx))
    await world.settle()
    await world.settle(2)
    world.give(question(), found())
    await run
    await dmarc.run(ask(question(), Question("a..b", TXT)), tx)
    assert TRAIL.get(tx) == [
        Asked("spf", question(), found(), 2),
        Asked("dmarc", Question("a..b", TXT), NO_SUCH_NAME),
    ]
    assert TRAIL.get(transaction()) is None


# --- asked ahead --------------------------------------------------------------------------------------


async def test_what_was_asked_ahead_is_there_or_on_its_way(world: World) -> None:
    tx, dmarc = transaction(), world.resolver.for_policy("dmarc", 8)
    dmarc.prefetch(ask(question(1)), tx, own_budget=True)
    dmarc.prefetch(ask(question(2)), tx, own_budget=True)
    await world.settle()
    await world.settle(5)
    world.give(question(1), found(b"1"))
    await world.settle()
    assert at_once(world, ask(question(1)), tx) == [found(b"1")]
    run = asyncio.create_task(dmarc.run(ask(question(2)), tx, own_budget=True))
    await world.settle()
    world.give(question(2), found(b"2"))
    assert await run == [found(b"2")]
    assert world.asked == ["q1.example.org", "q2.example.org"]
    assert [each.policy for each in TRAIL.get(tx) or ()] == ["dmarc", "dmarc"]


async def test_what_the_cache_knows_is_left_to_who_waits_for_it(world: World) -> None:
    await answered(world, found())
    tx = transaction()
    world.resolver.prefetch(ask(question()), tx)
    assert TRAIL.get(tx) == []
    assert at_once(world, ask(question()), tx) == [found()]
    # and what this message has asked before
    world.resolver.prefetch(ask(question()), tx)
    assert TRAIL.get(tx) == [Asked("", question(), found())]
    assert len(world.asked) == 1
    # one of them is new
    world.resolver.prefetch(ask(question(), question(1)), tx)
    assert world.asked == ["q0.example.org", "q1.example.org"]


async def test_what_the_cache_knew_is_asked_ahead_again(world: World) -> None:
    await answered(world, found(), ttl_s=300)
    await world.settle(298)
    world.resolver.prefetch(ask(question()), transaction())
    assert len(world.asked) == 1
    await world.settle(2)
    world.resolver.prefetch(ask(question()), transaction())
    assert len(world.asked) == 2


def one_after_the_other() -> Lookup[None]:
    yield [question(1)]
    yield [question(2)]


async def test_asking_ahead_goes_on_as_answers_come(world: World) -> None:
    tx = transaction()
    world.resolver.prefetch(one_after_the_other(), tx)
    world.give(question(1), found())
    assert world.asked == ["q1.example.org", "q2.example.org"]
    world.give(question(2), found(b"2"))
    assert [each.answer for each in TRAIL.get(tx) or ()] == [found(), found(b"2")]


async def test_asking_ahead_is_charged_to_nobody_and_ends(world: World) -> None:
    tx = transaction()
    world.resolver.prefetch(one_after_the_other(), tx)
    await world.settle(PREFETCH_S)
    world.give(question(1), found())
    assert world.asked == ["q1.example.org"]
    assert len(TRAIL.get(tx) or ()) == 1
    run = asyncio.create_task(world.resolver.run(ask(question(2)), tx))
    assert await timed(world, run) == 20


async def test_asking_ahead_ends_with_the_resolver(world: World) -> None:
    tx = transaction()
    world.resolver.prefetch(one_after_the_other(), tx)
    await world.resolver.close()
    assert world.asked == ["q1.example.org"]
    world.give(question(1), found())  # too late, and nobody's any more
    assert at_once(world, ask(question(1)), tx) == [Answer(Found.TEMPORARY_FAILURE, why="closed")]


async def test_nothing_waits_for_the_cycle_collector(world: World) -> None:
    gc.collect()
    gc.disable()
    try:
        world.resolver.prefetch(one_after_the_other(), transaction())
        run = asyncio.create_task(world.resolver.run(one_after_the_other(), transaction()))
        await world.settle()
        for number in (1, 2):
            world.give(question(number), found())
            await world.settle()
        await run
        left = [each for each in gc.get_objects() if type(each) in (_Wait, _Flight, Memory)]
    finally:
        gc.enable()
    assert left == []


async def test_a_mistake_of_who_asks_ahead_is_nobodys_trouble(world: World) -> None:
    def fails() -> Lookup[None]:
        yield [question()]
        raise ValueError

    world.resolver.prefetch(fails(), transaction())
    world.give(question(), found())
    assert [line.event for line in world.log.of("debug")] == ["dns.prefetch_failed"]
    assert world.log.of("error") == []


# --- names and replies --------------------------------------------------------------------------------


@given(st.text(), st.sampled_from(RRType))
def test_any_text_may_be_asked_for(name: str, rrtype: RRType) -> None:
    key = key_of(Question(name, rrtype))
    assert key.startswith(rrtype + " ")
    assert key == key_of(Question(key.partition(" ")[2], rrtype)) or name.endswith("..")
    if can_exist(key.partition(" ")[2]):
        labels = key.partition(" ")[2].encode().split(b".")
        assert all(0 < len(label) <= 63 for label in labels)
        assert text_of(labels) == key.partition(" ")[2]


def test_only_the_case_of_ascii_letters_does_not_matter() -> None:
    assert key_of(Question("K.Example.org.", TXT)) == "TXT k.example.org"
    assert key_of(Question("\u212a.org", TXT)) == "TXT \u212a.org"  # the Kelvin sign, whose lower case is k


def resource(owner: str, rrtype: RRType | str, value: str | bytes, ttl_s: int = 60) -> Resource:
    return Resource(owner, rrtype, ttl_s, value)


@pytest.mark.parametrize(
    ("reply", "ttl_s"),
    [
        (Reply(resources=(resource("a", TXT, b"x", 70), resource("a", TXT, b"y", 50))), 50),
        (Reply(resources=(resource("a", "CNAME", "b", 40), resource("b", TXT, b"y", 50))), 40),
        (Reply(resources=(resource("a", TXT, b"x", 2**31 - 1),)), POSITIVE_S),
        (Reply(resources=(resource("a", "CNAME", "a", 3600),)), NEGATIVE_S),
        (Reply(negative_ttl_s=30), 30),
        (Reply(negative_ttl_s=86_400), NEGATIVE_S),
        (Reply(is_no_such_name=True, negative_ttl_s=0), 0),
        (Reply(is_no_such_name=True), 0),
    ],
)
def test_an_answer_lives_as_long_as_its_shortest_part(reply: Reply, ttl_s: int) -> None:
    assert read(reply, "a", TXT, set()).ttl_s == ttl_s


def test_records_of_the_wrong_type_are_no_data() -> None:
    reply = Reply(resources=(Resource("a", RRType.A, 60, IPv4Address("192.0.2.1")),))
    assert read(reply, "a", TXT, set()).answer == NO_DATA
