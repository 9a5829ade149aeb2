"""PolicyContract: what every policy owes the gateway, as tests; and what `mxgate plugin test` runs.

    class TestSunday(PolicyContract):
        policy = NoMailOnSunday
        settings = Settings(days=("sunday",))        # only where the defaults are not enough

It holds for any policy, so it says nothing about what yours decides: that is for tests of your own. Each test plays
sessions through the real gatekeeper and pipeline; none waits for real time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import time
import typing
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ClassVar

from gateway.lookup import BUDGET, Answer, Found, Mx, Question, RRType
from gateway.policy import OnError, Policy, has_hook
from gateway.services import HttpError, HttpResponse
from gateway.session import client_address
from gateway.store import StoreDownError, StoreError
from gateway.testing.fakes import (
    FakeClock,
    FakeDns,
    FakeHttp,
    FakeServices,
    HttpAnswer,
    HttpRequest,
    nobody_answers,
)
from gateway.testing.harness import Client, Harness, Played
from gateway.testing.mail import compose
from gateway.testing.zone import Zone
from gateway.verdict import Action, Stage

# The longest wait of one check for what should take no time at all, seconds.
_PATIENCE_S = 30.0
# More suspensions than a hook of any use has; behind them it is taken not to end.
_MOST_AWAITS = 200
_CONCURRENT = 50
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HOOKS = (*(f"on_{stage}" for stage in Stage), "on_send", "on_outcome", "start", "stop")
_BODY = "\r\nHello.\r\n"


class _RunningClock(FakeClock):
    """Its monotonic time runs, so that the pipeline sees who keeps the loop busy."""

    def monotonic(self) -> float:
        return self.uptime_s + time.monotonic()


class _Everywhere(Zone):
    """A world in which every question has this answer."""

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        super().__init__()
        self._says = answer

    def answer(self, question: Question) -> Answer:
        return self._says(question)


def _nonsense(question: Question) -> Answer:
    """Records that no policy expects."""
    match question.rrtype:
        case RRType.A:
            return Answer(Found.RECORDS, tuple(client_address(f"127.255.255.{n}") for n in range(255)))
        case RRType.AAAA:
            return Answer(Found.RECORDS, (client_address("::"), client_address("ff02::1")))
        case RRType.MX:
            return Answer(Found.RECORDS, (Mx(0, ""), Mx(65_535, "a" * 63)))
        case RRType.TXT:
            return Answer(Found.RECORDS, (b"", b"\x00\xff" * 2000, b"v=", b"%{i}" * 500))
        case _:
            return Answer(Found.RECORDS, ("", ".", "a" * 253, "xn--a.example", "é.example"))


def _fails_with(reason: str) -> HttpAnswer:
    def answer(request: HttpRequest) -> HttpResponse:
        raise HttpError(reason, request.url)

    return answer


def _says(status: int, content: bytes) -> HttpAnswer:
    return lambda _: HttpResponse(status, content)


class PolicyContract:
    """Derive a class named Test..., and say which policy it is about; pytest finds the tests."""

    policy: ClassVar[type[Policy[Any]]]
    settings: ClassVar[object] = None
    """An object of the policy's Settings; None: its defaults."""
    zone: ClassVar[Zone | str] = ""
    """DNS in all tests that do not bring their own."""

    def http(self, request: HttpRequest) -> HttpResponse:
        """What the services say that the policy asks by HTTP: for a policy with `needs_http` to override."""
        return nobody_answers(request)

    def test_declares_name_settings_and_hooks(self) -> None:
        """The declaration is what the engine takes: a name, a frozen dataclass, hooks that are coroutines."""
        policy = self.policy
        assert _NAME.fullmatch(policy.name), f"name {policy.name!r} is not [a-z][a-z0-9_]*"
        assert dataclasses.is_dataclass(policy.Settings), "Settings is not a dataclass"
        frozen = policy.Settings.__dataclass_params__.frozen  # type: ignore[attr-defined]  # typeshed has no name for it
        assert frozen, "Settings is not frozen"
        assert policy.stages() or has_hook(policy, "on_outcome"), "no hook is overridden"
        for hook in _HOOKS:
            assert inspect.iscoroutinefunction(getattr(policy, hook)), f"{hook} is no coroutine function"
        assert not inspect.iscoroutinefunction(policy.on_header), "on_header is a coroutine function"
        for words in (policy.requires, policy.after):
            assert isinstance(words, tuple), f"requires and after are tuples of names, not {words!r}"

    def test_documents_each_setting(self) -> None:
        """Each field of Settings says what it means: `field(metadata={"doc": ...})`."""
        missing = [*_undocumented(self.policy.Settings)]
        assert not missing, f"without metadata={{'doc': ...}}: {', '.join(missing)}"

    def test_takes_fifty_transactions_at_once(self) -> None:
        """One object serves all sessions: it gets no attributes by judging mail."""

        async def check() -> None:
            harness = self._harness(turns=1)
            await harness.play()
            before = vars(harness.policy).keys() | set()
            async with asyncio.TaskGroup() as group:
                for number in range(_CONCURRENT):
                    group.create_task(
                        harness.play(
                            compose(f"ann{number}@client{number}.example"),
                            client=f"192.0.2.{number + 1}",
                            mail_from=f"ann{number}@client{number}.example",
                            rcpts=[f"bob{number}@example.org"],
                        )
                    )
            more = vars(harness.policy).keys() - before
            assert not more, f"attributes that appeared while it judged mail: {', '.join(sorted(more))}"
            await self._end(harness)

        self._check(check())

    def test_can_be_cancelled_at_each_await(self) -> None:
        """The client goes away while the policy waits: nothing is left running, the next message is judged as ever."""

        async def check() -> None:
            harness = self._harness(turns=2)
            await harness.play()
            for turns in range(_MOST_AWAITS):
                playing = asyncio.ensure_future(harness.play())  # noqa: TID251  # cancelled by hand
                for _ in range(turns):
                    await asyncio.sleep(0)
                if playing.done():
                    playing.result()
                    break
                playing.cancel()
                await asyncio.wait([playing])
                # what a policy does behind its cancellation, and what is cancelled with it, ends now
                for _ in range(10):
                    await asyncio.sleep(0)
                left = asyncio.all_tasks() - {asyncio.current_task()}
                assert not left, f"still running after the client went away: {left}"
                if not playing.cancelled():
                    playing.result()
            await harness.play()
            await self._end(harness)

        self._check(check())

    def test_takes_the_null_reverse_path(self) -> None:
        """MAIL FROM:<> is what every bounce has; `tx.envelope.mail_from` is None."""
        self._plays(mail_from="")

    def test_takes_clients_of_ipv6(self) -> None:
        """Addresses of either version, and what such a client says in EHLO."""
        self._plays(client=Client("2001:db8::1", "[IPv6:2001:db8::1]"))
        self._plays(client=Client("::ffff:192.0.2.7", "[192.0.2.7]"))

    def test_takes_any_helo(self) -> None:
        """EHLO holds whatever the client says; nothing about it is checked before a policy does."""
        for helo in ("x", "localhost", "a_b.example", "[", "é.example", "a" * 500, "%s%n$(id)"):
            self._plays(client=Client("192.0.2.1", helo))

    def test_takes_addresses_beyond_ascii(self) -> None:
        """SMTPUTF8 (RFC 6531): local parts and domains in UTF-8, a quoted local part, a domain literal."""
        self._plays(
            compose("Jörg <jörg@bücher.example>"), mail_from="jörg@bücher.example", rcpts=["用户@example.org"]
        )
        self._plays(mail_from='"a b@c"@client.example', rcpts=["postmaster", '"x y"@example.org'])
        self._plays(mail_from="ann@[192.0.2.1]", rcpts=["bob@[IPv6:2001:db8::1]"])

    def test_takes_many_recipients(self) -> None:
        """The recipients of one transaction, the same one twice among them."""
        self._plays(rcpts=[*(f"bob{number}@example.org" for number in range(100)), "bob0@example.org"])

    def test_takes_no_author_and_two(self) -> None:
        """A message without From, with two fields of it, with two authors in one, and with nonsense in it."""
        for header in (
            "Subject: x\r\n",
            "From: a@a.example\r\nFrom: b@b.example\r\n",
            "From: a@a.example, b@b.example\r\n",
            "From: \r\n",
            "From: undisclosed\r\n",
            "From: a@@a..example\r\n",
            "From: " + "(" * 500 + "\r\n",
        ):
            self._plays((header + _BODY).encode())

    def test_takes_content_that_is_no_mail(self) -> None:
        """No header, no body, nothing at all, octets of no character set, a line that is no field."""
        for content in (
            b"",
            b"\r\n",
            b"From: a@a.example\r\n",
            b"\r\nno header\r\n",
            b"From: a@a.example\r\nno field\r\n\r\nx\r\n",
            b"From: a@a.example\r\nSubject: \xff\xfe =?x?q?=00?=\r\n\r\n\x80\x81\r\n.\r\n",
            b"From: a@a.example\r\n\r\n" + b"x" * 990 + b"\r\n" + b"." * 70_000 + b"\r\n",
        ):
            self._plays(content)

    def test_trouble_of_dns_is_no_refusal_for_good(self) -> None:
        """Every question times out, fails, or comes too late: the policy goes on or defers, and does not fail."""
        for why in ("timeout", "servfail", "refused", BUDGET):
            failure = Answer(Found.TEMPORARY_FAILURE, why=why)
            zone = _Everywhere(lambda _, failure=failure: failure)  # type: ignore[misc]  # mypy wants a Callable of one
            for played in self._plays(zone=zone):
                refused = [judged for judged in played.judged if judged.verdict.action is Action.REJECT]
                assert not (zone.trail and refused), (
                    f"rejects where DNS has no answer ({why}): {refused[0].verdict.reply}"
                )

    def test_trouble_of_the_store_is_no_refusal_for_good(self) -> None:
        """The store does not answer: the policy goes on, defers, or lets the error pass; then all is as before."""
        for on_outage in OnError:
            with self._harness(may_fail=True) as harness:
                before = harness.deliver()
                harness.store.error = StoreDownError("connect", on_outage)
                self._no_new_refusal(before, harness.deliver(), "the store does not answer", StoreError)
                harness.store.error = None
                self._as_before(harness.deliver())

    def test_trouble_of_services_is_no_refusal_for_good(self) -> None:
        """HTTP has no answer, or one that is nonsense: as with the store. What a good one is, `http` says."""
        for answer in (
            _fails_with("connect"),
            _fails_with("timeout"),
            _says(500, b""),
            _says(200, b"\xff<{"),
        ):
            with self._harness(may_fail=True) as harness:
                # unless a test says what the services say, nobody answers from the beginning
                before = harness.deliver() if type(self).http is not PolicyContract.http else None
                answering, harness.http.answer = harness.http.answer, answer
                asked = len(harness.http.requests)
                during = harness.deliver()
                if len(harness.http.requests) > asked:
                    self._no_new_refusal(before, during, "a service does not answer", HttpError)
                harness.http.answer = answering
                self._as_before(harness.deliver())

    def test_takes_any_answer_of_dns(self) -> None:
        """Records that nobody expects, and a world without any."""
        self._plays(zone=_Everywhere(_nonsense))
        self._plays(zone=_Everywhere(lambda _: Answer(Found.NO_SUCH_NAME)))

    def test_does_not_keep_the_loop_busy(self) -> None:
        """No hook holds up all other sessions (0.5 s at once), also for a message of a megabyte."""
        with self._harness() as harness:
            harness.deliver(compose(body="a line of text\r\n" * 70_000))
            blocked = [line for line in harness.log.lines if line.event == "policy.blocked"]
        assert not blocked, f"kept the loop busy: {blocked[0].keys}"

    def test_starts_and_stops_and_leaves_nothing_running(self) -> None:
        """`stop` ends what `start` began."""

        async def check() -> None:
            harness = self._harness()
            await harness.play()
            await self._end(harness)

        self._check(check())

    @staticmethod
    def _no_new_refusal(before: Played | None, during: Played, what: str, expected: type[Exception]) -> None:
        """Nobody is refused for good who was not before; the only failure is that the error was let pass."""
        refused = [judged for judged in during.judged if judged.verdict.action is Action.REJECT]
        earlier = before.judged if before is not None else ()
        is_old = any(judged.verdict.action is Action.REJECT for judged in earlier)
        assert is_old or not refused, f"rejects where {what}: {refused[0].verdict.reply}"
        kinds = {expected.__name__, *(each.__name__ for each in expected.__subclasses__())}
        others = [each for each in during.failures if not any(f"{kind}(" in each for kind in kinds)]
        assert not others, f"where {what}: {others[0]}"

    @staticmethod
    def _as_before(behind: Played) -> None:
        others = [each for each in behind.failures if "HttpError(" not in each]
        assert not others, f"still fails when the trouble is over: {others[0]}"

    def _harness(self, zone: Zone | None = None, *, turns: int = 0, may_fail: bool = False) -> Harness[Any]:
        if zone is None:
            zone = Zone.parse(self.zone) if isinstance(self.zone, str) else Zone(self.zone.nodes)
        services = FakeServices(
            clock=_RunningClock(), dns=FakeDns(zone, turns=turns), http=FakeHttp(self.http, turns=turns)
        )
        harness: Harness[Any] = Harness(self.policy, self.settings, services=services, may_fail=may_fail)
        harness.store.turns = turns
        return harness

    def _plays(self, message: bytes | None = None, *, zone: Zone | None = None, **given: Any) -> list[Played]:
        """A session with an answer at once, and one for which DNS is waited; both end without a failure."""
        played = []
        for turns in (0, 1):
            with self._harness(zone, turns=turns) as harness:
                played.append(harness.deliver(message, **given))
        return played

    @staticmethod
    async def _end(harness: Harness[Any]) -> None:
        await harness.stop()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"still running behind stop(): {left}"

    @staticmethod
    def _check(check: Coroutine[Any, Any, None]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(_PATIENCE_S):
                await check

        asyncio.run(limited())


def _undocumented(settings: type, prefix: str = "") -> Iterator[str]:
    """The fields without a word on them, also of dataclasses in the dataclass."""
    hints = typing.get_type_hints(settings)
    for each in dataclasses.fields(settings):
        if not str(each.metadata.get("doc", "")).strip():
            yield prefix + each.name
        inner = hints[each.name]
        for kind in (inner, *typing.get_args(inner)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from _undocumented(kind, f"{prefix}{each.name}.")
