"""The policy pipeline: order, concurrency, deadlines, and what becomes of a policy that fails.

Policies of one stage run in ranks: a rank holds those that wait for nobody else, runs concurrently, and is merged
before the next one begins; DEFER or REJECT ends the stage. A policy is stepped once and becomes a task only if it
suspends, so that policies which need no I/O cost no turn of the loop.

A failure (an exception, a deadline, something that is no verdict) becomes what the operator chose (`on_error`):
the mail goes on without that policy or is deferred. It never becomes a rejection, and never touches another policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    from gateway.services import Counters, Services
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


class _Hook:
    """One policy at one stage, with its counters bound."""

    __slots__ = ("call", "decisions", "failures", "planned", "stage")

    def __init__(self, planned: Step, stage: Stage, decisions: Counters, failures: Counters) -> None:
        self.planned = planned
        self.stage = stage
        self.call: Callable[..., Coroutine[Any, Any, Verdict]] = getattr(planned.policy, f"on_{stage}")
        self.decisions = tuple(decisions.labels(planned.name, stage, action.label) for action in Action)
        self.failures = {how: failures.labels(planned.name, stage, how) for how in _FAILURES}


_Rank = tuple[_Hook, ...]
_FAILURES = ("exception", "timeout", "verdict")


@dataclass(frozen=True, slots=True)
class Decided:
    """A stage's merged verdict, and the policy that made it what it is ("" when all of them just went on)."""

    verdict: Verdict
    policy: str = ""


# A member that is asked of its class costs ten times what a name of the module does.
_CONTINUE, _DEFER = Action.CONTINUE, Action.DEFER
_PLAIN = proceed()
PROCEED = Decided(_PLAIN)


class Pipeline:
    """The plan and how it is run. Raises PlanError when the policies' `requires` and `after` cannot be met."""

    def __init__(self, steps: Sequence[Step], services: Services) -> None:
        self.steps = tuple(steps)
        self._services = services
        order = rank_of(self.steps)
        failures = services.metrics.counters(
            "mxgate_policy_failures_total", "Policies that failed, by how", ("policy", "stage", "failure")
        )
        decisions = services.metrics.counters(
            "mxgate_policy_decisions_total", "Verdicts of policies", ("policy", "stage", "action")
        )
        hooks = {
            stage: [_Hook(s, stage, decisions, failures) for s in self.steps if stage in s.policy.stages()]
            for stage in Stage
        }
        ranks = {stage: _ranks(hooks[stage], order) for stage in Stage}
        self._connect, self._ehlo = ranks[Stage.CONNECT], ranks[Stage.EHLO]
        self._mail, self._eom = ranks[Stage.MAIL], ranks[Stage.EOM]
        behind = _behind_recipient(self.steps, order)
        rcpt = hooks[Stage.RCPT]
        guard = tuple(h for h in rcpt if h.planned.name == GUARD)
        others = [h for h in rcpt if h.planned.name not in behind and h.planned.name != GUARD]
        self._rcpt_before = ((guard,) if guard else ()) + _ranks(others, order)
        self._rcpt_after = _ranks([h for h in rcpt if h.planned.name in behind], order)
        self._outcome = tuple(s for s in self.steps if type(s.policy).on_outcome is not Policy.on_outcome)
        # where nothing is planned there is nothing to await
        self.plans_connect = bool(self._connect)
        self.plans_ehlo = bool(self._ehlo)
        self.plans_mail = bool(self._mail)
        self.plans_after_recipient = bool(self._rcpt_after)
        self.plans_eom = bool(self._eom)
        self.plans_outcome = bool(self._outcome)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

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
        return await self._run(self._connect, session)

    async def ehlo(self, session: Session) -> Decided:
        """The EHLO stage."""
        return await self._run(self._ehlo, session)

    async def mail(self, tx: Transaction) -> Decided:
        """The MAIL stage."""
        return await self._run(self._mail, tx)

    async def rcpt_before(self, tx: Transaction, rcpt: Recipient) -> Decided:
        """The RCPT stage up to the downstream's own answer: the relay guard alone, then the others."""
        return await self._run(self._rcpt_before, tx, rcpt)

    async def rcpt_after(self, tx: Transaction, rcpt: Recipient) -> Decided:
        """The RCPT stage behind the downstream's own answer."""
        return await self._run(self._rcpt_after, tx, rcpt)

    async def eom(self, tx: Transaction) -> Decided:
        """The EOM stage."""
        return await self._run(self._eom, tx)

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

    async def _run(self, ranks: tuple[_Rank, ...], *args: Any) -> Decided:
        loop = self._loop
        last = 0.0  # when the stage's budget is used up; nobody asks before somebody waits
        verdicts: list[Verdict] = []
        strictest, decided_by = _CONTINUE, ""
        for rank in ranks:
            here: list[tuple[_Hook, Verdict]] = []
            waiting: dict[asyncio.Task[Verdict], _Hook] = {}
            for hook in rank:
                try:
                    stepped = step(hook.call(*args), loop)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as exc:  # noqa: BLE001  # the barrier around a stranger's code
                    # a CancelledError is the policy's own too: nobody else runs while it is stepped
                    here.append((hook, self._failed(hook, "exception", repr(exc))))
                    continue
                if isinstance(stepped, asyncio.Task):
                    waiting[stepped] = hook
                else:
                    here.append((hook, self._checked(hook, stepped)))
            if waiting:
                last = last or loop.time() + STAGE_BUDGET_S[rank[0].stage]
                here += await self._wait(waiting, last)
                here.sort(key=lambda pair: rank.index(pair[0]))
            for hook, verdict in here:
                hook.decisions[verdict.action].inc()
                if verdict is _PLAIN:
                    continue
                if verdict.action > strictest:
                    strictest, decided_by = verdict.action, hook.planned.name
                verdicts.append(verdict)
            if strictest >= _DEFER:
                break
        if not verdicts:
            return PROCEED
        return Decided(verdicts[0] if len(verdicts) == 1 else merge(verdicts), decided_by)

    async def _wait(
        self, waiting: dict[asyncio.Task[Verdict], _Hook], last: float
    ) -> list[tuple[_Hook, Verdict]]:
        """The verdicts of policies that suspended, each within its own deadline and that of the stage."""
        loop = self._loop
        now = loop.time()
        deadlines = {task: min(now + hook.planned.timeout_s, last) for task, hook in waiting.items()}
        verdicts: list[tuple[_Hook, Verdict]] = []
        try:
            while waiting:
                until = min(deadlines[task] for task in waiting)
                done, _ = await asyncio.wait(
                    waiting, timeout=max(0.0, until - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    hook = waiting.pop(task)
                    verdicts.append((hook, self._outcome_of(hook, task)))
                now = loop.time()
                for task in [task for task in waiting if now >= deadlines[task]]:
                    hook = waiting.pop(task)
                    task.cancel()
                    verdicts.append((hook, self._failed(hook, "timeout", "deadline exceeded")))
        finally:
            for task in waiting:
                task.cancel()
        return verdicts

    def _outcome_of(self, hook: _Hook, task: asyncio.Task[Verdict]) -> Verdict:
        if task.cancelled():
            return self._failed(hook, "exception", "cancelled itself")
        if (exc := task.exception()) is not None:
            return self._failed(hook, "exception", repr(exc))
        return self._checked(hook, task.result())

    def _checked(self, hook: _Hook, verdict: object) -> Verdict:
        if verdict is _PLAIN:
            return _PLAIN
        if not isinstance(verdict, Verdict):
            return self._failed(hook, "verdict", f"returned {type(verdict).__name__}")
        if not _is_sound(verdict):
            return self._failed(hook, "verdict", "holds what is no action, result or edit")
        if verdict.action is Action.QUARANTINE and hook.stage is not Stage.EOM:
            return self._failed(hook, "verdict", f"quarantine at {hook.stage}")
        return verdict

    def _failed(self, hook: _Hook, failure: str, error: str) -> Verdict:
        planned = hook.planned
        hook.failures[failure].inc()
        self._services.log.error(
            "policy.failed", policy=planned.name, stage=hook.stage, reason=failure, error=error
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


def _ranks(hooks: Sequence[_Hook], order: dict[str, int]) -> tuple[_Rank, ...]:
    """The hooks of a stage, rank by rank; within a rank in the order of the configuration."""
    numbers = sorted({order[h.planned.name] for h in hooks})
    return tuple(tuple(h for h in hooks if order[h.planned.name] == number) for number in numbers)
