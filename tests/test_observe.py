"""Observe equals absence: replies and delivered octets as without the policies, would-be verdicts as if enforced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.decision import Decision, DecisionRing, Judged
from gateway.gatekeeper import GatekeeperSettings
from gateway.plan import RECIPIENT, Override, Step
from gateway.policy import Mode, NoSettings, OnError, Policy
from gateway.relaying import Delivery
from gateway.session import Recipient, Session, Transaction
from gateway.smtp.reply import Reply
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    Result,
    Stage,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)
from tests.fakes import FakeServices
from tests.world import CLIENT, LATER, MESSAGE, NEVER, World, envelope, rcpt, send

RCPTS = ("b@example.org", "c@example.org", "d@sub.example.org")
SPF = AuthResult("spf", Result.FAIL)
FIELD = AddField("X-Found", "1")

EARLY_VERDICTS = [
    proceed(),
    proceed(reason="known", results=[SPF], edits=[FIELD]),
    defer("grey", LATER, results=[SPF]),
    reject("listed", NEVER),
    reject("listed", NEVER, close=True),
]
SAID = st.sampled_from(EARLY_VERDICTS)
SAID_AT_EOM = st.sampled_from([*EARLY_VERDICTS, quarantine("odd", results=[SPF], edits=[FIELD])])


class Scripted(Policy[NoSettings]):
    """Says at each stage what it was made with; without a word for a stage it raises."""

    name = "scripted"

    def __init__(self, name: str, says: dict[Stage, Verdict | None], after: tuple[str, ...]) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.name = name  # type: ignore[misc]  # of the class elsewhere
        self.after = after  # type: ignore[misc]
        self._says = says

    def _say(self, stage: Stage) -> Verdict:
        verdict = self._says[stage]
        if verdict is None:
            raise ConnectionError("redis is down")
        return verdict

    async def on_connect(self, session: Session) -> Verdict:
        return self._say(Stage.CONNECT)

    async def on_ehlo(self, session: Session) -> Verdict:
        return self._say(Stage.EHLO)

    async def on_mail(self, tx: Transaction) -> Verdict:
        return self._say(Stage.MAIL)

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        return self._say(Stage.RCPT)

    async def on_eom(self, tx: Transaction) -> Verdict:
        return self._say(Stage.EOM)


@dataclass(frozen=True)
class Script:
    """One policy of a random plan."""

    says: dict[Stage, Verdict | None]
    after: tuple[str, ...]
    on_error: OnError
    domain: str | None
    """A domain for which it says nothing but proceed()."""

    def step(self, number: int, mode: Mode) -> Step:
        policy = Scripted(f"p{number}", self.says, self.after)
        silent = Scripted(f"p{number}", dict.fromkeys(Stage, proceed()), self.after)
        overrides = (Override(self.domain, mode, silent),) if self.domain else ()
        return Step(policy, 10, self.on_error, mode, overrides=overrides)


SCRIPTS = st.lists(
    st.builds(
        Script,
        st.fixed_dictionaries(
            {stage: st.none() | (SAID_AT_EOM if stage is Stage.EOM else SAID) for stage in Stage}
        ),
        st.sampled_from([(), (RECIPIENT,), ("p0",)]),
        st.sampled_from(OnError),
        st.sampled_from([None, ".example.org", "example.org"]),
    ),
    max_size=4,
)


@dataclass
class Run:
    """What a client and the downstream saw of one session, and the record of its transaction."""

    replies: list[tuple[str, object]]
    delivered: list[bytes]
    record: Decision | None


async def run(scripts: list[Script], mode: Mode, *, downstream: Delivery | None, delay: bool) -> Run:
    ring = DecisionRing()
    steps = [
        # p0 cannot wait for itself
        replace(script, after=tuple(n for n in script.after if n != "p0" or number)).step(number, mode)
        for number, script in enumerate(scripts)
    ]
    world = World(*steps, settings=GatekeeperSettings("mx.example.org", delay_reject=delay), decisions=ring)
    if downstream is not None:
        world.relay.delivery = downstream
    talk = world.gate.open(CLIENT, 1234)
    replies: list[tuple[str, object]] = []

    def note(what: str, answer: Any) -> bool:
        replies.append((what, answer))
        return answer is None or (not answer.close and answer.reply.is_positive)

    is_open = (
        note("connect", await talk.connect())
        and note("ehlo", await talk.ehlo("client.example", esmtp=True))
        and note("mail", await talk.mail(envelope()))
    )
    if is_open:
        answers = await talk.rcpt([rcpt(name) for name in RCPTS])
        replies.append(("rcpt", answers))
        if any(answer.is_positive for answer in answers.replies):
            send(talk, b"X-Mxgate-Quarantine: forged\r\n" + MESSAGE)
            note("eom", await talk.eom(None))
    talk.reset()
    return Run(replies, [each.message for each in world.relay.delivered], next(iter(ring.latest(1)), None))


def behind_results(message: bytes) -> bytes:
    """A message behind our Authentication-Results, which report what observed policies found."""
    results, received, rest = message.partition(b"\r\nReceived:")
    assert results.startswith(b"Authentication-Results: mx.example.org;")
    return received + rest


@given(
    scripts=SCRIPTS,
    downstream=st.sampled_from([None, Delivery(Reply(554, "5.7.1", "Spam"), stored=False, error="refused")]),
    delay=st.booleans(),
)
@settings(max_examples=200, deadline=None)
async def test_observed_policies_change_nothing_and_say_what_they_would_have_done(
    scripts: list[Script], downstream: Delivery | None, delay: bool
) -> None:
    absent = await run([], Mode.ENFORCE, downstream=downstream, delay=delay)
    observed = await run(scripts, Mode.OBSERVE, downstream=downstream, delay=delay)
    enforced = await run(scripts, Mode.ENFORCE, downstream=downstream, delay=delay)

    assert observed.replies == absent.replies
    assert [*map(behind_results, observed.delivered)] == [*map(behind_results, absent.delivered)]
    assert observed.record is not None
    would = {key(judged): judged.would_be for judged in observed.record.judged}
    # A message for domains with overrides is judged as the first recipient wants; enforced, that may be another one.
    has_domains = any(script.domain for script in scripts)
    for judged in enforced.record.judged if enforced.record else ():
        if judged.stage is not Stage.EOM or not has_domains:
            assert would[key(judged)] == judged.verdict
    assert all(judged.verdict.action is Action.CONTINUE for judged in observed.record.judged)
    assert all(judged.verdict.edits == () for judged in observed.record.judged)


def key(judged: Judged) -> tuple[str, Stage, str]:
    return judged.policy, judged.stage, str(judged.rcpt.mailbox) if judged.rcpt else ""


async def test_what_an_observed_policy_found_is_reported_and_its_edits_are_not_made() -> None:
    says: dict[Stage, Verdict | None] = dict.fromkeys(Stage, proceed(results=[SPF], edits=[FIELD]))
    says[Stage.EOM] = reject("spam", NEVER, results=[AuthResult("dkim", Result.FAIL)])
    observed = await run([Script(says, (), OnError.DEFER, None)], Mode.OBSERVE, downstream=None, delay=True)

    assert observed.record is not None
    assert observed.record.results == (SPF, SPF, SPF, AuthResult("dkim", Result.FAIL))
    assert observed.record.action == "accepted"
    assert b"X-Found" not in observed.delivered[0]


async def test_a_failure_of_an_observed_policy_is_temperror_and_defers_nothing() -> None:
    class Fails(Scripted):
        method = "spf"

    says: dict[Stage, Verdict | None] = {**dict.fromkeys(Stage, proceed()), Stage.MAIL: None}
    ring = DecisionRing()
    world = World(Step(Fails("p", says, ()), 10, OnError.DEFER, Mode.OBSERVE), decisions=ring)

    assert (await world.message()).reply.is_positive

    (record,) = ring.latest(1)
    assert record.results == (AuthResult("spf", Result.TEMPERROR, "policy failed"),)
    (failed,) = [judged for judged in record.judged if judged.failure]
    assert (failed.failure, failed.mode, failed.stage) == ("exception", Mode.OBSERVE, Stage.MAIL)
    assert failed.would_be is not None
    assert failed.would_be.action is Action.DEFER
