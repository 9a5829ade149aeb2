"""A decision record judged again: the same session, with the answers that DNS and the downstream gave then.

What a record does not have cannot be judged again: the body (its digests are there), what policies remember (those that
do say again what they said), and what was left out because it was too large. The plan is that of the configuration at
hand; where it comes to something else than the record says, the differences are told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Final

from gateway.app import gatekeeper_settings
from gateway.config import Config
from gateway.decision import Recorded
from gateway.explain.remembered import said_again
from gateway.explain.run import Case, Explained, ExplainError, World, explain, routes_of
from gateway.explain.stand_ins import Answers, RecordedAnswers, SaysAgain, SizedSpool, StandingClock
from gateway.gatekeeper import GatekeeperSettings
from gateway.mail.digest import BodyDigests
from gateway.plugins import PlannedPolicy
from gateway.relaying import Delivery
from gateway.services import Clock
from gateway.session import Role, Trust
from gateway.smtp import reply
from gateway.smtp.address import Mailbox
from gateway.smtp.content import Fault
from gateway.smtp.reply import Reply
from gateway.verdict import Stage

_FAULTS: Final = {fault.name.lower(): fault for fault in Fault}
# What ended a message before policies judged it, without a word of the client's content in the record.
_NOT_JUDGED: Final = frozenset({"header", "spool"})
# What is compared beside reply, results and verdicts.
_WORDS: Final = ("action", "stage", "policy", "reason")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a record this time; `differences` from what it says, and what of it was `missing`."""

    explained: Explained
    differences: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether everything was there, and came to the same."""
        return not (self.differences or self.missing)

    def as_json(self) -> dict[str, object]:
        """In JSON's types."""
        return {
            **self.explained.as_json(),
            "replay": {
                "same": self.is_same,
                "differences": [*self.differences],
                "missing": [*self.missing],
            },
        }


async def replay(
    recorded: Recorded, config: Config, planned: Sequence[PlannedPolicy], clock: Clock
) -> Replayed:
    """Judge the transaction of a record again. Raises ExplainError."""
    if recorded.reply is None:
        raise ExplainError("the client gave this transaction up; there is no verdict that could be replayed")
    if recorded.session.role is Role.SUBMISSION:
        raise ExplainError("this is a user's own mail (submission); only mail of the MX is replayed")
    answers = RecordedAnswers(recorded.dns)
    dns = Answers(answers)
    header = recorded.header + b"\r\n"
    world = World(
        config,
        said_again(planned, recorded),
        StandingClock(recorded.time, clock.monotonic),
        dns,
        SaysAgain(routes_of(config), _words(recorded), _delivery(recorded)),
        _settings(config, recorded),
        SizedSpool(max(0, recorded.size_bytes - len(header))),
        lambda: recorded.session.id,
        lambda: BodyDigests.recorded(recorded.digests),
    )
    explained = await explain(_case(recorded, header), world)
    return Replayed(
        explained,
        tuple(_differences(recorded.said, explained.as_json()["decision"])),
        (*recorded.missing, *(f"the answer to {name} {rrtype}" for name, rrtype in answers.missing)),
    )


@dataclass(frozen=True, slots=True)
class _Header:
    """Content of which the header is left."""

    octets: bytes
    fault: Fault | None

    def blocks(self) -> Iterator[bytes]:
        yield self.octets


def _case(recorded: Recorded, header: bytes) -> Case:
    session = recorded.session
    is_ours = recorded.stage == Stage.EOM and not recorded.policy
    if is_ours and recorded.reason in _NOT_JUDGED:
        raise ExplainError(f"no policy has judged this message: its end was {recorded.reason}")
    fault = _FAULTS.get(recorded.reason) if is_ours else None
    return Case(
        client=session.client,
        helo=session.helo,
        envelope=recorded.envelope,
        rcpts=tuple([rcpt for rcpt, _, _ in recorded.rcpts]),
        content=_Header(header, fault) if recorded.stage == Stage.EOM else None,
        esmtp=session.esmtp,
        port=session.port,
        tls=session.tls,
        source=session.address_source,
    )


def _settings(config: Config, recorded: Recorded) -> GatekeeperSettings:
    """Those of the configuration, with the client trusted as it was and the authserv-id of then."""
    session = recorded.session
    trusted = (ip_network(session.client),) if session.trust is Trust.TRUSTED else ()
    return replace(gatekeeper_settings(config), trusted_networks=trusted, authserv_id=recorded.authserv_id)


def _words(recorded: Recorded) -> dict[Mailbox, Reply]:
    """What was said of recipients by others than policies, which will speak for themselves."""
    return {
        rcpt.mailbox: answer
        for rcpt, answer, reason in recorded.rcpts
        if answer is not None and reason in ("downstream", "route", "route_recipients")
    }


def _delivery(recorded: Recorded) -> Delivery | None:
    if recorded.reply is None or recorded.stage != Stage.EOM:
        return None
    if recorded.delivered:
        return Delivery(recorded.reply, stored=True)
    if recorded.reason == "quarantine":
        return Delivery(reply.INTERNAL, stored=False, error="refused")
    if not recorded.policy and not recorded.reply.is_positive:
        return Delivery(recorded.reply, stored=False, error=recorded.reason)
    return None


def _differences(then: Mapping[str, object], now: object) -> Iterator[str]:
    assert isinstance(now, Mapping)
    for word in _WORDS:
        if then.get(word) != now.get(word):
            yield f"{word}: {then.get(word)!a} then, {now.get(word)!a} now"
    if _reply(then) != _reply(now):
        yield f"reply: {_reply(then)!a} then, {_reply(now)!a} now"
    for what, words in (("results", _result), ("verdicts", _verdict)):
        before, behind = ([words(each) for each in _objects(of.get(what))] for of in (then, now))
        yield from (f"{what}, then only: {each}" for each in before if each not in behind)
        yield from (f"{what}, now only: {each}" for each in behind if each not in before)


def _reply(of: Mapping[str, object]) -> str:
    return " ".join([str(of.get(key)) for key in ("code", "enhanced", "text") if of.get(key)])


def _result(result: Mapping[str, object]) -> str:
    return (
        f"{result.get('method')}={result.get('result')} ({result.get('reason')}) {result.get('properties')}"
    )


def _verdict(verdict: Mapping[str, object]) -> str:
    words = [verdict.get(key) for key in ("stage", "rcpt", "policy", "mode", "action", "reason", "failure")]
    return " ".join([*(str(word) for word in words if word), _reply(verdict)]).rstrip()


def _objects(value: object) -> list[Mapping[str, object]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
