"""The policy pipeline: deadlines, concurrency, and what becomes of a policy that fails.

Policies of one stage run in ranks (gateway.plan): a rank runs concurrently and is merged before the next one begins;
DEFER or REJECT ends the stage. A policy is stepped once and becomes a task only if it suspends, so that policies which
need no I/O cost no turn of the loop.

A failure (an exception, a deadline, something that is no verdict, an edit that no policy may make) becomes what the
operator chose (`on_error`): the mail goes on without that policy or is deferred. It never becomes a rejection, and
never touches another policy. What an observed policy decides is counted and recorded, and then it just goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import field
from functools import cached_property, partial
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from gateway.decision import Judged
from gateway.frozen import frozen
from gateway.plan import Ordered, Step, closest_pattern, rcpt_ranks, stage_ranks
from gateway.policy import Mode, OnError, Outcome, Policy, has_hook
from gateway.session import Transaction, Trust
from gateway.smtp import reply
from gateway.stepping import Timed, step
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    RemoveFields,
    Result,
    Stage,
    Verdict,
    defer,
    forbidden,
    merge,
    proceed,
)
from gateway.watching import Failure, Watching

if TYPE_CHECKING:
    from gateway.mail.message import Header
    from gateway.plan import Ranks
    from gateway.services import Metrics, Services
    from gateway.session import Recipient, Session
    from gateway.smtp.address import AddressLiteral, Domain

STAGE_BUDGET_S = {Stage.CONNECT: 20.0, Stage.EHLO: 20.0, Stage.MAIL: 20.0, Stage.RCPT: 20.0, Stage.EOM: 25.0}
"""Seconds for all policies of a stage together (DESIGN.md section 8); at RCPT for all recipients that came together."""

_RCPT_BUDGET_S = STAGE_BUDGET_S[Stage.RCPT]

BLOCKED_S = 0.5
"""A policy that keeps the loop busy for longer at once is told about: no other session is served meanwhile."""

START_S = 20.0
"""A policy that has not started or stopped after so long never will."""

POLICY_FAILED = "policy failed"
"""The reason of the result that the engine gives for a policy that failed."""

_ON_SEND = "on_send"
_FAILURES = ("exception", "timeout", "verdict")


class _Metrics:
    """The families of the policies' metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.decisions = metrics.counters(
            "mxgate_policy_decisions_total",
            "Verdicts of policies that counted; of an observed policy always continue",
            ("policy", "stage", "action"),
        )
        self.would = metrics.counters(
            "mxgate_policy_would_total",
            "Verdicts of observed policies, which were recorded only",
            ("policy", "stage", "action"),
        )
        self.failures = metrics.counters(
            "mxgate_policy_failures_total",
            "Failures of policies, by how: an exception, a deadline, or what is no verdict",
            ("policy", "stage", "failure"),
        )
        self.blocked = metrics.counters(
            "mxgate_policy_blocked_total",
            "Times that a policy kept its worker busy for over 0.5 s at once, while no other session was served",
            ("policy", "stage"),
        )
        self.duration = metrics.histograms(
            "mxgate_policy_duration_seconds",
            "Seconds from the call of a policy to its verdict",
            ("policy", "stage"),
        )


class _Hook:
    """One policy at one stage, with its counters bound."""

    __slots__ = (
        "blocked",
        "call",
        "decisions",
        "duration",
        "exempts",
        "failures",
        "is_last",
        "is_observed",
        "planned",
        "stage",
        "timeout_s",
        "unremarkable_s",
        "would",
    )

    def __init__(self, planned: Step, stage: Stage, metrics: _Metrics, name: str = "") -> None:
        self.planned = planned
        self.stage = stage
        self.is_last = name == _ON_SEND
        self.call: Callable[..., Coroutine[Any, Any, Verdict]] = getattr(
            planned.policy, name or f"on_{stage}"
        )
        self.exempts = planned.exempts if planned.exempt else None
        self.is_observed = planned.mode is Mode.OBSERVE
        self.timeout_s = planned.timeout_s
        # a first step of no more seconds is nothing to look at
        self.unremarkable_s = min(BLOCKED_S, planned.timeout_s)
        name = planned.name
        self.decisions = tuple(metrics.decisions.labels(name, stage, action.label) for action in Action)
        self.would = tuple(metrics.would.labels(name, stage, action.label) for action in Action)
        self.failures = {how: metrics.failures.labels(name, stage, how) for how in _FAILURES}
        self.blocked = metrics.blocked.labels(name, stage)
        self.duration = metrics.duration.labels(name, stage)


_Rank = tuple[_Hook, ...]


@frozen
class Decided:
    """A stage's merged verdict, and the policy that made it what it is ("" when all of them just went on).

    `refusals` are all policies that refused, with their verdicts.
    """

    verdict: Verdict
    policy: str = ""
    refusals: tuple[tuple[str, Verdict], ...] = field(default=(), compare=False)


Stepped = Coroutine[Any, Any, Decided]
"""A stage that is run by who awaits it."""

_Heard = tuple[_Hook, Verdict, float, str]
"""A policy, what it said or its failure became, the seconds since its call, and how it failed ("" when it did not)."""


class _Waiting(NamedTuple):
    """A policy that suspended; its first step took `step_s`."""

    hook: _Hook
    begun: float
    step_s: float


Trail = list[Judged]
"""What the policies said about one transaction, in the order in which it counted."""

# A member that is asked of its class costs ten times what a name of the module does.
_CONTINUE, _DEFER, _QUARANTINE = Action.CONTINUE, Action.DEFER, Action.QUARANTINE
_RCPT, _EOM = Stage.RCPT, Stage.EOM
_PLAIN = proceed()
PROCEED = Decided(_PLAIN)


class Group:
    """What is run for the recipients of some domains: the plan with their overrides.

    A transaction's recipients all belong to groups that `bind` the same: only policies that are enforced count,
    so that an observed one parts no recipients.
    """

    __slots__ = (
        "binds",
        "connect",
        "ehlo",
        "enforced",
        "eom",
        "mail",
        "outcome",
        "rcpt_after",
        "rcpt_before",
        "send",
        "watchers",
    )

    def __init__(self, steps: Sequence[Step], metrics: _Metrics) -> None:
        def ranks(stage: Stage, planned: Ranks[Step]) -> tuple[_Rank, ...]:
            hooks = (
                tuple(_Hook(step, stage, metrics) for step in rank if step.mode is not Mode.OFF)
                for rank in planned
            )
            return tuple(rank for rank in hooks if rank)

        before, behind = rcpt_ranks(steps)
        self.connect = ranks(Stage.CONNECT, stage_ranks(steps, Stage.CONNECT))
        self.ehlo = ranks(Stage.EHLO, stage_ranks(steps, Stage.EHLO))
        self.mail = ranks(Stage.MAIL, stage_ranks(steps, Stage.MAIL))
        self.rcpt_before = ranks(Stage.RCPT, before)
        self.rcpt_after = ranks(Stage.RCPT, behind)
        self.eom = ranks(Stage.EOM, stage_ranks(steps, Stage.EOM))
        self.watchers = tuple(
            hook for rank in self.eom for hook in rank if has_hook(type(hook.planned.policy), "on_header")
        )
        # one rank: nobody signs what another one adds here
        sending = tuple(
            _Hook(hook.planned, Stage.EOM, metrics, _ON_SEND)
            for rank in self.eom
            for hook in rank
            if has_hook(type(hook.planned.policy), _ON_SEND)
        )
        self.send = (sending,) if sending else ()
        self.outcome = tuple(
            step for step in steps if has_hook(type(step.policy), "on_outcome") and step.mode is not Mode.OFF
        )
        self.binds = tuple(step.policy for step in steps if step.mode is Mode.ENFORCE)
        self.enforced = frozenset(step.name for step in steps if step.mode is Mode.ENFORCE)


class Pipeline:
    """The plan and how it is run. Raises PlanError when the policies' `requires` and `after` cannot be met.

    `reserved` are the lower-case names of header fields that only the engine adds and removes.
    """

    def __init__(
        self, steps: Sequence[Step], services: Services, *, reserved: AbstractSet[str] = frozenset()
    ) -> None:
        self.steps = tuple(steps)
        self._services = services
        self._clock = services.clock.monotonic
        self._reserved = reserved
        metrics = _Metrics(services.metrics)
        self.base = base = Group(self.steps, metrics)
        patterns = {override.pattern for each in self.steps for override in each.overrides}
        self._groups = {
            pattern: Group([each.at(pattern) for each in self.steps], metrics) for pattern in sorted(patterns)
        }
        groups = (base, *self._groups.values())
        self.has_overrides = bool(patterns)
        # whether one transaction cannot have all recipients
        self.has_groups = any(group.binds != base.binds for group in groups)
        # where nothing is planned there is nothing to await
        self.plans_connect = bool(base.connect)
        self.plans_ehlo = bool(base.ehlo)
        self.plans_mail = bool(base.mail)
        self.plans_after_recipient = any(group.rcpt_after for group in groups)
        self.plans_eom = any(group.eom for group in groups)
        self.plans_watches = any(group.watchers for group in groups)
        self.plans_send = any(group.send for group in groups)
        # the policies that say nothing about clients who have authenticated
        self.spare_users = frozenset(each.name for each in self.steps if Trust.AUTHENTICATED in each.exempt)
        self.plans_outcome = any(group.outcome for group in groups)
        # lower-case names: what comes in with one of them is forged
        self.own_fields = frozenset(
            name.lower().encode("ascii")
            for group in groups
            for policy in group.binds
            for name in policy.own_fields
        )

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    @property
    def policies(self) -> tuple[Policy[Any], ...]:
        """Every policy object in the order of the plan, those of overrides behind the one that they replace."""
        found = (
            policy
            for each in self.steps
            for policy in (each.policy, *(override.policy for override in each.overrides))
            if policy is not None
        )
        return tuple(dict.fromkeys(found))

    async def start(self) -> None:
        """Start every policy in order. Raises what a policy raises; those that were started are stopped again.

        The exception has a note that names the policy. One that takes longer than START_S has failed: TimeoutError.
        """
        started: list[Policy[Any]] = []
        for policy in self.policies:
            try:
                async with asyncio.timeout(START_S):
                    await policy.start()
            except BaseException as exc:
                exc.add_note(f"policy {policy.name}")
                self._services.log.error("policy.start_failed", policy=policy.name, error=repr(exc))
                await self._stop(started)
                raise
            started.append(policy)

    async def stop(self) -> None:
        """Stop every policy, the last first; a failing one is logged."""
        await self._stop(self.policies)

    async def _stop(self, policies: Sequence[Policy[Any]]) -> None:
        for policy in reversed(policies):
            try:
                async with asyncio.timeout(START_S):
                    await policy.stop()
            except Exception as exc:  # noqa: BLE001  # a stranger's code; the others are stopped all the same
                self._services.log.error("policy.stop_failed", policy=policy.name, error=repr(exc))

    def group_of(self, domain: Domain | AddressLiteral | None) -> Group:
        """The group of a recipient's domain."""
        if not self.has_overrides:
            return self.base
        pattern = closest_pattern(domain, self._groups)
        return self.base if pattern is None else self._groups[pattern]

    def rcpt_deadline(self) -> float:
        """When the budget of an RCPT stage that begins now is used up, in the loop's time."""
        return self._loop.time() + _RCPT_BUDGET_S

    def connect(self, session: Session, trail: Trail | None = None) -> Stepped:
        """The CONNECT stage."""
        return self._run(self.base.connect, 0.0, trail, session, session, is_early=True)

    def ehlo(self, session: Session, trail: Trail | None = None) -> Stepped:
        """The EHLO stage."""
        return self._run(self.base.ehlo, 0.0, trail, session, session, is_early=True)

    def mail(self, tx: Transaction, trail: Trail | None = None) -> Stepped:
        """The MAIL stage."""
        return self._run(self.base.mail, 0.0, trail, tx.session, tx, is_early=True)

    def rcpt_before(
        self,
        tx: Transaction,
        rcpt: Recipient,
        group: Group | None = None,
        last: float = 0.0,
        trail: Trail | None = None,
    ) -> Stepped:
        """The RCPT stage up to the downstream's own answer: the relay guard alone, then the others.

        `group` is the recipient's, `last` the deadline of the stage, 0 when it begins now.
        """
        return self._run((group or self.base).rcpt_before, last, trail, tx.session, tx, rcpt)

    def rcpt_after(
        self,
        tx: Transaction,
        rcpt: Recipient,
        group: Group | None = None,
        last: float = 0.0,
        trail: Trail | None = None,
    ) -> Stepped:
        """The RCPT stage behind the downstream's own answer."""
        return self._run((group or self.base).rcpt_after, last, trail, tx.session, tx, rcpt)

    def watch(self, tx: Transaction, group: Group, *, is_stuffed: bool) -> Watching | None:
        """The header is complete: those who want to see the body, None when nobody does."""
        watching = Watching(self._clock, self._note_block, is_stuffed=is_stuffed)
        for hook in group.watchers:
            if hook.exempts is None or not hook.exempts(tx.session):
                policy = hook.planned.policy
                watching.add(hook, hook.planned.timeout_s, partial(policy.on_header, tx))
        if tx.message is not None:
            watching.add_digests(tx.message.digests)
        return watching or None

    def eom(
        self,
        tx: Transaction,
        group: Group | None = None,
        trail: Trail | None = None,
        failed: Mapping[Hashable, Failure] | None = None,
    ) -> Stepped:
        """The EOM stage of the transaction's group (the base unless given); `failed` are those of its watches."""
        return self._run((group or self.base).eom, 0.0, trail, tx.session, tx, failed=failed)

    def send(
        self, tx: Transaction, header: Header, group: Group | None = None, trail: Trail | None = None
    ) -> Stepped:
        """The last word of EOM on an accepted message, which leaves with this header; its edits add signatures."""
        return self._run((group or self.base).send, 0.0, trail, tx.session, tx, header)

    async def outcome(self, tx: Transaction, outcome: Outcome, group: Group | None = None) -> None:
        """Tell those who want to know how it ended; their failures are logged and nothing else."""
        for planned in (group or self.base).outcome:
            if planned.exempts(tx.session):
                continue
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

    async def _run(
        self,
        ranks: tuple[_Rank, ...],
        last: float,
        trail: Trail | None,
        session: Session,
        *args: Any,
        failed: Mapping[Hashable, Failure] | None = None,
        is_early: bool = False,
    ) -> Decided:
        """One stage. `last` is the end of its budget in the loop's time, 0 when it begins now.

        `is_early`: nobody knows the recipient, for whose domain a policy that refuses may not count; then others may.
        """
        verdicts: list[Verdict] = []
        refusals: list[tuple[str, Verdict]] = []
        strictest, decided_by = _CONTINUE, ""
        for rank in ranks:
            waiting: dict[asyncio.Task[Verdict], _Waiting] = {}
            here = self._step(rank, session, args, waiting, failed)
            if waiting:
                # nobody asks for the time before somebody waits
                now = self._loop.time()
                last = last or now + STAGE_BUDGET_S[rank[0].stage]
                # each rank leaves their share to those behind it
                here += await self._wait(waiting, now + (last - now) / (len(ranks) - ranks.index(rank)))
                if len(here) > 1:
                    here.sort(key=lambda heard: rank.index(heard[0]))
            for heard in here:
                hook, verdict, took_s, _ = heard
                hook.duration.observe(took_s, args[0].id)
                if hook.is_observed or trail is not None:
                    verdict = _recorded(heard, trail, args)
                hook.decisions[verdict.action].inc()
                if verdict is _PLAIN:
                    continue
                if verdict.action > strictest:
                    strictest, decided_by = verdict.action, hook.planned.name
                if verdict.action >= _DEFER:
                    refusals.append((hook.planned.name, verdict))
                if verdict.results:
                    args = _with_results(args, verdict.results)
                verdicts.append(verdict)
            if strictest >= _DEFER and not (is_early and self.has_overrides):
                break
        if not verdicts:
            return PROCEED
        merged = verdicts[0] if len(verdicts) == 1 else merge(verdicts)
        return Decided(merged, decided_by, tuple(refusals))

    def _step(
        self,
        rank: _Rank,
        session: Session,
        args: tuple[Any, ...],
        waiting: dict[asyncio.Task[Verdict], _Waiting],
        failed: Mapping[Hashable, Failure] | None,
    ) -> list[_Heard]:
        """The first step of each policy of a rank: those that have spoken; the others are put into `waiting`."""
        loop, clock = self._loop, self._clock
        here: list[_Heard] = []
        for hook in rank:
            if hook.exempts is not None and hook.exempts(session):
                continue
            if failed is not None and (failure := failed.get(hook)) is not None:
                here.append(self._failed(hook, failure.how, failure.error, 0.0))
                continue
            begun = clock()
            try:
                stepped = step(hook.call(*args), loop, clock)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as exc:  # noqa: BLE001  # the barrier around a stranger's code
                # a CancelledError is the policy's own too: nobody else runs while it is stepped
                took_s = clock() - begun
                self._note_block(hook, took_s)
                here.append(self._failed(hook, "exception", repr(exc), took_s))
                continue
            took_s = clock() - begun
            if isinstance(stepped, asyncio.Task):
                waiting[stepped] = _Waiting(hook, begun, took_s)
                continue
            if stepped is _PLAIN and took_s <= hook.unremarkable_s:
                here.append((hook, _PLAIN, took_s, ""))
                continue
            self._note_block(hook, took_s)
            here.append(self._checked(hook, stepped, took_s, took_s))
        return here

    async def _wait(self, waiting: dict[asyncio.Task[Verdict], _Waiting], last: float) -> list[_Heard]:
        """The verdicts of policies that suspended, each within its own deadline and that of the stage."""
        loop = self._loop
        now = loop.time()
        deadlines = {task: min(now + each.hook.timeout_s, last) for task, each in waiting.items()}
        heard: list[_Heard] = []
        try:
            while waiting:
                await _first_done(loop, waiting, min(deadlines.values()))
                for task in [task for task in waiting if task.done()]:
                    del deadlines[task]
                    heard.append(self._outcome_of(waiting.pop(task), task))
                if not waiting:
                    break
                now = loop.time()
                for task in [task for task in waiting if now >= deadlines[task]]:
                    del deadlines[task]
                    late = waiting.pop(task)
                    self._busy(late, task)
                    task.cancel()
                    took_s = self._clock() - late.begun
                    heard.append(self._failed(late.hook, "timeout", "deadline exceeded", took_s))
        finally:
            for task in waiting:
                task.cancel()
        return heard

    def _outcome_of(self, waited: _Waiting, task: asyncio.Task[Verdict]) -> _Heard:
        hook = waited.hook
        busy_s = self._busy(waited, task)
        took_s = self._clock() - waited.begun
        if task.cancelled():
            return self._failed(hook, "exception", "cancelled itself", took_s)
        if (exc := task.exception()) is not None:
            return self._failed(hook, "exception", repr(exc), took_s)
        return self._checked(hook, task.result(), took_s, busy_s)

    def _busy(self, waited: _Waiting, task: asyncio.Task[Verdict]) -> float:
        """For how many seconds a policy that suspended has kept the loop busy."""
        timed = cast("Timed[Verdict]", task.get_coro())
        self._note_block(waited.hook, max(waited.step_s, timed.longest_s))
        return waited.step_s + timed.busy_s

    def _note_block(self, hook: _Hook, seconds: float) -> None:
        if seconds > BLOCKED_S:
            hook.blocked.inc()
            self._services.log.warning(
                "policy.blocked", policy=hook.planned.name, stage=hook.stage, seconds=round(seconds, 3)
            )

    def _checked(self, hook: _Hook, verdict: object, took_s: float, busy_s: float) -> _Heard:
        """What a policy has returned, having kept the loop busy for `busy_s`."""
        if busy_s > hook.timeout_s:
            # whoever blocks the loop is not interrupted, and its verdict comes too late all the same
            return self._failed(hook, "timeout", "kept the loop busy beyond its deadline", took_s)
        if verdict is _PLAIN:
            return hook, _PLAIN, took_s, ""
        if not isinstance(verdict, Verdict):
            return self._failed(hook, "verdict", f"returned {type(verdict).__name__}", took_s)
        if not _is_sound(verdict):
            return self._failed(hook, "verdict", "holds what is no action, result, edit or evidence", took_s)
        if verdict.action is _QUARANTINE and (hook.stage is not _EOM or hook.is_last):
            return self._failed(hook, "verdict", f"quarantine at {hook.stage}", took_s)
        for edit in verdict.edits:
            if why := forbidden(edit, self._reserved, is_last=hook.is_last):
                return self._failed(hook, "verdict", f"{type(edit).__name__}: {why}", took_s)
        return hook, verdict, took_s, ""

    def _failed(self, hook: _Hook, failure: str, error: str, took_s: float) -> _Heard:
        planned = hook.planned
        hook.failures[failure].inc()
        self._services.log.error(
            "policy.failed", policy=planned.name, stage=hook.stage, reason=failure, error=error
        )
        method = planned.policy.method
        # a check that could not be made is temperror, never none (STANDARDS: RFC 8601 2.7)
        results = (AuthResult(method, Result.TEMPERROR, POLICY_FAILED),) if method else ()
        if planned.on_error is OnError.DEFER:
            verdict = defer("policy_failed", reply.INTERNAL, results=results)
        else:
            verdict = proceed(reason="policy_failed", results=results)
        return hook, verdict, took_s, failure


async def _first_done(
    loop: asyncio.AbstractEventLoop, tasks: Iterable[asyncio.Task[Verdict]], until: float
) -> None:
    """Wait until one of them is done or the loop's time is `until`. asyncio.wait does it in more steps."""
    woken = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    for task in tasks:
        task.add_done_callback(wake)
    timer = loop.call_at(until, wake)
    try:
        await woken
    finally:
        timer.cancel()
        for task in tasks:
            task.remove_done_callback(wake)


def least_times(steps: Sequence[Ordered]) -> dict[str, float]:
    """Seconds that the stages leave each policy for a hook, by name, also when all ranks before it use theirs up."""
    times = dict.fromkeys((each.name for each in steps), inf)
    for stage, budget_s in STAGE_BUDGET_S.items():
        before, behind = rcpt_ranks(steps)
        # both sides of the downstream's answer share one budget
        ranks = before + behind if stage is Stage.RCPT else stage_ranks(steps, stage)
        for each in (each for rank in ranks for each in rank):
            times[each.name] = min(times[each.name], budget_s / len(ranks))
    return times


def _with_results(args: tuple[Any, ...], results: tuple[AuthResult, ...]) -> tuple[Any, ...]:
    """What the next rank is given: the transaction with what this one has found."""
    subject = args[0]
    if not isinstance(subject, Transaction):
        return args
    return subject.with_results(subject.results + results), *args[1:]


def _recorded(heard: _Heard, trail: Trail | None, args: tuple[Any, ...]) -> Verdict:
    """Count what an observed policy would have decided, and keep what was said; the verdict that counts."""
    hook, verdict, took_s, failure = heard
    would_be = None
    if hook.is_observed:
        would_be = verdict
        hook.would[verdict.action].inc()
        # what was found is reported, what should follow from it is not done
        verdict = proceed(results=verdict.results)
    if trail is not None:
        planned, rcpt = hook.planned, args[1] if hook.stage is _RCPT else None
        trail.append(Judged(planned.name, hook.stage, planned.mode, verdict, would_be, took_s, failure, rcpt))
    return verdict


def _is_sound(verdict: Any) -> bool:
    """Whether a Verdict holds what its types say; policies are not all checked by mypy."""
    return (
        isinstance(verdict.action, Action)
        and isinstance(verdict.results, tuple)
        and all(map(_is_result, verdict.results))
        and isinstance(verdict.edits, tuple)
        and all(map(_is_edit, verdict.edits))
        # asked of its class, so that no code of the policy's runs here
        and (verdict.evidence is None or callable(getattr(type(verdict.evidence), "lines", None)))
    )


def _is_edit(edit: object) -> bool:
    return isinstance(edit, AddField | RemoveFields)


def _is_result(found: object) -> bool:
    if not isinstance(found, AuthResult):
        return False
    # each as an object: what a policy has put there is not checked by mypy
    method: object = found.method
    reason: object = found.reason
    result: object = found.result
    properties: object = found.properties
    if not (isinstance(method, str) and isinstance(reason, str) and isinstance(result, Result)):
        return False
    if not isinstance(properties, tuple):
        return False
    for one in properties:
        if not (isinstance(one, tuple) and len(one) == 2):
            return False
        name, value = one
        if not (isinstance(name, str) and isinstance(value, str)):
            return False
    return True
