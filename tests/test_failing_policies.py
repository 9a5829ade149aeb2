"""No policy can hurt mail by failing: every way to fail, at every stage, through the pipeline and the gatekeeper."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from gateway.gatekeeper import Answer, Conversation
from gateway.plan import Step
from gateway.policy import Mode, NoSettings, OnError, Policy
from gateway.smtp import reply
from gateway.verdict import AddField, Stage, proceed, quarantine
from tests.fakes import STORED, FakeServices, LoopTime
from tests.world import ABOVE, CLIENT, MESSAGE, World, envelope, rcpt, send, started

BLOCK_S, TIMEOUT_S = 2.0, 1.0

T = TypeVar("T")

Hook = Callable[[FakeServices], Awaitable[object]]


async def raises(services: FakeServices) -> object:
    raise ConnectionError("redis is down")


async def raises_later(services: FakeServices) -> object:
    await asyncio.sleep(0)
    raise ConnectionError("redis is down")


async def hangs(services: FakeServices) -> object:
    return await asyncio.Event().wait()


async def blocks(services: FakeServices) -> object:
    services.clock.uptime_s += BLOCK_S
    return proceed()


async def blocks_later(services: FakeServices) -> object:
    await asyncio.sleep(0)
    services.clock.uptime_s += BLOCK_S
    return proceed()


async def blocks_and_raises(services: FakeServices) -> object:
    services.clock.uptime_s += BLOCK_S
    raise ConnectionError("redis is down")


async def nonsense(services: FakeServices) -> object:
    return True


async def cancels_itself(services: FakeServices) -> object:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return proceed()


async def is_cancelled(services: FakeServices) -> object:
    raise asyncio.CancelledError


async def forbidden_edit(services: FakeServices) -> object:
    return proceed(edits=[AddField("X-Fine", "1"), AddField("From", "forged@example.org")])


WAYS: list[tuple[Hook, str]] = [
    (raises, "exception"),
    (raises_later, "exception"),
    (hangs, "timeout"),
    (blocks, "timeout"),
    (blocks_later, "timeout"),
    (blocks_and_raises, "exception"),
    (nonsense, "verdict"),
    (cancels_itself, "exception"),
    (is_cancelled, "exception"),
]
CASES = [(hook, failure, stage) for hook, failure in WAYS for stage in Stage]
CASES.append((forbidden_edit, "verdict", Stage.EOM))


class Broken(Policy[NoSettings]):
    """Fails at one stage until it is repaired."""

    name = "broken"

    def __init__(self, services: FakeServices, stage: Stage, hook: Hook) -> None:
        super().__init__(NoSettings(), services)
        self.is_repaired = False

        async def run(*args: object) -> object:
            return proceed() if self.is_repaired else await hook(services)

        setattr(self, f"on_{stage}", run)

    @classmethod
    def stages(cls, settings: NoSettings | None = None) -> frozenset[Stage]:  # noqa: ARG003 - the base's
        return frozenset(Stage)


def world_of(
    stage: Stage, hook: Hook, mode: Mode = Mode.ENFORCE, on_error: OnError = OnError.DEFER
) -> tuple[World, Broken]:
    services = FakeServices()
    broken = Broken(services, stage, hook)
    return World(Step(broken, TIMEOUT_S, on_error, mode), services=services), broken


@pytest.fixture
async def loop_time(monkeypatch: pytest.MonkeyPatch) -> LoopTime:
    loop = asyncio.get_running_loop()
    clock = LoopTime(loop)
    monkeypatch.setattr(loop, "time", clock)
    return clock


async def over(coro: Coroutine[Any, Any, T], loop_time: LoopTime) -> T:
    """The result of what may have to wait for a deadline."""
    task = await started(coro)
    if not task.done():
        loop_time.advance(TIMEOUT_S)
    result: T = await task
    return result


async def message(talk: Conversation, loop_time: LoopTime) -> reply.Reply:
    """One transaction; the reply that decided it."""
    answer = await over(talk.mail(envelope()), loop_time)
    assert answer == Answer(reply.SENDER_OK)
    (said,) = (await over(talk.rcpt([rcpt("b@example.org")]), loop_time)).replies
    if not said.is_positive:
        talk.reset()
        return said
    send(talk)
    last: Answer = await over(talk.eom(None), loop_time)
    assert not last.close
    return last.reply


@pytest.mark.parametrize(
    ("hook", "failure", "stage"), CASES, ids=[f"{h.__name__}-{stage}" for h, _, stage in CASES]
)
@pytest.mark.parametrize("on_error", OnError)
@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.OBSERVE])
async def test_a_failure_is_what_the_operator_chose_and_the_next_message_is_judged_anew(
    loop_time: LoopTime, hook: Hook, failure: str, stage: Stage, on_error: OnError, mode: Mode
) -> None:
    world, broken = world_of(stage, hook, mode, on_error)
    is_deferred = on_error is OnError.DEFER and mode is Mode.ENFORCE
    talk = world.gate.open(CLIENT, 1234)
    assert await over(talk.connect(), loop_time) is None
    assert await over(talk.ehlo("client.example", esmtp=True), loop_time) is None

    first = await message(talk, loop_time)
    broken.is_repaired = True
    second = await message(talk, loop_time)

    # the replies, and what the downstream has
    assert first == (reply.INTERNAL if is_deferred else STORED)
    # a verdict about the connection or its name stays in force for the session
    stays = is_deferred and stage in (Stage.CONNECT, Stage.EHLO)
    assert second == (reply.INTERNAL if stays else STORED)
    delivered = [each.message for each in world.relay.delivered]
    assert delivered == [ABOVE.replace(b"T1-1", each.encode()) + MESSAGE for each in ids(first, second)]
    # the metrics
    metrics = world.services.metrics
    assert metrics.of("mxgate_policy_failures_total") == {("broken", stage, failure): 1}
    would = "continue" if on_error is OnError.CONTINUE else "defer"
    assert metrics["mxgate_policy_would_total", "broken", stage, would] >= (mode is Mode.OBSERVE)
    assert metrics["mxgate_policy_would_total", "broken", stage, "defer"] == (
        mode is Mode.OBSERVE and on_error is OnError.DEFER
    )
    assert metrics["mxgate_policy_decisions_total", "broken", stage, "defer"] == is_deferred
    actions = [("accepted" if said is STORED else "deferred") for said in (first, second)]
    assert world.count("transactions") == {action: actions.count(action) for action in actions}
    # the log
    (line,) = world.services.log.of("error")
    assert (line.event, line.keys["policy"], line.keys["stage"], line.keys["reason"]) == (
        "policy.failed",
        "broken",
        stage,
        failure,
    )
    assert [keys["action"] for _, keys in world.lines] == actions
    decided = ("policy_failed", "broken") if is_deferred else ("", "")  # who just went on decided nothing
    assert (world.lines[0][1]["reason"], world.lines[0][1]["policy"]) == decided
    blocked = [line.keys["seconds"] for line in world.services.log.of("warning")]
    assert blocked == ([BLOCK_S] if "block" in hook.__name__ else [])
    assert metrics["mxgate_policy_blocked_total", "broken", stage] == len(blocked)


def ids(*replies: reply.Reply) -> list[str]:
    """The ids of the transactions that were accepted."""
    return [f"T1-{number}" for number, said in enumerate(replies, 1) if said is STORED]


@pytest.mark.parametrize("stage", Stage)
async def test_a_block_within_the_deadline_is_told_and_no_failure(stage: Stage, loop_time: LoopTime) -> None:
    async def slow(services: FakeServices) -> object:
        services.clock.uptime_s += 0.6
        return proceed()

    world, _ = world_of(stage, slow)
    talk = world.gate.open(CLIENT, 1234)
    await talk.connect()
    await talk.ehlo("client.example", esmtp=True)

    assert await message(talk, loop_time) == STORED

    (line,) = world.services.log.of("warning")
    assert (line.event, line.keys) == (
        "policy.blocked",
        {"policy": "broken", "stage": stage, "seconds": 0.6},
    )
    assert world.services.metrics.of("mxgate_policy_failures_total") == {}


async def test_quarantine_before_the_end_of_the_message_is_a_failure(loop_time: LoopTime) -> None:
    async def early(services: FakeServices) -> object:
        return quarantine("odd")

    world, _ = world_of(Stage.MAIL, early)
    talk = await world.greet()

    assert await message(talk, loop_time) == reply.INTERNAL
    assert world.services.metrics.of("mxgate_policy_failures_total") == {("broken", "mail", "verdict"): 1}


async def test_the_recipients_of_a_batch_and_their_verification_share_one_budget(loop_time: LoopTime) -> None:
    world, _ = world_of(Stage.RCPT, hangs)
    (step,) = world.pipeline.steps
    world = World(Step(step.policy, 15, OnError.CONTINUE), services=world.services)
    talk = await world.mail()
    begun = loop_time()

    task = await started(talk.rcpt([rcpt(f"b{n}@example.org") for n in range(10)]))
    for spent_s in (15, 5):
        assert not task.done()
        loop_time.advance(spent_s)
        await started(asyncio.sleep(0))

    assert (await task).replies == (reply.RECIPIENT_OK,) * 10, "the time stands still from here on"
    assert world.relay.last == [begun + 20], "what is left is the downstream's"
