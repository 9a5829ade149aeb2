"""Ways of burning the gateway's time and questions for DNS: the author domain's policy is applied all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.adapters.dns.memory import MAX_QUESTIONS
from gateway.adapters.dns.resolver import CachingResolver
from gateway.adapters.dns.upstream import Answered
from gateway.lookup import Answer, Found, Lookup, Question, RRType, ask
from gateway.mail.body import Spool
from gateway.mail.message import Message, parse_header
from gateway.services import Instruments, Services
from gateway.session import Envelope, Session, Transaction, client_address
from gateway.smtp.address import parse_reverse_path
from gateway.testing.zone import Zone
from gateway.verdict import Action, AuthResult, Result, Verdict
from policies.dmarc import JUDGE_S, Dmarc, DmarcSettings
from tests.fakes import FakeLog, FakeMetrics, LoopTime

TIMEOUT = Answer(Found.TEMPORARY_FAILURE, why="timeout")


class World:
    """A worker's resolver over a zone; of a name with the label "dead" no answer comes for `dead_s` seconds."""

    def __init__(self, time: LoopTime) -> None:
        self.time = time
        self.dead_s = 5.0
        self.zone = Zone({"_dmarc.bank.example": {RRType.TXT: [b"v=DMARC1; p=reject"]}})
        instruments = Instruments(self, FakeLog(), FakeMetrics())
        self.resolver = CachingResolver(self, instruments, total_timeout_s=20)
        dns = self.resolver.for_policy("dmarc", 10)
        self.dmarc = Dmarc(DmarcSettings(), Services(self, instruments.log, instruments.metrics, dns))

    def now(self) -> float:
        return 1_700_000_000 + self.time()

    def monotonic(self) -> float:
        return self.time()

    def answer(self, name: str, rrtype: RRType, done: Answered) -> None:
        if "dead" in name.split("."):
            asyncio.get_running_loop().call_later(self.dead_s, done, TIMEOUT, 0)
        else:
            done(self.zone.answer(Question(name, rrtype)), 300)

    async def passing(self, coroutine: asyncio.Task[Verdict] | asyncio.Task[object]) -> float:
        """Let time pass until it is done; the seconds that it took."""
        seconds = 0.0
        while not coroutine.done():
            for _ in range(8):
                await asyncio.sleep(0)
            if not coroutine.done():
                self.time.advance(0.5)
                seconds += 0.5
        return seconds

    async def burn(self, tx: Transaction, *names: str) -> None:
        """What the checks of strangers' names take, one name after another."""
        for name in names:
            lookup = ask(Question(name, RRType.TXT))
            await self.passing(asyncio.create_task(self.strangers(tx, lookup)))

    async def strangers(self, tx: Transaction, lookup: Lookup[object]) -> object:
        """What another policy asks."""
        return await self.resolver.for_policy("dkim", 20).run(lookup, tx)

    async def judge(self, tx: Transaction) -> tuple[Verdict, float]:
        """The verdict and the seconds that it took."""
        task = asyncio.create_task(self.dmarc.on_eom(tx))
        seconds = await self.passing(task)
        return task.result(), seconds


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    loop = asyncio.get_running_loop()
    time = LoopTime(loop)
    monkeypatch.setattr(loop, "time", time)
    world = World(time)
    yield world
    await world.resolver.close()


def forged(*results: AuthResult, author: str = "bank.example") -> Transaction:
    octets = f"From: a@{author}\r\n".encode()
    message = Message(
        parse_header(octets, max_fields=10, wire_bytes=len(octets)), Spool().new(is_stuffed=True)
    )
    session = Session("S", client_address("192.0.2.7"), 1234)
    envelope = Envelope(parse_reverse_path("<a@attacker.example>", smtputf8=False))
    return Transaction("S-1", session, envelope, message, results)


DEAD_KEYS = [
    AuthResult("dkim", Result.TEMPERROR, properties=(("header.d", f"d{number}.dead.example"),))
    for number in range(10)
]


async def test_ten_signatures_at_dead_name_servers(world: World) -> None:
    tx = forged(*DEAD_KEYS)
    await world.burn(tx, *[f"s._domainkey.d{number}.dead.example" for number in range(10)])
    verdict, seconds = await world.judge(tx)
    assert (verdict.action, verdict.results[0].result) == (Action.REJECT, Result.FAIL)
    assert seconds < 1


async def test_domains_that_passed_and_whose_dmarc_is_dead(world: World) -> None:
    passed = [
        AuthResult("dkim", Result.PASS, properties=(("header.d", f"d{number}.dead.example"),))
        for number in range(10)
    ]
    verdict, seconds = await world.judge(forged(*passed))
    assert (verdict.action, verdict.results[0].result) == (Action.REJECT, Result.FAIL)
    assert seconds < 1


async def test_more_questions_than_a_message_has(world: World) -> None:
    tx = forged()
    many = [Question(f"q{number}.example", RRType.TXT) for number in range(MAX_QUESTIONS + 10)]
    await world.passing(asyncio.create_task(world.strangers(tx, ask(*many))))
    verdict, _ = await world.judge(tx)
    # whichever: it is not let in
    assert verdict.action in {Action.DEFER, Action.REJECT}


async def test_name_servers_of_the_author_domain_that_are_dead(world: World) -> None:
    verdict, seconds = await world.judge(forged(author="a.dead.example"))
    assert (verdict.action, verdict.results[0].result) == (Action.CONTINUE, Result.TEMPERROR)
    assert seconds <= 5


async def test_name_servers_of_the_author_domain_that_are_slower_than_we_wait(world: World) -> None:
    world.dead_s = 60.0
    verdict, seconds = await world.judge(forged(author="a.dead.example"))
    assert (verdict.action, verdict.results[0].result) == (Action.DEFER, Result.TEMPERROR)
    assert seconds <= JUDGE_S


async def test_a_prefetch_that_is_still_under_way_is_waited_for_and_not_repeated(world: World) -> None:
    tx = forged(author="a.dead.example")
    world.dmarc.on_header(tx)
    for _ in range(8):
        await asyncio.sleep(0)
    world.time.advance(4.5)
    verdict, seconds = await world.judge(tx)
    assert verdict.results[0].result is Result.TEMPERROR
    assert seconds <= 1
