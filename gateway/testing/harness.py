"""Harness: one policy in the gatekeeper and pipeline that `mxgate serve` runs; a test plays the client.

    harness = Harness(NoMailOnSunday, Settings(days=("sunday",)), zone='example.org. 60 IN TXT "v=spf1 -all"')
    played = harness.deliver(mail_from="ann@client.example")
    assert str(played.reply) == "451 4.7.1 Come back on Monday"
    assert played.verdict(Stage.MAIL).reason == "sunday"

`deliver` runs a loop of its own; where one runs already, `await harness.play(...)` is the same. Time stands still until
`harness.clock.advance(...)`, DNS is the zone and nothing else, the downstream takes what it is given and keeps it.
A policy that fails makes the test fail, with its exception, unless the harness was told to let it.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from gateway.decision import Judged
from gateway.gatekeeper import Conversation, Gatekeeper, GatekeeperSettings
from gateway.mail.body import Spool
from gateway.own_names import under_name
from gateway.pipeline import Pipeline
from gateway.plan import RECIPIENT, Step
from gateway.policy import Mode, NoSettings, Policy
from gateway.services import NoHttp, Services
from gateway.session import AddressSource, Envelope, Recipient, Session, Trust, client_address
from gateway.smtp.address import Mailbox, parse_forward_path, parse_reverse_path
from gateway.smtp.content import stuff
from gateway.smtp.reply import Reply
from gateway.store import Keyspace
from gateway.testing.fakes import FakeClock, FakeDns, FakeHttp, FakeLog, FakeMetrics, FakeRelay, FakeServices
from gateway.testing.mail import compose
from gateway.testing.store import FakeStore
from gateway.testing.zone import Zone
from gateway.verdict import AuthResult, Stage, Verdict, proceed

P = TypeVar("P", bound=Policy[Any])
T = TypeVar("T")

HOSTNAME = "mx.example.org"
_PORT = 40_000
_BLOCK_BYTES = 1000


class PolicyFailedError(AssertionError):
    """The policy failed where a test did not expect it; the cause is its own exception, where it raised one."""


class NotAskedError(AssertionError):
    """The policy was not asked at this stage: it has no such hook, is exempt, or the session ended before."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who connects, and what is known about it."""

    address: str = "192.0.2.1"
    helo: str = "client.example"
    trust: Trust = Trust.UNTRUSTED
    source: AddressSource = AddressSource.SOCKET
    user: str | None = None
    """Who it proved to be; with `trust` authenticated."""


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one session.

    `replies` are what the client was told at MAIL, for each RCPT, and at the end of the content, as far as it came;
    `message` is what the downstream got, None when nothing. `judged` is every verdict of the policy in order.
    """

    policy: str
    replies: tuple[Reply, ...]
    judged: tuple[Judged, ...]
    message: bytes | None
    failures: tuple[str, ...] = ()

    @property
    def reply(self) -> Reply:
        """The last word to the client."""
        return self.replies[-1]

    @property
    def results(self) -> tuple[AuthResult, ...]:
        """What the policy found, of all stages."""
        return tuple(result for judged in self.judged for result in judged.verdict.results)

    def verdict(self, stage: Stage, rcpt: str = "") -> Verdict:
        """The policy's own word at a stage, the last where there are several; of an observed one what it would say.

        `rcpt`: the one about this recipient. Raises NotAskedError.
        """
        for judged in reversed(self.judged):
            if judged.stage is stage and (not rcpt or _is_about(judged, rcpt)):
                return judged.would_be or judged.verdict
        raise NotAskedError(
            f"{self.policy} was not asked at {stage}{f' about {rcpt}' * bool(rcpt)}; the replies were "
            + "; ".join(map(str, self.replies))
        )


class Harness(Generic[P]):
    """A policy and everything around it.

    `settings` are an object of its Settings, its defaults when None. `results` are what other policies found before;
    what the policy `requires` is in the plan, and finds nothing else. Engine keys that are not given are the policy's
    own defaults. A policy that needs a store has `store`.
    """

    def __init__(
        self,
        policy: type[P],
        settings: object = None,
        *,
        zone: Zone | str = "",
        results: Sequence[AuthResult] = (),
        mode: Mode = Mode.ENFORCE,
        may_fail: bool = False,
        services: FakeServices | None = None,
    ) -> None:
        self.services = services or FakeServices(
            dns=FakeDns(Zone.parse(zone) if isinstance(zone, str) else zone)
        )
        self.downstream = FakeRelay()
        self.store = FakeStore(self.services.clock)
        own = under_name(self.services, policy.name)
        if policy.needs_store:
            own = replace(own, store=Keyspace(self.store, ""))
        if not policy.needs_http:
            own = replace(own, http=NoHttp())
        self.policy: P = policy(policy.Settings() if settings is None else settings, own)
        self._may_fail = may_fail
        self._is_started = False
        steps = [_stand_in(name, ()) for name in policy.requires if name != RECIPIENT]
        steps.append(_stand_in("others", results))
        steps.append(Step(self.policy, policy.timeout_s, policy.on_error, mode, policy.exempt))
        gatekeeper = GatekeeperSettings(HOSTNAME)
        reserved = frozenset([gatekeeper.quarantine_header.lower()])
        self._pipeline = _KeepsAll(steps, self.services, policy.name, reserved)
        count = iter(range(1, sys.maxsize))
        self._gate = Gatekeeper(
            gatekeeper,
            self._pipeline,
            self.downstream,
            Spool(memory_bytes=1 << 20),
            self.services,
            lambda: f"T{next(count)}",
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def clock(self) -> FakeClock:
        """Time, which stands still until it is moved."""
        return self.services.clock

    @property
    def log(self) -> FakeLog:
        """What was logged, by the policy and by the engine."""
        return self.services.log

    @property
    def metrics(self) -> FakeMetrics:
        """What was counted; the policy's own families begin with `mxgate_` and its name."""
        return self.services.metrics

    @property
    def http(self) -> FakeHttp:
        """The services that the policy asks by HTTP: `harness.http.answer = ...`; `harness.http.requests`."""
        return self.services.http

    @property
    def zone(self) -> Zone:
        """DNS; `zone.trail` is what was asked."""
        return self.services.dns.zone

    def deliver(
        self,
        message: bytes | None = None,
        *,
        client: Client | str = "192.0.2.1",
        helo: str = "client.example",
        mail_from: str = "ann@client.example",
        rcpts: Iterable[str] = ("bob@example.org",),
    ) -> Played:
        """One session with one message; see `play`. Starts the policy before its first one."""
        playing = self.play(message, client=client, helo=helo, mail_from=mail_from, rcpts=rcpts)
        return self._run(playing)

    async def play(
        self,
        message: bytes | None = None,
        *,
        client: Client | str = "192.0.2.1",
        helo: str = "client.example",
        mail_from: str = "ann@client.example",
        rcpts: Iterable[str] = ("bob@example.org",),
    ) -> Played:
        """One session: connect, EHLO, MAIL, the RCPTs together, the content where one was accepted.

        `mail_from` "" is the null reverse-path. `client` is an address, or a Client with what else is known. Raises
        what `policy.start` raises, and PolicyFailedError.
        """
        if not self._is_started:
            await self._pipeline.start()
            self._is_started = True
        who = client if isinstance(client, Client) else Client(client, helo)
        talk = self._gate.open(client_address(who.address), _PORT, source=who.source)
        talk.session = replace(talk.session, trust=who.trust, user=who.user)
        # cheap, and a message that is not given is the same for all
        content = compose("ann@client.example") if message is None else message
        failures = len(self._pipeline.failures)
        try:
            replies = await _dialogue(talk, who.helo, _envelope(mail_from, rcpts), rcpts, content)
            if (telling := talk.outcome()) is not None:
                await telling
        finally:
            talk.reset()
            judged = self._pipeline.judged.pop(talk.session.id, [])
        failed = self._pipeline.failures[failures:]
        if failed and not self._may_fail:
            what, cause = failed[0]
            raise PolicyFailedError(what) from cause
        got = [each for each in self.downstream.delivered if each.tx.session.id == talk.session.id]
        return Played(
            self.policy.name,
            tuple(replies),
            tuple(judged),
            got[-1].message if got else None,
            tuple(what for what, _ in failed),
        )

    async def stop(self) -> None:
        """Stop the policy where it was started; for those who `play`."""
        if self._is_started:
            self._is_started = False
            await self._pipeline.stop()

    def close(self) -> None:
        """Stop the policy; the harness is of no more use. For those who `deliver`."""
        if self._is_started:
            self._run(self.stop())
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _run(self, running: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # with the harness, where nobody closes it: a test that failed
            weakref.finalize(self, self._loop.close)
        return self._loop.run_until_complete(running)

    def __enter__(self) -> Harness[P]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _dialogue(
    talk: Conversation, helo: str, envelope: Envelope, rcpts: Iterable[str], content: bytes
) -> list[Reply]:
    answer = await talk.connect() or await talk.ehlo(helo, esmtp=True)
    if answer is not None:
        return [answer.reply]
    said = await talk.mail(envelope)
    if not said.reply.is_positive:
        return [said.reply]
    answers = await talk.rcpt([_recipient(each) for each in rcpts])
    replies = [said.reply, *answers.replies]
    if not any(each.is_positive for each in answers.replies):
        return replies
    talk.begin_content(is_stuffed=True)
    wire = stuff(content)
    for at in range(0, len(wire), _BLOCK_BYTES):
        talk.content(wire[at : at + _BLOCK_BYTES])
    return [*replies, (await talk.eom(None)).reply]


def _envelope(mail_from: str, rcpts: Iterable[str]) -> Envelope:
    smtputf8 = not all(each.isascii() for each in (mail_from, *rcpts))
    path: Mailbox | None = parse_reverse_path(f"<{mail_from}>", smtputf8=True)
    return Envelope(path, smtputf8=smtputf8)


def _recipient(text: str) -> Recipient:
    return Recipient(parse_forward_path(f"<{text}>", smtputf8=True))


def _is_about(judged: Judged, rcpt: str) -> bool:
    return judged.rcpt is not None and judged.rcpt.mailbox == _recipient(rcpt).mailbox


class _Others(Policy[NoSettings]):
    """In the place of policies that the one under test requires; it has found this before anybody was asked."""

    def __init__(self, name: str, results: Sequence[AuthResult]) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.__dict__["name"] = name
        self._results = results

    async def on_connect(self, session: Session) -> Verdict:
        return proceed(results=self._results)


def _stand_in(name: str, results: Sequence[AuthResult]) -> Step:
    other = _Others(name, results)
    return Step(other, other.timeout_s, other.on_error)


class _KeepsAll(Pipeline):
    """The pipeline, which keeps what one policy says, by session, and how it failed."""

    def __init__(
        self, steps: Sequence[Step], services: Services, policy: str, reserved: frozenset[str]
    ) -> None:
        super().__init__(steps, services, reserved=reserved)
        self.judged: defaultdict[str, list[Judged]] = defaultdict(list)
        self.failures: list[tuple[str, BaseException | None]] = []
        self._policy = policy

    async def _run(
        self, ranks: Any, last: float, trail: list[Judged] | None, session: Session, *args: Any, **keys: Any
    ) -> Any:
        kept: list[Judged] = []
        decided = await super()._run(ranks, last, kept, session, *args, **keys)
        self.judged[session.id] += [each for each in kept if each.policy == self._policy]
        if trail is not None:
            trail += kept
        return decided

    def _outcome_of(self, waited: Any, task: asyncio.Task[Verdict]) -> Any:
        heard = super()._outcome_of(waited, task)
        if self.failures and not task.cancelled() and (exc := task.exception()) is not None:
            self.failures[-1] = (self.failures[-1][0], exc)
        return heard

    def _failed(self, hook: Any, failure: str, error: str, took_s: float) -> Any:
        what = f"{hook.planned.name} failed at {hook.stage}: {failure}: {error}"
        # where it is called in the handler of the policy's own exception
        self.failures.append((what, sys.exception()))
        return super()._failed(hook, failure, error, took_s)
