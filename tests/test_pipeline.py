"""pipeline: the order of policies, how their verdicts become one, and that none of them can hurt mail by failing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from math import inf
from typing import Any

import pytest

from gateway.app import start_failure
from gateway.decision import Judged
from gateway.pipeline import PROCEED, STAGE_BUDGET_S, Decided, Pipeline, least_times
from gateway.plan import GUARD, RECIPIENT, PlanError, Step, rank_of
from gateway.policy import Mode, NoSettings, OnError, Outcome, Policy
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp import reply
from gateway.smtp.address import parse_forward_path
from gateway.smtp.reply import Reply
from gateway.verdict import (
    Action,
    AddField,
    AuthResult,
    RemoveFields,
    Result,
    Stage,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)
from tests.fakes import FakeServices, LoopTime

SESSION = Session("S", ip_address("192.0.2.1"), 1234, helo="client.example")
TX = Transaction("S-1", SESSION, Envelope(None))
RCPT = Recipient(parse_forward_path("<b@example.org>", smtputf8=False))
LATER = Reply(450, "4.7.1", "Later")
NEVER = Reply(550, "5.7.1", "Never")
SPF = AuthResult("spf", Result.PASS)

Hook = Callable[[], Awaitable[object]]


async def go_on() -> Verdict:
    return proceed()


def say(verdict: object) -> Hook:
    """A hook that returns this at once."""

    async def hook() -> object:
        return verdict

    return hook


def say_later(verdict: object) -> Hook:
    """A hook that suspends and then returns this."""

    async def hook() -> object:
        await asyncio.sleep(0)
        return verdict

    return hook


def policy(
    name: str,
    hook: Hook = go_on,
    *,
    stages: Sequence[Stage] = (Stage.EOM,),
    requires: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    method: str | None = None,
    timeout_s: float = 10,
    on_error: OnError = OnError.CONTINUE,
) -> Step:
    """A step of a policy that overrides the hooks of these stages, all alike."""

    async def run(self: object, *args: object) -> object:
        return await hook()

    body = {"name": name, "requires": requires, "after": after, "method": method}
    made: type[Policy[NoSettings]] = type(name, (Policy,), body | {f"on_{stage}": run for stage in stages})
    return Step(made(NoSettings(), FakeServices()), timeout_s, on_error)


@pytest.fixture
def services() -> FakeServices:
    return FakeServices()


@pytest.fixture
def seen() -> list[str]:
    """The names of policies in the order in which their hooks ran."""
    return []


@pytest.fixture
async def loop_time(monkeypatch: pytest.MonkeyPatch) -> LoopTime:
    loop = asyncio.get_running_loop()
    clock = LoopTime(loop)
    monkeypatch.setattr(loop, "time", clock)
    return clock


def note(seen: list[str], name: str, verdict: Verdict | None = None) -> Hook:
    async def hook() -> Verdict:
        seen.append(name)
        return verdict or proceed()

    return hook


def noted(seen: list[str], name: str, *, verdict: Verdict | None = None, **keys: Any) -> Step:
    return policy(name, note(seen, name, verdict), **keys)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def run_stage(pipeline: Pipeline, stage: Stage) -> Decided:
    match stage:
        case Stage.CONNECT:
            return await pipeline.connect(SESSION)
        case Stage.EHLO:
            return await pipeline.ehlo(SESSION)
        case Stage.MAIL:
            return await pipeline.mail(TX)
        case Stage.RCPT:
            return await pipeline.rcpt_before(TX, RCPT)
        case Stage.EOM:
            return await pipeline.eom(TX)


# --- order ----------------------------------------------------------------------------------------------


def test_rank_is_the_longest_chain_of_those_that_run_earlier() -> None:
    steps = [
        policy("dmarc", requires=("dkim", "spf"), after=("arc",)),
        policy("arc", after=("dkim",)),
        policy("dkim"),
        policy("spf"),
    ]

    assert rank_of(steps) == {"dkim": 0, "spf": 0, "arc": 1, "dmarc": 2}


def test_after_does_not_ask_for_presence() -> None:
    assert rank_of([policy("greylist", after=("spf", RECIPIENT))]) == {"greylist": 0}


def test_requires_asks_for_presence() -> None:
    with pytest.raises(PlanError, match="policy dmarc requires arc, spf, which is not in the plan"):
        rank_of([policy("dmarc", requires=("spf", "dkim", "arc")), policy("dkim")])


@pytest.mark.parametrize("loop", [("a",), ("a", "b"), ("a", "b", "c")])
def test_policies_that_wait_for_each_other_are_no_plan(loop: tuple[str, ...]) -> None:
    circle = [policy(name, after=(loop[(at + 1) % len(loop)],)) for at, name in enumerate(loop)]

    with pytest.raises(PlanError, match=f"wait for each other: {', '.join(loop)}$"):
        Pipeline([policy("fine"), *circle], FakeServices())


def test_a_policy_stands_in_the_plan_once() -> None:
    with pytest.raises(PlanError, match="twice"):
        rank_of([policy("spf"), policy("spf")])


async def test_ranks_run_one_after_the_other_and_ties_in_the_plans_order(
    services: FakeServices, seen: list[str]
) -> None:
    pipeline = Pipeline(
        [
            noted(seen, "last", after=("slow", "b")),
            noted(seen, "b"),
            policy("slow", say_later(proceed())),
            noted(seen, "a"),
        ],
        services,
    )

    await pipeline.eom(TX)

    assert seen == ["b", "a", "last"]


async def test_a_rank_runs_concurrently(services: FakeServices) -> None:
    ready, steady = asyncio.Event(), asyncio.Event()

    async def first() -> Verdict:
        ready.set()
        await steady.wait()
        return proceed(results=[SPF])

    async def second() -> Verdict:
        await ready.wait()
        steady.set()
        return proceed(reason="both")

    pipeline = Pipeline([policy("first", first), policy("second", second)], services)

    assert await pipeline.eom(TX) == Decided(proceed(reason="both", results=[SPF]))


async def test_only_overridden_hooks_are_planned(services: FakeServices, seen: list[str]) -> None:
    pipeline = Pipeline([noted(seen, "mail_only", stages=[Stage.MAIL])], services)

    for stage in Stage:
        assert await run_stage(pipeline, stage) == PROCEED

    assert seen == ["mail_only"]
    planned = (pipeline.plans_connect, pipeline.plans_ehlo, pipeline.plans_mail, pipeline.plans_eom)
    assert planned == (False, False, True, False)


@pytest.mark.parametrize("stage", Stage)
async def test_hooks_get_what_their_stage_is_about(services: FakeServices, stage: Stage) -> None:
    got: list[tuple[object, ...]] = []

    async def hook(self: object, *args: object) -> Verdict:
        got.append(args)
        return proceed()

    made = type("p", (Policy,), {"name": "p", f"on_{stage}": hook})(NoSettings(), services)

    await run_stage(Pipeline([Step(made, 1, OnError.CONTINUE)], services), stage)

    about: object = SESSION if stage in (Stage.CONNECT, Stage.EHLO) else TX
    assert got == [(about, RCPT) if stage is Stage.RCPT else (about,)]


async def test_the_relay_guard_runs_alone_and_first(services: FakeServices, seen: list[str]) -> None:
    denied = reject("relaying_denied", NEVER)
    pipeline = Pipeline(
        [
            noted(seen, "limits", stages=[Stage.RCPT]),
            noted(seen, GUARD, verdict=denied, stages=[Stage.RCPT], after=("limits",)),
        ],
        services,
    )

    assert (await pipeline.rcpt_before(TX, RCPT)).policy == GUARD
    assert seen == [GUARD]


async def test_the_rcpt_stage_is_parted_by_the_downstreams_answer(
    services: FakeServices, seen: list[str]
) -> None:
    def at_rcpt(name: str, *after: str) -> Step:
        return noted(seen, name, stages=[Stage.RCPT], after=after)

    pipeline = Pipeline(
        [
            at_rcpt("greylist", RECIPIENT),
            at_rcpt("limits"),
            at_rcpt("statistics", "greylist"),
            at_rcpt("lists", "limits"),
            at_rcpt(GUARD),
        ],
        services,
    )

    await pipeline.rcpt_before(TX, RCPT)
    assert seen == [GUARD, "limits", "lists"]
    seen.clear()
    await pipeline.rcpt_after(TX, RCPT)
    assert seen == ["greylist", "statistics"], "who waits for one behind the answer is behind it too"


async def test_who_requires_one_behind_the_answer_is_behind_it(
    services: FakeServices, seen: list[str]
) -> None:
    pipeline = Pipeline(
        [
            noted(seen, "b", stages=[Stage.RCPT], requires=("a",)),
            noted(seen, "a", stages=[Stage.RCPT], after=(RECIPIENT,)),
        ],
        services,
    )

    assert await pipeline.rcpt_before(TX, RCPT) == PROCEED
    await pipeline.rcpt_after(TX, RCPT)
    assert seen == ["a", "b"]


# --- verdicts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [defer("grey", LATER), reject("bad", NEVER)], ids=["defer", "reject"])
@pytest.mark.parametrize("speak", [say, say_later])
@pytest.mark.parametrize("stage", Stage)
async def test_a_refusal_ends_the_stage_behind_its_rank(
    services: FakeServices, seen: list[str], verdict: Verdict, speak: Callable[[object], Hook], stage: Stage
) -> None:
    pipeline = Pipeline(
        [
            policy("strict", speak(verdict), stages=[stage]),
            noted(seen, "beside", stages=[stage]),
            noted(seen, "behind", stages=[stage], after=("strict",)),
        ],
        services,
    )

    assert await run_stage(pipeline, stage) == Decided(verdict, "strict")
    assert seen == ["beside"]


async def test_quarantine_does_not_end_the_stage(services: FakeServices) -> None:
    odd = quarantine("odd")
    pipeline = Pipeline(
        [policy("odd", say(odd)), policy("behind", say(proceed(results=[SPF])), after=("odd",))], services
    )

    assert await pipeline.eom(TX) == Decided(replace(odd, results=(SPF,)), "odd")


async def test_the_strictest_verdict_of_a_rank_wins_and_names_its_policy(services: FakeServices) -> None:
    pipeline = Pipeline(
        [
            policy("a", say_later(defer("grey", LATER))),
            policy("b", say(quarantine("odd"))),
            policy("c", say_later(reject("bad", NEVER))),
            policy("d", say(reject("worse", Reply(554, "5.7.1", "Worse")))),
        ],
        services,
    )

    assert await pipeline.eom(TX) == Decided(reject("bad", NEVER), "c")


async def test_findings_are_merged_in_the_plans_order_whoever_is_ready_first(services: FakeServices) -> None:
    first, second = AddField("X-First", "1"), RemoveFields("Received-SPF")
    dkim = AuthResult("dkim", Result.NONE)
    pipeline = Pipeline(
        [
            policy("slow", say_later(proceed(results=[SPF], edits=[first]))),
            policy("quick", say(proceed(results=[dkim], edits=[second]))),
        ],
        services,
    )

    assert (await pipeline.eom(TX)).verdict == proceed(results=[SPF, dkim], edits=[first, second])


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.EOM])
async def test_a_rank_knows_what_the_ranks_before_it_found_and_no_more(
    services: FakeServices, stage: Stage
) -> None:
    known: dict[str, tuple[AuthResult, ...]] = {}
    dkim = AuthResult("dkim", Result.NONE)

    def knows(name: str, *after: str) -> Step:
        async def hook(self: object, tx: Transaction, *rcpt: Recipient) -> Verdict:
            known[name] = tx.results
            return proceed()

        body = {"name": name, "after": after, f"on_{stage}": hook}
        made: type[Policy[NoSettings]] = type(name, (Policy,), body)
        return Step(made(NoSettings(), services), 1, OnError.DEFER)

    pipeline = Pipeline(
        [
            policy("spf", say_later(proceed(results=[SPF])), stages=[stage]),
            policy(
                "dkim",
                say(quarantine("odd", results=[dkim]) if stage is Stage.EOM else proceed(results=[dkim])),
                stages=[stage],
            ),
            knows("beside"),
            knows("behind", "spf", "dkim"),
        ],
        services,
    )

    await run_stage(pipeline, stage)

    assert known == {"beside": (), "behind": (SPF, dkim)}


async def test_verdicts_are_counted_by_policy_stage_and_action(services: FakeServices) -> None:
    pipeline = Pipeline(
        [
            policy("spf", stages=[Stage.MAIL]),
            policy("list", say(reject("bad", NEVER)), stages=[Stage.MAIL, Stage.EOM]),
        ],
        services,
    )

    await pipeline.mail(TX)
    await pipeline.mail(TX)
    await pipeline.eom(TX)

    assert services.metrics.of("mxgate_policy_decisions_total") == {
        ("spf", "mail", "continue"): 2,
        ("list", "mail", "reject"): 2,
        ("list", "eom", "reject"): 1,
    }


async def test_the_time_to_each_verdict_is_observed(services: FakeServices) -> None:
    async def quick() -> Verdict:
        services.clock.advance(0.1)
        return proceed()

    async def slow() -> Verdict:
        await asyncio.sleep(0)
        services.clock.advance(0.3)
        return proceed()

    async def fails() -> Verdict:
        services.clock.advance(0.2)
        raise OSError("no")

    await Pipeline([policy("quick", quick), policy("fails", fails), policy("slow", slow)], services).eom(TX)

    seen = services.metrics.observed
    name = "mxgate_policy_duration_seconds"
    assert seen[name, "quick", "eom"] == pytest.approx([0.1])
    assert seen[name, "fails", "eom"] == pytest.approx([0.2])
    # it was called before the loop turned for the first time
    assert seen[name, "slow", "eom"] == pytest.approx([0.3])


async def test_what_policies_said_is_kept_where_somebody_asks(services: FakeServices) -> None:
    observed = Step(policy("seen", say(reject("bad", NEVER))).policy, 10, OnError.DEFER, Mode.OBSERVE)
    pipeline = Pipeline([observed, policy("fails", raise_at_once, stages=[Stage.EOM, Stage.RCPT])], services)
    trail: list[Judged] = []

    await pipeline.rcpt_before(TX, RCPT, trail=trail)
    await pipeline.eom(TX, trail=trail)

    failed = proceed(reason="policy_failed")
    assert [judged._replace(duration_s=0) for judged in trail] == [
        Judged("fails", Stage.RCPT, Mode.ENFORCE, failed, None, 0, "exception", RCPT),
        Judged("seen", Stage.EOM, Mode.OBSERVE, proceed(), reject("bad", NEVER), 0, ""),
        Judged("fails", Stage.EOM, Mode.ENFORCE, failed, None, 0, "exception"),
    ]


async def test_policies_that_do_not_suspend_cost_no_task(services: FakeServices) -> None:
    pipeline = Pipeline(
        [policy("a"), policy("b", after=("a",)), policy("c", say(quarantine("odd")))], services
    )

    stage = pipeline.eom(TX)

    with pytest.raises(StopIteration) as stop:  # it ends in its first step
        stage.send(None)
    assert stop.value.value == Decided(quarantine("odd"), "c")


# --- failures -------------------------------------------------------------------------------------------


class Outage(BaseException):
    """Not even an Exception, as some libraries have them for cancellation."""


async def raise_at_once() -> object:
    raise ConnectionError("redis is down")


async def raise_later() -> object:
    await asyncio.sleep(0)
    raise ConnectionError("redis is down")


async def raise_no_exception() -> object:
    raise Outage("redis is down")


async def cancelled_at_once() -> object:
    raise asyncio.CancelledError


async def cancelled_later() -> object:
    await asyncio.sleep(0)
    raise asyncio.CancelledError


async def cancels_itself() -> object:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return proceed()


def unsound(**fields: object) -> Verdict:
    """A verdict that holds what its types do not allow."""
    verdict = quarantine("odd")
    for name, value in fields.items():
        object.__setattr__(verdict, name, value)
    return verdict


FAILURES = [
    pytest.param(raise_at_once, "exception", "ConnectionError('redis is down')", id="raises"),
    pytest.param(raise_later, "exception", "ConnectionError('redis is down')", id="raises-later"),
    pytest.param(raise_no_exception, "exception", "Outage('redis is down')", id="raises-no-exception"),
    pytest.param(cancelled_at_once, "exception", "CancelledError()", id="cancelled"),
    pytest.param(cancelled_later, "exception", "cancelled itself", id="cancelled-later"),
    pytest.param(cancels_itself, "exception", "cancelled itself", id="cancels-itself"),
    pytest.param(say(None), "verdict", "returned NoneType", id="nonsense"),
    pytest.param(say_later(True), "verdict", "returned bool", id="nonsense-later"),
    pytest.param(say(unsound(action=7)), "verdict", "holds what is no", id="unsound-action"),
    pytest.param(say(unsound(results=("spf",))), "verdict", "holds what is no", id="unsound-result"),
    pytest.param(say(unsound(edits=[AddField("A", "1")])), "verdict", "holds what is no", id="unsound-edits"),
]

# what an author of policies may put into a Verdict or an AuthResult where no mypy looks
UNSOUND = [
    {"results": [SPF]},
    {"edits": (("X-A", "1"),)},
    {"evidence": "seen"},
    {"results": ({"method": "spf"},)},
    {"results": (AuthResult(b"spf", Result.PASS),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", "pass"),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, None),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", []),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", (["a.b", "c"],)),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", ("ab",)),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", (("a.b", "c", "d"),)),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", (("a.b", b"c"),)),)},  # type: ignore[arg-type]
    {"results": (AuthResult("spf", Result.PASS, "", ((b"a.b", "c"),)),)},  # type: ignore[arg-type]
]


@pytest.mark.parametrize("fields", UNSOUND, ids=str)
async def test_a_verdict_that_holds_what_its_types_do_not_allow_is_a_failure(
    services: FakeServices, fields: dict[str, object]
) -> None:
    pipeline = Pipeline([policy("p", say(unsound(**fields)))], services)

    assert (await pipeline.eom(TX)).verdict == proceed(reason="policy_failed")
    assert services.metrics.of("mxgate_policy_failures_total") == {("p", "eom", "verdict"): 1}


async def test_a_sound_verdict_counts_whatever_it_holds(services: FakeServices) -> None:
    class Seen:
        def lines(self) -> Sequence[str]:
            return ["seen"]

    found = AuthResult("spf", Result.PASS, "", (("smtp.mailfrom", "example.org"), ("smtp.helo", "a.example")))
    verdict = quarantine("odd", results=[found], edits=[AddField("X-A", "1")], evidence=Seen())

    assert await Pipeline([policy("p", say(verdict))], services).eom(TX) == Decided(verdict, "p")


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("on_error", OnError)
@pytest.mark.parametrize(("hook", "failure", "error"), FAILURES)
async def test_a_failure_becomes_what_the_operator_chose(
    services: FakeServices, stage: Stage, on_error: OnError, hook: Hook, failure: str, error: str
) -> None:
    beside = policy("beside", say(proceed(results=[SPF])), stages=[stage])
    broken = policy("broken", hook, stages=[stage], method="dkim", on_error=on_error)
    pipeline = Pipeline([broken, beside], services)

    decided = await run_stage(pipeline, stage)

    temperror = AuthResult("dkim", Result.TEMPERROR, "policy failed")
    if on_error is OnError.CONTINUE:
        verdict = proceed(reason="policy_failed", results=[temperror, SPF])
        assert decided == Decided(verdict)
    else:
        verdict = defer("policy_failed", reply.INTERNAL, results=[temperror, SPF])
        assert decided == Decided(verdict, "broken")
    assert services.metrics.of("mxgate_policy_failures_total") == {("broken", stage, failure): 1}
    (line,) = services.log.of("error")
    assert line.event == "policy.failed"
    assert {key: line.keys[key] for key in ("policy", "stage", "reason")} == {
        "policy": "broken",
        "stage": stage,
        "reason": failure,
    }
    assert error in line.keys["error"]


async def test_a_hook_that_is_no_coroutine_function_is_a_failure(services: FakeServices) -> None:
    def plain(self: object, tx: object) -> Verdict:
        return proceed()

    def raises(self: object, tx: object) -> Verdict:
        raise KeyError("x")

    for hook in (plain, raises):
        made = type("p", (Policy,), {"name": "p", "on_eom": hook})(NoSettings(), services)
        pipeline = Pipeline([Step(made, 1, OnError.DEFER)], services)
        assert (await pipeline.eom(TX)).verdict.reason == "policy_failed"


@pytest.mark.parametrize("stage", [s for s in Stage if s is not Stage.EOM])
@pytest.mark.parametrize("on_error", OnError)
async def test_quarantine_before_eom_is_a_failure(
    services: FakeServices, stage: Stage, on_error: OnError
) -> None:
    pipeline = Pipeline([policy("p", say(quarantine("odd")), stages=[stage], on_error=on_error)], services)

    decided = await run_stage(pipeline, stage)

    assert decided.verdict.action is (Action.CONTINUE if on_error is OnError.CONTINUE else Action.DEFER)
    assert services.metrics["mxgate_policy_failures_total", "p", stage, "verdict"] == 1


async def test_a_failure_of_a_policy_without_a_method_says_nothing_of_authentication(
    services: FakeServices,
) -> None:
    pipeline = Pipeline([policy("p", raise_at_once)], services)

    assert (await pipeline.eom(TX)).verdict.results == ()


async def test_a_failure_takes_its_edits_with_it_and_no_others(services: FakeServices) -> None:
    bad = quarantine("odd", edits=[AddField("X-Bad", "1")])
    pipeline = Pipeline(
        [
            policy("bad", say(bad), stages=[Stage.MAIL]),
            policy("good", say(proceed(edits=[AddField("X-Good", "1")])), stages=[Stage.MAIL]),
        ],
        services,
    )

    assert (await pipeline.mail(TX)).verdict.edits == (AddField("X-Good", "1"),)


async def test_system_exit_is_nobodys_failure(services: FakeServices) -> None:
    async def leave() -> object:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await Pipeline([policy("p", leave)], services).eom(TX)


# --- deadlines ------------------------------------------------------------------------------------------


class Hang:
    """A hook that waits for ever, and notes that it was cancelled."""

    def __init__(self) -> None:
        self.begun = self.cancelled = False

    async def __call__(self) -> object:
        self.begun = True
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return proceed()


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("on_error", OnError)
async def test_a_policy_that_hangs_has_failed_at_its_own_deadline(
    services: FakeServices, loop_time: LoopTime, stage: Stage, on_error: OnError
) -> None:
    hang = Hang()
    step = policy("hangs", hang, stages=[stage], timeout_s=3, on_error=on_error, method="spf")
    services.clock.advance(60)
    running = asyncio.ensure_future(run_stage(Pipeline([step], services), stage))
    await turns()

    loop_time.advance(2.9)
    await turns()
    assert not running.done()
    services.clock.advance(3.1)
    loop_time.advance(0.2)
    decided = await running

    temperror = AuthResult("spf", Result.TEMPERROR, "policy failed")
    assert decided.verdict.results == (temperror,)
    assert decided.verdict.reply == (None if on_error is OnError.CONTINUE else reply.INTERNAL)
    assert services.metrics.of("mxgate_policy_failures_total") == {("hangs", stage, "timeout"): 1}
    assert services.metrics.observed["mxgate_policy_duration_seconds", "hangs", stage] == pytest.approx([3.1])
    await turns()
    assert hang.cancelled


async def test_who_blocked_the_loop_before_it_hung_is_told_about(
    services: FakeServices, loop_time: LoopTime
) -> None:
    async def hook() -> object:
        services.clock.advance(0.6)
        return await Hang()()

    running = asyncio.ensure_future(Pipeline([policy("hangs", hook, timeout_s=3)], services).eom(TX))
    await turns()
    loop_time.advance(3)

    assert (await running).verdict.reason == "policy_failed"
    (line,) = services.log.of("warning")
    assert (line.event, line.keys["seconds"]) == ("policy.blocked", 0.6)


async def test_one_that_hangs_does_not_take_the_others_verdicts_along(
    services: FakeServices, loop_time: LoopTime
) -> None:
    gate = asyncio.Event()

    async def slow() -> Verdict:
        await gate.wait()
        return proceed(results=[SPF])

    steps = [
        policy("hangs", Hang(), timeout_s=3),
        policy("slow", slow, timeout_s=9),
        policy("also", Hang(), timeout_s=5),
    ]
    running = asyncio.ensure_future(Pipeline(steps, services).eom(TX))
    await turns()
    loop_time.advance(4)
    await turns()
    gate.set()
    await turns()
    assert not running.done()
    loop_time.advance(2)

    assert (await running).verdict == proceed(reason="policy_failed", results=[SPF])
    assert services.metrics.of("mxgate_policy_failures_total") == {
        ("hangs", "eom", "timeout"): 1,
        ("also", "eom", "timeout"): 1,
    }


@pytest.mark.parametrize("stage", Stage)
async def test_all_policies_of_a_stage_share_its_budget(
    services: FakeServices, loop_time: LoopTime, stage: Stage
) -> None:
    first, second = Hang(), Hang()
    budget = STAGE_BUDGET_S[stage]
    steps = [
        policy("first", first, stages=[stage], timeout_s=budget - 1),
        policy("second", second, stages=[stage], timeout_s=budget, after=("first",)),
        policy("third", Hang(), stages=[stage], after=("second",)),
    ]
    running = asyncio.ensure_future(run_stage(Pipeline(steps, services), stage))
    await turns()
    loop_time.advance(budget - 1)
    await turns()
    assert second.begun
    loop_time.advance(1)

    decided = await running

    assert decided.verdict == proceed(reason="policy_failed")
    failures = services.metrics.of("mxgate_policy_failures_total")
    assert failures == {(name, stage, "timeout"): 1 for name in ("first", "second", "third")}


async def test_a_rank_that_hangs_leaves_those_behind_it_their_share(
    services: FakeServices, loop_time: LoopTime
) -> None:
    gate = asyncio.Event()

    async def waits_a_little() -> Verdict:
        await gate.wait()
        return reject("bad", NEVER)

    budget = STAGE_BUDGET_S[Stage.EOM]
    steps = [
        policy("hangs", Hang(), stages=[Stage.EOM], timeout_s=budget),
        policy("judges", waits_a_little, stages=[Stage.EOM], timeout_s=budget, after=("hangs",)),
    ]
    running = asyncio.ensure_future(run_stage(Pipeline(steps, services), Stage.EOM))
    await turns()
    loop_time.advance(budget / 2)
    await turns()
    # the last rank has all that is left
    loop_time.advance(budget / 2 - 1)
    await turns()
    gate.set()

    assert await running == Decided(reject("bad", NEVER), "judges")


async def test_a_policy_that_ignores_its_cancellation_is_not_waited_for(
    services: FakeServices, loop_time: LoopTime
) -> None:
    gate = asyncio.Event()
    stubborn: list[asyncio.Task[object] | None] = []

    async def hook() -> object:
        stubborn.append(asyncio.current_task())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await gate.wait()
        return proceed()

    running = asyncio.ensure_future(Pipeline([policy("p", hook, timeout_s=1)], services).eom(TX))
    await turns()
    loop_time.advance(1)

    assert (await running).verdict.reason == "policy_failed"
    gate.set()
    (task,) = stubborn
    assert task is not None
    await task


async def test_cancelling_a_stage_cancels_its_policies(services: FakeServices) -> None:
    hangs = [Hang(), Hang()]
    pipeline = Pipeline([policy(f"p{at}", hang) for at, hang in enumerate(hangs)], services)
    running = asyncio.ensure_future(pipeline.eom(TX))
    await turns()

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    await turns()
    assert all(hang.cancelled for hang in hangs)
    assert services.log.lines == []


# --- start, stop, outcome ---------------------------------------------------------------------------------


class Living(Policy[NoSettings]):
    """Notes its life."""

    def __init__(self, name: str, life: list[str], fails: str = "") -> None:
        super().__init__(NoSettings(), FakeServices())
        self.name = name  # type: ignore[misc]  # of the class elsewhere
        self._life, self._fails = life, fails

    async def start(self) -> None:
        self._note("start")

    async def stop(self) -> None:
        self._note("stop")

    async def on_outcome(self, tx: Transaction, outcome: Outcome) -> None:
        self._note("outcome")

    def _note(self, event: str) -> None:
        self._life.append(f"{event} {self.name}")
        if self._fails == event:
            raise OSError("no such file")


def living(life: list[str], services: FakeServices, fails: str = "") -> Pipeline:
    policies = [Living("a", life), Living("b", life, fails), Living("c", life)]
    return Pipeline([Step(p, 5, OnError.CONTINUE) for p in policies], services)


async def test_policies_are_stopped_in_reverse_order(services: FakeServices) -> None:
    life: list[str] = []
    pipeline = living(life, services)

    await pipeline.start()
    await pipeline.stop()

    assert life == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]


async def test_a_policy_that_does_not_start_stops_the_start_and_those_before_it(
    services: FakeServices,
) -> None:
    life: list[str] = []

    with pytest.raises(OSError, match="no such file") as failed:
        await living(life, services, "start").start()
    assert start_failure(failed.value) == "policy b did not start: OSError('no such file')"

    assert life == ["start a", "start b", "stop a"]
    (line,) = services.log.of("error")
    assert (line.event, line.keys["policy"]) == ("policy.start_failed", "b")


async def test_a_policy_whose_start_hangs_is_named_and_stops_the_start(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hangs(Living):
        async def start(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr("gateway.pipeline.START_S", 0)
    life: list[str] = []
    steps = [Step(p, 5, OnError.CONTINUE) for p in (Living("a", life), Hangs("b", life))]

    with pytest.raises(TimeoutError) as failed:
        await Pipeline(steps, services).start()

    assert start_failure(failed.value) == "policy b did not start: not within 20 s"
    assert life == ["start a", "stop a"]


async def test_a_policy_that_does_not_stop_is_logged_and_the_others_stop(services: FakeServices) -> None:
    life: list[str] = []

    await living(life, services, "stop").stop()

    assert life == ["stop c", "stop b", "stop a"]
    (line,) = services.log.of("error")
    assert (line.event, line.keys["policy"]) == ("policy.stop_failed", "b")


async def test_a_failing_on_outcome_is_logged_and_the_others_are_told(services: FakeServices) -> None:
    life: list[str] = []

    await living(life, services, "outcome").outcome(TX, Outcome(reply.OK, delivered=True))

    assert life == ["outcome a", "outcome b", "outcome c"]
    (line,) = services.log.of("error")
    assert (line.event, line.keys["policy"], line.keys["stage"]) == ("policy.failed", "b", "outcome")


async def test_a_policy_that_is_off_is_not_told_of_outcomes(services: FakeServices) -> None:
    life: list[str] = []
    steps = [Step(Living(mode, life), 5, OnError.CONTINUE, mode) for mode in Mode]

    await Pipeline(steps, services).outcome(TX, Outcome(reply.OK, delivered=True))

    assert life == ["outcome enforce", "outcome observe"]


def test_the_stages_budgets_are_those_of_the_design() -> None:
    # DESIGN.md section 8: below the minutes after which a sender gives up
    assert dict.fromkeys(Stage, 20.0) | {Stage.EOM: 25.0} == STAGE_BUDGET_S


def told(name: str, hook: Hook, *, timeout_s: float = 10) -> Step:
    async def on_outcome(self: object, tx: Transaction, outcome: Outcome) -> None:
        await hook()

    made = type(name, (Policy,), {"name": name, "on_outcome": on_outcome})(NoSettings(), FakeServices())
    return Step(made, timeout_s, OnError.CONTINUE)


async def test_an_on_outcome_that_hangs_is_given_up(
    services: FakeServices, loop_time: LoopTime, seen: list[str]
) -> None:
    hang = Hang()
    pipeline = Pipeline([told("hangs", hang, timeout_s=2), told("next", note(seen, "next"))], services)
    running = asyncio.ensure_future(pipeline.outcome(TX, Outcome(reply.OK, delivered=True)))
    await turns()
    loop_time.advance(2.1)
    await running

    assert hang.cancelled
    assert seen == ["next"]
    assert "TimeoutError" in services.log.of("error")[0].keys["error"]


@pytest.mark.parametrize("hook", [cancelled_at_once, cancelled_later])
async def test_an_on_outcome_that_is_cancelled_by_itself_is_a_failure(
    services: FakeServices, seen: list[str], hook: Hook
) -> None:
    pipeline = Pipeline([told("broken", hook), told("next", note(seen, "next"))], services)

    await pipeline.outcome(TX, Outcome(reply.OK, delivered=True))

    assert seen == ["next"]
    assert "CancelledError" in services.log.of("error")[0].keys["error"]


async def test_cancelling_the_outcome_is_obeyed(services: FakeServices, seen: list[str]) -> None:
    pipeline = Pipeline([told("hangs", Hang()), told("next", note(seen, "next"))], services)
    running = asyncio.ensure_future(pipeline.outcome(TX, Outcome(reply.OK, delivered=True)))
    await turns()

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert seen == []
    assert services.log.lines == []


def test_knows_whether_anybody_wants_outcomes_or_signs(services: FakeServices) -> None:
    assert not Pipeline([policy("p")], services).plans_outcome
    assert not Pipeline([policy("p")], services).plans_send
    assert Pipeline([policy("p"), told("t", go_on)], services).plans_outcome


async def test_the_default_hooks_go_on() -> None:
    plain = Policy(NoSettings(), FakeServices())

    assert plain.stages() == frozenset()
    await plain.start()
    for verdict in (
        await plain.on_connect(SESSION),
        await plain.on_ehlo(SESSION),
        await plain.on_mail(TX),
        await plain.on_rcpt(TX, RCPT),
        await plain.on_eom(TX),
    ):
        assert verdict == proceed()
    await plain.on_outcome(TX, Outcome(reply.OK, delivered=True))
    await plain.stop()


# --- what the stages leave a policy -------------------------------------------------------------------


def test_a_policy_has_its_ranks_share_of_the_stage_that_leaves_it_least() -> None:
    steps = [
        policy("relay_guard", stages=[Stage.RCPT]),
        policy("limits", stages=[Stage.RCPT]),
        policy("spf", stages=[Stage.MAIL]),
        policy("dkim"),
        policy("arc"),
        policy("dmarc", after=("spf", "dkim", "arc")),
        policy("grey", stages=[Stage.RCPT, Stage.EOM], after=("dmarc", RECIPIENT)),
        policy("idle", stages=[]),
    ]
    eom, rcpt = STAGE_BUDGET_S[Stage.EOM], STAGE_BUDGET_S[Stage.RCPT]
    assert least_times(steps) == {
        # alone, then those before the downstream's answer, then those behind it
        "relay_guard": rcpt / 3,
        "limits": rcpt / 3,
        "spf": STAGE_BUDGET_S[Stage.MAIL],
        "dkim": eom / 3,
        "arc": eom / 3,
        "dmarc": eom / 3,
        "grey": rcpt / 3,
        "idle": inf,
    }
