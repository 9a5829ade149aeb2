"""What the project's own tests need beside the published kit: a loop's time, a policy that says what it is told to say.

The fakes of services and relay are the kit's (gateway.testing.fakes).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gateway.pipeline import Pipeline
from gateway.plan import RECIPIENT, Step
from gateway.policy import NoSettings, OnError, Outcome, Policy
from gateway.services import Services
from gateway.session import Recipient, Session, Transaction
from gateway.testing.fakes import (
    STORED,
    Delivered,
    FakeClock,
    FakeDns,
    FakeLog,
    FakeMetrics,
    FakeRelay,
    FakeServices,
    Line,
)
from gateway.verdict import Stage, Verdict, proceed

__all__ = [
    "STORED",
    "Delivered",
    "FakeClock",
    "FakeDns",
    "FakeLog",
    "FakeMetrics",
    "FakeRelay",
    "FakeServices",
    "Line",
    "LoopTime",
    "Says",
    "SaysBehind",
    "pipeline_of",
]


class LoopTime:
    """A loop's time() that stands still until it is moved: `monkeypatch.setattr(loop, "time", LoopTime(loop))`.

    Timers that became due run in the loop's next turn; sockets are not touched by it. (Not for uvloop.)
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._now_s = loop.time()

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds


class Says(Policy[NoSettings]):
    """Gives these verdicts, by stage or at RCPT by mailbox, and keeps what it was asked and told."""

    name = "says"

    def __init__(self, verdicts: Mapping[Stage | str, Verdict] | None = None) -> None:
        super().__init__(NoSettings(), FakeServices())
        self.verdicts = dict(verdicts or {})
        self.gate: asyncio.Event | None = None  # EOM waits for it
        self.transactions: list[tuple[Stage, Transaction]] = []
        self.told: list[tuple[Transaction, Outcome]] = []

    async def on_connect(self, session: Session) -> Verdict:
        return self.verdicts.get(Stage.CONNECT, proceed())

    async def on_ehlo(self, session: Session) -> Verdict:
        return self.verdicts.get(Stage.EHLO, proceed())

    async def on_mail(self, tx: Transaction) -> Verdict:
        self.transactions.append((Stage.MAIL, tx))
        return self.verdicts.get(Stage.MAIL, proceed())

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        self.transactions.append((Stage.RCPT, tx))
        return self.verdicts.get(str(rcpt.mailbox), self.verdicts.get(Stage.RCPT, proceed()))

    async def on_eom(self, tx: Transaction) -> Verdict:
        self.transactions.append((Stage.EOM, tx))
        if self.gate is not None:
            await self.gate.wait()
        return self.verdicts.get(Stage.EOM, proceed())

    async def on_outcome(self, tx: Transaction, outcome: Outcome) -> None:
        self.told.append((tx, outcome))


class SaysBehind(Says):
    """Speaks at RCPT behind the downstream's answer."""

    name = "says_behind"
    after = (RECIPIENT,)


def pipeline_of(services: Services, *policies: Policy[Any] | Step, **keys: Any) -> Pipeline:
    """A pipeline of these policies with generous deadlines; mail goes on without one that fails."""
    steps = [each if isinstance(each, Step) else Step(each, 10, OnError.CONTINUE) for each in policies]
    return Pipeline(steps, services, **keys)
