"""What policies that remember, or ask a service, say in an explained session, where nothing is remembered.

Of a message in a file those that remember are observed: to each of them its sender is a stranger, and what it would do
is told, so that the others are heard too. Those that ask a service ask it, but where a zone is all that there is.
Of a record both say again what they said: what they knew then, and the whole message, are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from gateway.decision import Recorded
from gateway.plugins import PlannedPolicy
from gateway.policy import Mode, NoSettings, Policy
from gateway.session import Recipient, Session, Transaction
from gateway.smtp.reply import Reply
from gateway.verdict import Action, Stage, Verdict, defer, proceed, quarantine, reject


def observed(planned: Sequence[PlannedPolicy]) -> list[PlannedPolicy]:
    """The plan with those that remember observed."""
    return [_observed(each) if each.policy.needs_store else each for each in planned]


def said_again(planned: Sequence[PlannedPolicy], recorded: Recorded) -> list[PlannedPolicy]:
    """The plan with stand-ins for those that remember or ask a service, which say what the record has of them."""
    said = _objects(recorded.said.get("verdicts"))
    return [_stand_in(each, said) if each.policy.needs_store or _asks(each) else each for each in planned]


def offline(planned: Sequence[PlannedPolicy]) -> list[PlannedPolicy]:
    """The plan in which those that ask a service say nothing."""
    return [_stand_in(each, ()) if _asks(each) else each for each in planned]


def _asks(planned: PlannedPolicy) -> bool:
    return planned.policy.needs_http or planned.policy.calls_out


def _observed(planned: PlannedPolicy) -> PlannedPolicy:
    overrides = tuple([replace(each, mode=_not_enforced(each.mode)) for each in planned.overrides])
    return replace(planned, mode=_not_enforced(planned.mode), overrides=overrides)


def _not_enforced(mode: Mode) -> Mode:
    return Mode.OBSERVE if mode is Mode.ENFORCE else mode


def _stand_in(planned: PlannedPolicy, said: Sequence[Mapping[str, object]]) -> PlannedPolicy:
    own = [each for each in said if each.get("policy") == planned.name]

    class Again(_SaysAgain):
        name = planned.name
        after = planned.policy.after
        requires = planned.policy.requires
        verdicts = own

    overrides = tuple([replace(each, settings=None) for each in planned.overrides])
    return replace(planned, policy=Again, settings=planned.settings, overrides=overrides)


class _SaysAgain(Policy[Any]):
    """Says at each stage what stands in a record."""

    Settings = NoSettings
    verdicts: ClassVar[Sequence[Mapping[str, object]]] = ()

    @classmethod
    def stages(cls, settings: object = None) -> frozenset[Stage]:  # noqa: ARG003 - the base's
        """Where it has something to say."""
        said = {each.get("stage") for each in cls.verdicts}
        return frozenset(stage for stage in Stage if stage in said)

    async def on_connect(self, session: Session) -> Verdict:
        return self._again(Stage.CONNECT, "")

    async def on_ehlo(self, session: Session) -> Verdict:
        return self._again(Stage.EHLO, "")

    async def on_mail(self, tx: Transaction) -> Verdict:
        return self._again(Stage.MAIL, "")

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        return self._again(Stage.RCPT, rcpt.mailbox.text)

    async def on_eom(self, tx: Transaction) -> Verdict:
        return self._again(Stage.EOM, "")

    def _again(self, stage: Stage, rcpt: str) -> Verdict:
        said = [
            each
            for each in self.verdicts
            if each.get("stage") == stage and (not rcpt or each.get("rcpt") == rcpt)
        ]
        return _verdict(said[0]) if said else proceed()


def _verdict(said: Mapping[str, object]) -> Verdict:
    """What was said; of an observed policy what it would have been. Of what nobody can have said, nothing."""
    evidence = _Lines(said.get("evidence"))
    would_be = said.get("would_be")
    if isinstance(would_be, Mapping):
        said = would_be
    reason, action = str(said.get("reason", "")), said.get("action")
    try:
        if action in (Action.DEFER.label, Action.REJECT.label):
            code = said.get("code")
            reply = Reply(
                code if isinstance(code, int) else 0, str(said.get("enhanced")), str(said.get("text"))
            )
            return (defer if action == Action.DEFER.label else reject)(reason, reply, evidence=evidence)
        if action == Action.QUARANTINE.label:
            return quarantine(reason, evidence=evidence)
        return proceed(reason=reason, evidence=evidence)
    except ValueError:
        return proceed()


class _Lines:
    """The evidence as it stands in the record."""

    def __init__(self, lines: object) -> None:
        self._lines = [each for each in lines if isinstance(each, str)] if isinstance(lines, list) else []

    def lines(self) -> Sequence[str]:
        return self._lines


def _objects(value: object) -> list[Mapping[str, object]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
