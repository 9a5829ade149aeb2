"""The policy pipeline: order, concurrency, deadlines, and what becomes of a policy that fails.

Policies of one stage run in ranks: a rank holds those that wait for nobody else, runs concurrently, and is merged
before the next one begins; DEFER or REJECT ends the stage. A policy is stepped once and becomes a task only if it
suspends, so that policies which need no I/O cost no turn of the loop.

A failure (an exception, a deadline, something that is no verdict) becomes what the operator chose (`on_error`):
the mail goes on without that policy or is deferred. It never becomes a rejection, and never touches another policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import GatewayError
from gateway.policy import OnError, Outcome, Policy
from gateway.smtp import reply
from gateway.stepping import step
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    RemoveFields,
    Result,
    Stage,
    Verdict,
    defer,
    merge,
    proceed,
)

if TYPE_CHECKING:
    from gateway.services import Services
    from gateway.session import Recipient, Session, Transaction

RECIPIENT = "recipient"
"""The engine's own step at RCPT, the downstream's answer; policies may name it in `after`."""

GUARD = "relay_guard"
"""Runs alone and first at RCPT; without it nothing starts."""

STAGE_BUDGET_S = {Stage.CONNECT: 20.0, Stage.EHLO: 20.0, Stage.MAIL: 20.0, Stage.RCPT: 20.0, Stage.EOM: 25.0}
"""Seconds for all policies of a stage together (DESIGN.md section 8)."""


class PlanError(GatewayError):
    """The policies cannot be put in order; the text names them."""


@dataclass(frozen=True, slots=True)
class Step:
    """One policy in the plan, with the operator's keys for it."""

    policy: Policy[Any]
    timeout_s: float
    on_error: OnError

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name


Rank = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Decided:
    """A stage's merged verdict, and the policy that made it what it is ("" when all of them just went on)."""

    verdict: Verdict
    policy: str = ""


PROCEED = Decided(proceed())


class Pipeline:
    """The plan and how it is run. Raises PlanError when the policies' `requires` and `after` cannot be met."""

    def __init__(self, steps: Sequence[Step], services: Services) -> None:
        self.steps = tuple(steps)
        self._services = services
        order = rank_of(self.steps)
        self._ranks: dict[Stage, tuple[Rank, ...]] = {
            stage: _ranks([s for s in self.steps if stage in s.policy.stages()], order) for stage in Stage
        }
        behind = _behind_recipient(self.steps, order)
        rcpt = self._ranks[Stage.RCPT]
        guard = tuple(s for s in self.steps if s.name == GUARD and Stage.RCPT in s.policy.stages())
        before = [tuple(s for s in rank if s.name not in behind and s.name != GUARD) for rank in rcpt]
        self._rcpt_before = ((guard,) if guard else ()) + tuple(r for r in before if r)
        after = [tuple(s for s in rank if s.name in behind) for rank in rcpt]
        self._rcpt_after = tuple(r for r in after if r)
        self._outcome = tuple(s for s in self.steps if type(s.policy).on_outcome is not Policy.on_outcome)
        failures = services.metrics.counters(
            "mxgate_policy_failures_total", "Policies that failed, by how", ("policy", "stage", "failure")
        )
        decisions = services.metrics.counters(
            "mxgate_policy_decisions_total", "Verdicts of policies", ("policy", "stage", "action")
        )
        self._failures = {
            (s.name, stage, failure): failures.labels(s.name, stage, failure)
            for s in self.steps
            for stage in s.policy.stages()
            for failure in ("exception", "timeout", "verdict")
        }
        self._decisions = {
            (s.name, stage, action): decisions.labels(s.name, stage, action.label)
            for s in self.steps
            for stage in s.policy.stages()
            for action in Action
        }

    async def start(self) -> None:
        """Start every policy in order. Raises what a policy raises; those that were started are stopped again."""
        started: list[Step] = []
        try:
            for planned in self.steps:
                await planned.policy.start()
                started.append(planned)
        except BaseException:
            for planned in reversed(started):
                await planned.policy.stop()
            raise

    async def stop(self) -> None:
        """Stop every policy, the last first; a failing one is logged."""
        for planned in reversed(self.steps):
            try:
                await planned.policy.stop()
            except Exception as exc:  # noqa: BLE001  # a stranger's code; the others are stopped all the same
                self._services.log.error("policy.stop_failed", policy=planned.name, error=repr(exc))

    async def connect(self, session: Session) -> Decided:
        """The CONNECT stage."""
        return await self._run(Stage.CONNECT, self._ranks[Stage.CONNECT], session)

    async def ehlo(self, session: Session) -> Decided:
        """The EHLO stage."""
        return await self._run(Stage.EHLO, self._ranks[Stage.EHLO], session)

    async def mail(self, tx: Transaction) -> Decided:
        """The MAIL stage."""
        return await self._run(Stage.MAIL, self._ranks[Stage.MAIL], tx)

    async def rcpt_before(self, tx: Transaction, rcpt: Recipient) -> Decided:
        """The RCPT stage up to the downstream's own answer: the relay guard alone, then the others."""
        return await self._run(Stage.RCPT, self._rcpt_before, tx, rcpt)

    async def rcpt_after(self, tx: Transaction, rcpt: Recipient) -> Decided:
        """The RCPT stage behind the downstream's own answer."""
        return await self._run(Stage.RCPT, self._rcpt_after, tx, rcpt)

    async def eom(self, tx: Transaction) -> Decided:
        """The EOM stage."""
        return await self._run(Stage.EOM, self._ranks[Stage.EOM], tx)

    async def outcome(self, tx: Transaction, outcome: Outcome) -> None:
        """Tell those who want to know how it ended; their failures are logged and nothing else."""
        for planned in self._outcome:
            try:
                async with asyncio.timeout(planned.timeout_s):
                    await planned.policy.on_outcome(tx, outcome)
            except (Exception, asyncio.CancelledError) as exc:  # a stranger's code must not touch the session
                task = asyncio.current_task()
                if isinstance(exc, asyncio.CancelledError) and (task is None or task.cancelling()):
                    raise  # it is we who are cancelled
                self._services.log.error(
                    "policy.failed", policy=planned.name, stage="outcome", error=repr(exc)
                )

    @property
    def has_outcome(self) -> bool:
        """Whether any policy wants to know outcomes."""
        return bool(self._outcome)

    async def _run(self, stage: Stage, ranks: tuple[Rank, ...], *args: Any) -> Decided:
        if not ranks:
            return PROCEED
        loop = asyncio.get_running_loop()
        deadline = loop.time() + STAGE_BUDGET_S[stage]
        verdicts: list[Verdict] = []
        decided_by = ""
        for rank in ranks:
            waiting: list[tuple[Step, asyncio.Task[Verdict]]] = []
            here: list[tuple[Step, Verdict]] = []
            for planned in rank:
                try:
                    hook: Coroutine[Any, Any, Verdict] = getattr(planned.policy, f"on_{stage}")(*args)
                    stepped = step(hook, loop)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as exc:  # noqa: BLE001  # the barrier around a stranger's code
                    # a CancelledError is the policy's own too: nobody else runs while it is stepped
                    here.append((planned, self._failed(planned, stage, "exception", repr(exc))))
                    continue
                if isinstance(stepped, asyncio.Task):
                    waiting.append((planned, stepped))
                else:
                    here.append((planned, self._checked(planned, stage, stepped)))
            if waiting:
                here += await self._wait(waiting, stage, deadline)
                here.sort(key=lambda pair: rank.index(pair[0]))
            for planned, verdict in here:
                self._decisions[planned.name, stage, verdict.action].inc()
                if verdict.action > max((v.action for v in verdicts), default=Action.CONTINUE):
                    decided_by = planned.name
                verdicts.append(verdict)
            if any(v.action >= Action.DEFER for v in verdicts):
                break
        if len(verdicts) == 1:
            return Decided(verdicts[0], decided_by)
        return Decided(merge(verdicts), decided_by)

    async def _wait(
        self, waiting: list[tuple[Step, asyncio.Task[Verdict]]], stage: Stage, deadline: float
    ) -> list[tuple[Step, Verdict]]:
        """The verdicts of policies that suspended, each within its own deadline and the stage's."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        open_ = {task: planned for planned, task in waiting}
        verdicts: list[tuple[Step, Verdict]] = []
        try:
            while open_:
                until = min(*(begun + p.timeout_s for p in open_.values()), deadline)
                done, _ = await asyncio.wait(
                    open_, timeout=max(0.0, until - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    planned = open_.pop(task)
                    verdicts.append((planned, self._outcome_of(planned, stage, task)))
                now = loop.time()
                for task, planned in list(open_.items()):
                    if now >= min(begun + planned.timeout_s, deadline):
                        del open_[task]
                        task.cancel()
                        verdicts.append(
                            (planned, self._failed(planned, stage, "timeout", "deadline exceeded"))
                        )
        finally:
            for task in open_:
                task.cancel()
        return verdicts

    def _outcome_of(self, planned: Step, stage: Stage, task: asyncio.Task[Verdict]) -> Verdict:
        if task.cancelled():
            return self._failed(planned, stage, "exception", "cancelled itself")
        if (exc := task.exception()) is not None:
            return self._failed(planned, stage, "exception", repr(exc))
        return self._checked(planned, stage, task.result())

    def _checked(self, planned: Step, stage: Stage, verdict: object) -> Verdict:
        if not isinstance(verdict, Verdict):
            return self._failed(planned, stage, "verdict", f"returned {type(verdict).__name__}")
        if not _is_sound(verdict):
            return self._failed(planned, stage, "verdict", "holds what is no action, result or edit")
        if verdict.action is Action.QUARANTINE and stage is not Stage.EOM:
            return self._failed(planned, stage, "verdict", f"quarantine at {stage}")
        return verdict

    def _failed(self, planned: Step, stage: Stage, failure: str, error: str) -> Verdict:
        self._failures[planned.name, stage, failure].inc()
        self._services.log.error(
            "policy.failed", policy=planned.name, stage=stage, reason=failure, error=error
        )
        method = planned.policy.method
        # a check that could not be made is temperror, never none (STANDARDS: RFC 8601 2.7)
        results = (AuthResult(method, Result.TEMPERROR, "policy failed"),) if method else ()
        if planned.on_error is OnError.DEFER:
            return defer("policy_failed", reply.INTERNAL, results=results)
        return proceed(reason="policy_failed", results=results)


def _is_sound(verdict: Verdict) -> bool:
    """Whether it holds what its types say; policies are not all checked by mypy."""
    action: object = verdict.action
    findings: tuple[object, object] = (verdict.results, verdict.edits)
    return isinstance(action, Action) and (
        findings == ((), ())
        or all(
            isinstance(found, tuple) and all(isinstance(one, kinds) for one in found)
            for found, kinds in zip(findings, ((AuthResult,), (AddField, RemoveFields)), strict=True)
        )
    )


def rank_of(steps: Sequence[Step]) -> dict[str, int]:
    """How many others each policy has to wait for in sequence. Raises PlanError for what is missing or circular."""
    names = {s.name for s in steps}
    if len(names) != len(steps):
        raise PlanError("a policy stands twice in the plan")
    for planned in steps:
        missing = set(planned.policy.requires) - names
        if missing:
            raise PlanError(
                f"policy {planned.name} requires {', '.join(sorted(missing))}, which is not in the plan"
            )
    before = {s.name: (set(s.policy.requires) | set(s.policy.after)) & names for s in steps}
    ranks: dict[str, int] = {}
    while len(ranks) < len(before):
        ready = [n for n, earlier in before.items() if n not in ranks and earlier <= ranks.keys()]
        if not ready:
            circle = ", ".join(sorted(before.keys() - ranks.keys()))
            raise PlanError(f"policies wait for each other: {circle}")
        for name in ready:
            ranks[name] = max((ranks[n] + 1 for n in before[name]), default=0)
    return ranks


def _behind_recipient(steps: Sequence[Step], order: dict[str, int]) -> frozenset[str]:
    """Those that run behind the downstream's answer: who says so, and who waits for one of them."""
    behind: set[str] = set()
    for planned in sorted(steps, key=lambda s: order[s.name]):
        earlier = {*planned.policy.requires, *planned.policy.after}
        if RECIPIENT in planned.policy.after or earlier & behind:
            behind.add(planned.name)
    return frozenset(behind - {GUARD})


def _ranks(steps: Sequence[Step], order: dict[str, int]) -> tuple[Rank, ...]:
    """The steps of a stage, rank by rank; within a rank in the order of the configuration."""
    numbers = sorted({order[s.name] for s in steps})
    return tuple(tuple(s for s in steps if order[s.name] == number) for number in numbers)
