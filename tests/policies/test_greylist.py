"""greylist: who waits, who does not, and what is remembered; on a store and a clock that the test owns."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import fields, replace
from ipaddress import ip_address
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pydantic import TypeAdapter, ValidationError

from gateway.lookup import RRType
from gateway.policy import OnError
from gateway.session import AddressSource, Envelope, Recipient, Session, TlsInfo, Transaction
from gateway.smtp.address import parse_forward_path, parse_reverse_path
from gateway.store import Delete, Get, Keyspace, Operation, Replace, StoreDownError
from gateway.testing import FakeStore, Zone
from gateway.verdict import Action, AuthResult, Result, Stage, Verdict
from policies.greylist import Greylist, GreylistSettings, Per, Skip, When
from policies.verify.greylist.ledger import Ledger
from policies.verify.greylist.state import RECENT_S, Credit, Standing, Timing, decode_credit
from tests.fakes import FakeClock, FakeDns, FakeMetrics, FakeServices

DAY_S = 86_400
PREFIX = "mxgate:greylist:"


def spf(mail_from: str, result: Result = Result.PASS) -> AuthResult:
    return AuthResult("spf", result, "", (("smtp.mailfrom", mail_from),))


def dkim(domain: str, result: Result = Result.PASS) -> AuthResult:
    return AuthResult("dkim", result, "", (("header.d", domain),))


def dmarc(domain: str, result: Result = Result.PASS) -> AuthResult:
    return AuthResult("dmarc", result, "", (("header.from", domain),))


class World:
    """Workers with one store; `send` gives the verdict on one attempt."""

    def __init__(self, zone: Zone | None = None, workers: int = 1, **keys: Any) -> None:
        self.clock, self.metrics = FakeClock(), FakeMetrics()
        self.store = FakeStore(self.clock)
        services = replace(
            FakeServices(clock=self.clock, metrics=self.metrics, dns=FakeDns(zone)),
            store=Keyspace(self.store, PREFIX),
        )
        self.settings = GreylistSettings(**keys)
        self.workers = [Greylist(self.settings, services) for _ in range(workers)]
        self._turns = cycle(self.workers)

    async def send(
        self,
        *,
        client: str = "192.0.2.1",
        mail_from: str = "ann@example.net",
        rcpts: Sequence[str] = ("bob@example.org",),
        results: Iterable[AuthResult] = (),
        source: AddressSource = AddressSource.SOCKET,
        tls: TlsInfo | None = None,
    ) -> Verdict:
        """Of the RCPT of the last recipient, or of EOM; the next worker takes it."""
        session = Session("S", ip_address(client), 25, address_source=source, tls=tls)
        to = tuple([Recipient(parse_forward_path(f"<{each}>", smtputf8=True)) for each in rcpts])
        tx = Transaction(
            "S-1",
            session,
            Envelope(parse_reverse_path(f"<{mail_from}>", smtputf8=True), to),
            results=tuple(results),
        )
        policy = next(self._turns)
        if self.settings.stage is When.EOM:
            return await policy.on_eom(tx)
        verdicts = [await policy.on_rcpt(tx, each) for each in to]
        return verdicts[-1]

    async def reason(self, **keys: Any) -> str:
        return (await self.send(**keys)).reason

    async def know(self, **keys: Any) -> None:
        """An attempt and its retry in time."""
        await self.send(**keys)
        self.clock.advance(self.settings.delay_s)
        assert (await self.send(**keys)).action is Action.CONTINUE

    @property
    def keys(self) -> set[str]:
        return {key.removeprefix(PREFIX) for key in self.store.entries}


async def test_a_stranger_is_told_how_long_to_wait_and_passes_then() -> None:
    w = World()
    first = await w.send()
    assert (first.action, first.reason) == (Action.DEFER, "greylist_first")
    assert first.reply is not None
    assert (first.reply.code, first.reply.enhanced) == (451, "4.7.1")
    assert "in 300 seconds" in first.reply.text
    w.clock.advance(200)
    early = await w.send()
    assert (early.reason, early.reply and early.reply.text[-15:]) == ("greylist_early", " in 100 seconds")
    w.clock.advance(100)
    assert await w.reason() == "greylist_passed"
    assert await w.reason() == "greylist_known_triplet"
    assert w.metrics.of("mxgate_greylist_deferred_total") == {("first",): 1, ("early",): 1}
    assert w.metrics.observed[("mxgate_greylist_delay_seconds",)] == [300]
    assert w.metrics.of("mxgate_greylist_skipped_total") == {("known_triplet",): 1}


async def test_a_retry_beyond_the_window_is_a_first_attempt_again() -> None:
    w = World()
    await w.send()
    w.clock.advance(2 * DAY_S + 1)
    assert await w.reason() == "greylist_first"
    w.clock.advance(300)
    assert await w.reason() == "greylist_passed"


async def test_who_passed_stays_known_while_mail_comes_and_is_forgotten_behind_it() -> None:
    w = World()
    await w.know()
    for _ in range(3):
        w.clock.advance(34 * DAY_S)
        assert await w.reason() == "greylist_known_triplet"
    w.clock.advance(36 * DAY_S)
    assert await w.reason() == "greylist_first"


async def test_another_address_of_the_network_is_the_same_client() -> None:
    w = World()
    await w.send(client="192.0.2.1")
    w.clock.advance(300)
    assert await w.reason(client="192.0.2.254") == "greylist_passed"
    assert await w.reason(client="198.51.100.1") == "greylist_first"


async def test_a_network_is_known_after_five_retries_in_time() -> None:
    w = World()
    for number in range(5):
        assert await w.reason(rcpts=[f"{number}@example.org"]) == "greylist_first"
    w.clock.advance(300)
    for number in range(5):
        assert await w.reason(rcpts=[f"{number}@example.org"]) == "greylist_passed"
    assert await w.reason(mail_from="new@example.com", rcpts=["new@example.org"]) == "greylist_known_client"


async def test_a_known_client_costs_one_question_that_only_reads_and_leaves_no_triplet() -> None:
    w = World(client_known_after=1)
    await w.know()
    await w.send()  # written once a day
    w.clock.advance(RECENT_S)
    w.store.asked.clear()
    before = w.keys
    await w.send(mail_from="new@example.com", rcpts=["a@example.org", "b@example.org"])
    assert {type(each) for each in w.store.asked} == {Get}
    assert w.keys == before


async def test_who_has_just_come_back_is_known_for_the_next_recipient_of_the_same_message() -> None:
    w = World()
    spf_passes: dict[str, Any] = {"mail_from": "ann@example.com", "results": [spf("ann@example.com")]}
    await w.send(**spf_passes)
    w.clock.advance(300)
    both = ["bob@example.org", "new@example.org"]
    assert await w.reason(rcpts=both, **spf_passes) == "greylist_known_domain"


# --- pools ------------------------------------------------------------------------------------------------

POOL = [f"198.51.{network}.{host}" for host in range(1, 5) for network in range(12)][:40]


async def test_a_pool_with_aligned_spf_is_deferred_once() -> None:
    """40 addresses in 12 networks, each retry from another one."""
    w = World(workers=3)
    deferred = 0
    for client in POOL:
        verdict = await w.send(
            client=client, mail_from="bounce-7@mail.example.com", results=[spf("bounce-7@mail.example.com")]
        )
        deferred += verdict.action is Action.DEFER
        w.clock.advance(300)
    assert deferred == 1
    # and the next message of that provider, to somebody else, not at all
    other = {"mail_from": "ann@example.com", "rcpts": ["new@example.org"]}
    assert (
        await w.reason(client=POOL[7], results=[spf("ann@example.com")], **other) == "greylist_known_domain"
    )


@pytest.mark.parametrize("result", [each for each in Result if each is not Result.PASS])
async def test_a_spoofed_sender_gains_nothing_from_the_domain_that_is_known(result: Result) -> None:
    w = World()
    await w.know(mail_from="ann@example.com", results=[spf("ann@example.com")])
    spoofed = [spf("ann@example.com", result)]
    reason = await w.reason(client="203.0.113.9", mail_from="ann@example.com", results=spoofed)
    assert reason == "greylist_first"


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([dmarc("news.example.com"), dkim("example.com")], "greylist_known_domain"),
        ([dkim("example.com"), dmarc("example.net", Result.FAIL)], "greylist_known_domain"),
        ([dmarc("example.com", Result.FAIL)], "greylist_first"),
        ([dkim("example.com", Result.FAIL), spf("x@example.net", Result.FAIL)], "greylist_first"),
    ],
)
async def test_at_eom_a_first_mail_with_a_pass_of_a_known_domain_is_not_delayed(
    results: list[AuthResult], reason: str
) -> None:
    w = World(stage=When.EOM)
    await w.know(mail_from="ann@example.com", results=[dmarc("example.com")])
    given = {"client": "203.0.113.9", "mail_from": "x@example.net", "rcpts": ["new@example.org"]}
    assert await w.reason(results=results, **given) == reason


async def test_a_public_suffix_is_nobody() -> None:
    """Who sends as co.uk is told by his network: below it are all domains of a country."""
    w = World()
    await w.send(mail_from="ann@co.uk", results=[spf("ann@co.uk")])
    assert any(key.startswith("t 192.0.2.0/24 ") for key in w.keys)


async def test_the_null_reverse_path_is_authenticated_by_helo() -> None:
    w = World()
    helo = AuthResult("spf", Result.PASS, "", (("smtp.helo", "mx.example.com"),))
    await w.send(mail_from="", results=[helo])
    assert "t example.com <> bob@example.org" in w.keys
    # beside another reverse-path HELO says nothing about who sends
    await w.send(mail_from="ann@example.net", results=[helo])
    assert "t 192.0.2.0/24 ann@example.net bob@example.org" in w.keys


# --- who does not wait --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rcpt", ["postmaster@example.org", "Abuse@example.org", "postmaster"])
async def test_mail_to_postmaster_and_abuse_never_waits(rcpt: str) -> None:
    w = World()
    assert await w.reason(rcpts=[rcpt]) == "greylist_exempt_recipient"
    assert w.store.asked == []


async def test_recipients_may_opt_out() -> None:
    w = World(exempt_recipients=("Carl@example.org",))
    assert await w.reason(rcpts=["carl@example.org"]) == "greylist_exempt_recipient"
    assert await w.reason(rcpts=["carl@example.com"]) == "greylist_first"
    assert await w.reason(rcpts=["postmaster@example.org"]) == "greylist_first"


async def test_at_eom_one_who_opted_out_lets_nobody_else_through() -> None:
    w = World(stage=When.EOM)
    assert await w.reason(rcpts=["postmaster@example.org", "bob@example.org"]) == "greylist_first"
    assert await w.reason(rcpts=["postmaster@example.org"]) == "greylist_exempt_recipient"


async def test_at_eom_mail_waits_for_the_recipient_who_has_to_wait_longest() -> None:
    w = World(stage=When.EOM)
    await w.send(rcpts=["a@example.org"])
    w.clock.advance(200)
    verdict = await w.send(rcpts=["a@example.org", "b@example.org"])
    assert verdict.reply is not None
    assert "in 300 seconds" in verdict.reply.text
    w.clock.advance(300)
    assert await w.reason(rcpts=["b@example.org", "a@example.org"]) == "greylist_passed"


async def test_the_allow_list_names_authenticated_domains_only() -> None:
    w = World(allow=("example.com", ".example.net"))
    assert await w.reason(mail_from="a@example.com", results=[spf("a@example.com")]) == "greylist_allowed"
    assert await w.reason(mail_from="a@m.example.net", results=[spf("a@m.example.net")]) == "greylist_allowed"
    for mail_from, results in (
        ("a@example.com", []),
        ("a@example.com", [spf("a@example.com", Result.FAIL)]),
        ("b@example.net", [spf("b@example.net")]),
    ):
        assert (await w.send(mail_from=mail_from, results=results)).action is Action.DEFER


async def test_what_an_operator_allowed_passes_until_its_end() -> None:
    w = World(client_known_after=0, known_good_after=0)
    store = w.workers[0].services.store
    for origin in ("203.0.113.0/24", "example.com"):
        await store.ask(store.put(f"o {origin}", Credit(is_allowed=True).encoded(), ttl_s=100 * DAY_S))
    for _ in range(2):
        w.clock.advance(49 * DAY_S)
        assert await w.reason(client="203.0.113.9") == "greylist_allowed"
        assert await w.reason(mail_from="a@example.com", results=[spf("a@example.com")]) == "greylist_allowed"
        assert await w.reason(mail_from="a@example.com") == "greylist_first"
    w.clock.advance(3 * DAY_S)
    assert await w.reason(client="203.0.113.9") == "greylist_first"


async def test_tls_passes_where_the_operator_wants_it() -> None:
    tls = TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384")
    assert await World(pass_tls=True).reason(tls=tls) == "greylist_tls"
    assert await World(pass_tls=True).reason() == "greylist_first"
    assert await World().reason(tls=tls) == "greylist_first"


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ("192.0.2.1", "greylist_dnswl"),
        ("2001:db8::1", "greylist_dnswl"),
        ("192.0.2.2", "greylist_first"),  # 127.0.0.255: the list refuses to answer
        ("192.0.2.3", "greylist_first"),  # a domain that was sold answers everything
        ("192.0.2.4", "greylist_first"),
    ],
)
async def test_clients_on_a_dns_list_pass(client: str, reason: str) -> None:
    listed = {
        "1.2.0.192.wl.example": "127.0.5.1",
        f"1.{'0.' * 23}8.b.d.0.1.0.0.2.wl.example": "127.0.5.1",
        "2.2.0.192.wl.example": "127.0.0.255",
        "3.2.0.192.wl.example": "203.0.113.1",
    }
    zone = Zone({name: {RRType.A: [ip_address(address)]} for name, address in listed.items()})
    assert await World(zone, dnswl="wl.example").reason(client=client) == reason


async def test_a_hidden_client_is_judged_by_its_domain_or_not_at_all() -> None:
    w = World(stage=When.EOM)
    hidden = AddressSource.HIDDEN
    assert await w.reason(source=hidden) == "greylist_client_hidden"
    assert await w.reason(source=hidden, results=[dkim("example.com")]) == "greylist_first"
    assert [key for key in w.keys if key.startswith("t ")] == [
        "t example.com ann@example.net bob@example.org"
    ]
    assert w.metrics["mxgate_greylist_skipped_total", "client_hidden"] == 1


async def test_a_balancer_on_a_dns_list_says_nothing_about_its_clients() -> None:
    zone = Zone({"1.2.0.192.wl.example": {RRType.A: [ip_address("127.0.5.1")]}})
    w = World(zone, dnswl="wl.example", stage=When.EOM)
    reason = await w.reason(source=AddressSource.HIDDEN, results=[dkim("example.com")])
    assert reason == "greylist_first"


async def test_a_pass_of_no_domain_authenticates_nobody() -> None:
    w = World(stage=When.EOM)
    nobody = [dmarc("not a domain"), AuthResult("dmarc", Result.PASS), dkim("")]
    await w.send(results=nobody)
    assert "t 192.0.2.0/24 ann@example.net bob@example.org" in w.keys


# --- several workers at once ---


class Meanwhile(FakeStore):
    """Does something, once, before an entry is replaced."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.then: Callable[[], Awaitable[object]] | None = None

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if self.then is not None and any(isinstance(each, Replace) for each in operations):
            then, self.then = self.then, None
            await then()
        return await super().run(operations)


async def test_of_two_workers_that_see_one_retry_one_gives_the_credit() -> None:
    clock = FakeClock()
    store = Meanwhile(clock)
    one, other = (Ledger(Keyspace(store, PREFIX), Timing()) for _ in range(2))
    key = "t 192.0.2.0/24 ann@example.net bob@example.org"
    known = await one.standings(["192.0.2.0/24"])
    await one.attempts(known, [key], clock.now())
    clock.advance(300)
    store.then = lambda: other.attempts(known, [key], clock.now())
    (decision,) = await one.attempts(known, [key], clock.now())
    assert decision.standing is Standing.IN_TIME
    assert decode_credit(store.entries[f"{PREFIX}o 192.0.2.0/24"]).passes == 1


async def test_a_retry_takes_nothing_from_what_the_operator_allows_meanwhile() -> None:
    clock = FakeClock()
    store = Meanwhile(clock)
    keys = Keyspace(store, PREFIX)
    ledger = Ledger(keys, Timing())
    key = "t 192.0.2.0/24 ann@example.net bob@example.org"
    known = await ledger.standings(["192.0.2.0/24"])
    await ledger.attempts(known, [key], clock.now())
    clock.advance(300)
    allowed = Credit(is_allowed=True).encoded()
    store.then = lambda: keys.ask(keys.put("o 192.0.2.0/24", allowed, ttl_s=DAY_S))
    await ledger.attempts(known, [key], clock.now())
    assert store.entries[f"{PREFIX}o 192.0.2.0/24"] == allowed


# --- settings -----------------------------------------------------------------------------------------------


async def test_with_a_delay_of_0_nobody_is_deferred_and_everybody_is_learnt() -> None:
    w = World(delay_s=0)
    for number in range(5):
        assert await w.reason(rcpts=[f"{number}@example.org"]) == "greylist_passed"
    assert await w.reason(rcpts=["new@example.org"]) == "greylist_known_client"
    assert await w.reason(mail_from="a@example.com", results=[spf("a@example.com")]) != "greylist_first"
    assert w.metrics.of("mxgate_greylist_deferred_total") == {}


async def test_with_a_delay_of_0_a_stranger_costs_two_questions() -> None:
    w = World(delay_s=0)
    await w.send()
    asked: list[list[str]] = []
    run = w.store.run

    async def noted(operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        asked.append([each.key.removeprefix(PREFIX) for each in operations])
        return await run(operations)

    w.store.run = noted  # type: ignore[method-assign]
    await w.send(mail_from="a@example.com", results=[spf("a@example.com")])
    assert asked == [
        ["o example.com", "o 192.0.2.0/24", "n 192.0.2.0/24"],
        ["t example.com a@example.com bob@example.org", "o example.com"],
    ]


async def test_with_a_delay_of_0_the_next_recipient_finds_the_credit() -> None:
    w = World(delay_s=0)
    sender: dict[str, Any] = {"mail_from": "a@example.com", "results": [spf("a@example.com")]}
    verdict = await w.send(**sender, rcpts=["a@example.org", "b@example.org"])
    assert verdict.reason == "greylist_known_domain"


async def test_who_is_known_is_asked_for_again_after_two_seconds() -> None:
    w = World()
    sender: dict[str, Any] = {"mail_from": "a@example.com", "results": [spf("a@example.com")]}
    await w.know(**sender)
    assert await w.reason(**sender) == "greylist_known_domain"
    w.store.asked.clear()
    w.clock.advance(RECENT_S - 0.1)
    assert await w.reason(**sender, rcpts=["new@example.org"]) == "greylist_known_domain"
    assert w.store.asked == []
    await w.store.run([Delete(key) for key in w.store.entries])
    w.clock.advance(0.2)
    assert await w.reason(**sender) == "greylist_first"
    # of a stranger nothing is kept in mind
    w.store.asked.clear()
    assert await w.reason(**sender) == "greylist_early"
    assert w.store.asked


async def test_a_transaction_that_goes_on_and_on_keeps_nobody_known() -> None:
    w = World()
    sender: dict[str, Any] = {"mail_from": "a@example.com", "results": [spf("a@example.com")]}
    await w.know(**sender)
    (worker,) = w.workers
    path = parse_reverse_path("<a@example.com>", smtputf8=False)
    tx = Transaction(
        "S-1", Session("S", ip_address("192.0.2.1"), 25), Envelope(path), results=(spf("a@example.com"),)
    )
    rcpt = Recipient(parse_forward_path("<b@example.org>", smtputf8=False))
    await worker.on_rcpt(tx, rcpt)
    await w.store.run([Delete(key) for key in w.store.entries])
    for _ in range(3):
        w.clock.advance(RECENT_S)
        # what it was told holds for this transaction, and for no other
        assert (await worker.on_rcpt(tx, rcpt)).reason == "greylist_known_domain"
        assert (await w.reason(**sender)) in ("greylist_first", "greylist_early")


async def test_what_a_slow_store_says_is_as_old_as_the_question() -> None:
    w = World()
    sender: dict[str, Any] = {"mail_from": "a@example.com", "results": [spf("a@example.com")]}
    await w.know(**sender)
    w.clock.advance(RECENT_S)
    run = w.store.run

    async def slow(operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        answers = await run(operations)
        w.clock.advance(RECENT_S)
        return answers

    w.store.run = slow  # type: ignore[method-assign]
    assert await w.reason(**sender) == "greylist_known_domain"
    w.store.asked.clear()
    await w.send(**sender)
    assert w.store.asked


async def test_who_lost_the_race_for_a_retry_finds_the_credit_of_the_other_worker() -> None:
    clock = FakeClock()
    store = Meanwhile(clock)
    services = replace(
        FakeServices(clock=clock, metrics=FakeMetrics(), dns=FakeDns()), store=Keyspace(store, PREFIX)
    )
    one, other = (Greylist(GreylistSettings(), services) for _ in range(2))
    path = parse_reverse_path("<a@example.com>", smtputf8=False)
    bob, new = (
        Recipient(parse_forward_path(f"<{each}@example.org>", smtputf8=False)) for each in ("bob", "new")
    )

    def transaction() -> Transaction:
        session = Session("S", ip_address("192.0.2.1"), 25)
        return Transaction("S-1", session, Envelope(path), results=(spf("a@example.com"),))

    await one.on_rcpt(transaction(), bob)
    clock.advance(300)
    store.then = lambda: other.on_rcpt(transaction(), bob)
    tx = transaction()
    assert (await one.on_rcpt(tx, bob)).reason == "greylist_passed"
    assert (await one.on_rcpt(tx, new)).reason == "greylist_known_domain"


async def test_a_flood_of_known_senders_is_not_kept_in_mind() -> None:
    w = World()
    (worker,) = w.workers
    for number in range(10_000):
        worker._note(f"{number}.example", Skip.KNOWN_DOMAIN, 0.0)
        assert len(worker._known) <= 4096


async def test_recipients_of_a_domain_may_count_as_one() -> None:
    w = World(recipient=Per.DOMAIN)
    await w.know(rcpts=["a@example.org"])
    assert await w.reason(rcpts=["b@example.org"]) == "greylist_known_triplet"
    assert await w.reason(rcpts=["b@example.com"]) == "greylist_first"


async def test_a_flood_of_strangers_from_one_network_is_deferred_and_not_recorded() -> None:
    w = World(max_new_per_hour=3)
    await w.send()
    for number in range(5):
        await w.send(mail_from=f"flood{chr(97 + number)}@example.net")
    assert len([key for key in w.keys if key.startswith("t ")]) == 3
    assert w.metrics["mxgate_greylist_deferred_total", "over_limit"] == 3
    # domains of one's own do not help, and who was recorded is still let through
    own = {"mail_from": "x@flood.example", "results": [spf("x@flood.example")]}
    assert await w.reason(**own) == "greylist_over_limit"
    assert await w.reason(client="198.51.100.1") == "greylist_first"
    w.clock.advance(300)
    assert await w.reason() == "greylist_passed"
    w.clock.advance(3600)
    assert await w.reason(mail_from="floodz@example.net") == "greylist_first"


async def test_who_never_came_back_is_counted_once_when_the_retries_of_the_day_are_over() -> None:
    w = World(workers=2)
    await w.know()
    for number in range(3):
        await w.send(rcpts=[f"{number}@example.org"])
    for _ in range(4):
        w.clock.advance(DAY_S)
        await w.send(client="198.51.100.1", mail_from="later@example.com")
        await w.send(client="198.51.100.1", mail_from="later@example.com")
    assert w.metrics["mxgate_greylist_never_came_back_total",] == 3


async def test_a_worker_looks_once_a_day_for_days_to_count() -> None:
    w = World()
    closing = []
    for number in range(3):
        await w.send(rcpts=[f"{number}@example.org"])
        closing.append(len([each for each in w.store.asked if each.key.startswith(f"{PREFIX}x ")]))
    assert closing == [7, 7, 7]
    w.clock.advance(DAY_S)
    await w.send()
    assert len([each for each in w.store.asked if each.key.startswith(f"{PREFIX}x ")]) == 14


def test_the_stage_of_the_settings_is_the_one_that_is_planned() -> None:
    assert Greylist.stages() == {Stage.RCPT, Stage.EOM}
    assert Greylist.stages(GreylistSettings()) == {Stage.RCPT}
    assert Greylist.stages(GreylistSettings(stage=When.EOM)) == {Stage.EOM}


@pytest.mark.parametrize(
    "keys",
    [
        {"delay_s": -1},
        {"delay_s": 100_000},
        {"delay_s": 300, "retry_window_s": 300},
        {"retry_window_s": float("nan")},
        {"lifetime_s": 1},
        {"lifetime_s": 1e9},
        {"client_known_after": -1},
        {"stage": "mail"},
        {"allow": ["no domain"]},
        {"dnswl": "no domain"},
        {"recipient": "nobody"},
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(GreylistSettings).validate_python(keys)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "greylisting.md").read_text("utf-8")


def test_the_settings_are_those_of_the_document() -> None:
    section = DOCUMENT[DOCUMENT.index("## Settings") : DOCUMENT.index("**At RCPT or")]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", section, flags=re.MULTILINE)
    defaults = GreylistSettings()
    assert [name for name, _, _ in rows] == [each.name for each in fields(GreylistSettings)]
    for (name, default, meaning), each in zip(rows, fields(GreylistSettings), strict=True):
        value = getattr(defaults, name)
        assert json.loads(default) == (list(value) if isinstance(value, tuple) else value)
        assert meaning == each.metadata["doc"]


def test_the_reasons_are_those_of_the_document() -> None:
    section = DOCUMENT[DOCUMENT.index("## Who waits") : DOCUMENT.index("## Settings")]
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == {*Skip}


# --- the store is away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_outage", "action"), [(OnError.CONTINUE, Action.CONTINUE), (OnError.DEFER, Action.DEFER)]
)
async def test_without_the_store_it_does_what_the_operator_wants(on_outage: OnError, action: Action) -> None:
    w = World()
    w.store.error = StoreDownError("timeout", on_outage)
    verdict = await w.send()
    assert (verdict.action, verdict.reason) == (action, "greylist_store_down")
    assert verdict.reply is None or verdict.reply.code == 451
    assert w.metrics["mxgate_greylist_skipped_total", "store_down"] == 1
    w.store.error = None
    assert await w.reason() == "greylist_first"


async def test_what_others_wrote_into_the_store_harms_nobody() -> None:
    w = World()
    store = w.workers[0].services.store
    for key in ("o 192.0.2.0/24", "n 192.0.2.0/24", "t 192.0.2.0/24 ann@example.net bob@example.org"):
        await store.ask(store.put(key, b"\xff+", ttl_s=DAY_S))
    assert await w.reason() == "greylist_first"
    w.clock.advance(300)
    assert await w.reason() == "greylist_passed"


# --- the state machine ----------------------------------------------------------------------------------------


class Greylisting(RuleBasedStateMachine):
    """Three workers on one store against a model: who passed, and when each one that waits came first."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(workers=3, known_good_after=0, client_known_after=0, retry_window_s=3600)
        self.first: dict[tuple[str, str], int] = {}
        self.passed: set[tuple[str, str]] = set()
        self.told: dict[tuple[str, str], float] = {}

    @rule(seconds=st.floats(0, 4000))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @rule(sender=st.sampled_from("abc"), rcpt=st.sampled_from("xy"), host=st.integers(1, 254))
    def an_attempt(self, sender: str, rcpt: str, host: int) -> None:
        now_s, who = self.world.clock.now(), (sender, rcpt)
        verdict = asyncio.run(
            self.world.send(
                client=f"192.0.2.{host}", mail_from=f"{sender}@example.net", rcpts=[f"{rcpt}@example.org"]
            )
        )
        waited_s = now_s - self.first.get(who, now_s)
        if who in self.passed:
            assert verdict.action is Action.CONTINUE
        elif who in self.first and 301 <= waited_s < 3599:
            assert verdict.reason == "greylist_passed"
        elif who not in self.first or waited_s > 3600 + 1:
            assert verdict.reason == "greylist_first"
        if verdict.reason == "greylist_first":
            self.first[who] = int(now_s)
        elif verdict.action is Action.CONTINUE:
            self.passed.add(who)
        if verdict.reply is not None and who in self.told and verdict.reason == "greylist_early":
            assert now_s < self.told[who], "who came as late as he was told had to wait again"
        if verdict.reply is not None:
            self.told[who] = now_s + int(verdict.reply.text.split()[-2])

    @invariant()
    def nothing_is_kept_but_what_has_an_end(self) -> None:
        assert len(self.world.keys) < 200


Greylisting.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestGreylisting = Greylisting.TestCase


@given(st.lists(st.sampled_from([300.0, 0.0, 86_400.0]), max_size=4))
@settings(max_examples=20, deadline=None)
async def test_a_clock_that_jumps_makes_no_attempt_fail(jumps: list[float]) -> None:
    w = World()
    for jump in jumps:
        w.clock.time_s += jump - 1000
        assert (await w.send()).action in (Action.CONTINUE, Action.DEFER)
