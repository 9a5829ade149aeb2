"""Exemptions, and other modes and settings for the recipients of a domain, in whole sessions."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from gateway.plan import Override, Step
from gateway.policy import Mode, OnError, Policy
from gateway.session import AddressSource, Session, Trust
from gateway.smtp import reply
from gateway.verdict import AddField, AuthResult, Result, Stage, Verdict, defer, proceed, reject
from tests.fakes import STORED, Says, SaysBehind
from tests.world import EARLY, LATER, NEVER, World, envelope, rcpt, send

ALL: dict[Stage | str, Verdict] = {
    **dict.fromkeys((*EARLY, Stage.RCPT), defer("grey", LATER)),
    Stage.EOM: reject("spam", NEVER),
}


def step(
    policy: Policy[object] | Says,
    *overrides: Override,
    mode: Mode = Mode.ENFORCE,
    on_error: OnError = OnError.CONTINUE,
) -> Step:
    return Step(policy, 10, on_error, mode, overrides=overrides)


# --- exempt ---------------------------------------------------------------------------------------------


async def test_an_exempt_client_meets_none_of_a_policys_hooks() -> None:
    says = Says(
        {**ALL, Stage.MAIL: proceed(results=[AuthResult("spf", Result.PASS)], edits=[AddField("X-A", "1")])}
    )
    world = World(Step(says, 10, OnError.DEFER, exempt=(ip_network("192.0.2.0/24"),)))
    talk = await world.content()

    assert (await talk.eom(None)).reply == STORED

    told = talk.outcome()
    assert told is not None
    await told
    assert (says.transactions, says.told) == ([], [])
    assert world.relay.delivered[0].tx.results == ()
    assert world.services.metrics.of("mxgate_policy_decisions_total") == {}


def test_an_address_that_hides_its_clients_exempts_nobody() -> None:
    exempt = Step(Says(ALL), 10, OnError.DEFER, exempt=(ip_network("192.0.2.0/24"), Trust.TRUSTED))
    session = Session("S", ip_address("192.0.2.1"), 1234, trust=Trust.TRUSTED)

    assert exempt.exempts(session)
    assert not exempt.exempts(replace(session, address_source=AddressSource.HIDDEN))


def test_who_has_authenticated_is_exempt_behind_any_address() -> None:
    exempt = Step(Says(ALL), 10, OnError.DEFER, exempt=(Trust.AUTHENTICATED,))
    session = Session("S", ip_address("192.0.2.1"), 1234, trust=Trust.AUTHENTICATED, user="ann")

    assert exempt.exempts(replace(session, address_source=AddressSource.HIDDEN))
    assert not exempt.exempts(replace(session, trust=Trust.UNTRUSTED, user=None))


async def test_other_clients_are_judged_as_ever() -> None:
    world = World(Step(Says(ALL), 10, OnError.DEFER, exempt=(ip_network("198.51.100.0/24"),)))
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("b@example.org")])).replies == (LATER,)


# --- domains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [False, True])
async def test_each_recipient_is_judged_as_its_domain_wants(behind: bool) -> None:
    kind = SaysBehind if behind else Says
    base, other = kind({Stage.RCPT: defer("grey", LATER)}), kind({Stage.RCPT: reject("listed", NEVER)})
    world = World(
        step(
            base,
            Override("other.example", Mode.ENFORCE, other),
            Override("quiet.example", Mode.OBSERVE),
            Override(".off.example", Mode.OFF),
        )
    )
    talk = await world.mail()

    answers = [
        (await talk.rcpt([rcpt(f"b@{domain}")])).replies[0]
        for domain in ("example.org", "other.example", "off.example", "quiet.example")
    ]

    assert answers == [LATER, NEVER, LATER, reply.RECIPIENT_OK]
    name = base.name
    assert world.services.metrics.of("mxgate_policy_would_total") == {(name, "rcpt", "defer"): 1}
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("b@a.off.example")])).replies == (reply.RECIPIENT_OK,)


async def test_a_message_is_judged_as_the_domain_of_its_recipients_wants() -> None:
    base, other = Says({Stage.EOM: reject("spam", NEVER)}), Says()
    world = World(step(base, Override("example.org", Mode.ENFORCE, other)))
    talk = await world.content()

    assert (await talk.eom(None)).reply == STORED
    told = talk.outcome()
    assert told is not None
    await told
    assert [stage for stage, _ in base.transactions] == [Stage.MAIL], "before RCPT there is no recipient"
    assert [stage for stage, _ in other.transactions] == [Stage.RCPT, Stage.EOM]
    assert (len(base.told), len(other.told)) == (0, 1)


async def test_recipients_that_are_judged_otherwise_come_again_in_a_transaction_of_their_own() -> None:
    says = Says()
    world = World(
        step(says, Override("other.example", Mode.ENFORCE, Says()), Override("off.example", Mode.OFF))
    )
    assert world.pipeline.has_groups
    talk = await world.rcpt("b@example.org", "c@other.example", "d@example.net", "e@off.example")

    talk.reset()

    ((_, keys),) = world.lines
    assert (keys["rcpt_count"], keys["refused_count"], keys["reason"]) == (2, 2, "other_group")
    assert world.relay.asked == [("b@example.org", "d@example.net")]
    await talk.mail(envelope())
    assert (await talk.rcpt([rcpt("c@other.example"), rcpt("b@example.org")])).replies == (
        reply.RECIPIENT_OK,
        reply.TOO_MANY_RECIPIENTS,
    )


async def test_a_refused_recipient_does_not_bind_the_others_to_its_group() -> None:
    world = World(step(Says({"b@example.org": defer("grey", LATER)}), Override("other.example", Mode.OFF)))
    talk = await world.mail()

    replies = (await talk.rcpt([rcpt("b@example.org"), rcpt("c@other.example")])).replies

    assert replies == (LATER, reply.RECIPIENT_OK)


async def test_observed_policies_part_no_recipients() -> None:
    other = Says({Stage.EOM: reject("spam", NEVER)})
    world = World(
        step(
            Says(),
            Override("other.example", Mode.OBSERVE, other),
            Override("off.example", Mode.OFF),
            mode=Mode.OBSERVE,
        ),
    )
    assert not world.pipeline.has_groups
    talk = await world.rcpt("b@other.example", "c@example.org", "d@off.example")
    send(talk)

    assert (await talk.eom(None)).reply == STORED
    assert world.relay.asked == [("b@other.example", "c@example.org", "d@off.example")]
    assert world.services.metrics["mxgate_policy_would_total", "says", "eom", "reject"] == 1


async def test_an_override_that_changes_nothing_parts_no_recipients() -> None:
    world = World(step(Says(), Override("other.example", Mode.ENFORCE)))

    assert not world.pipeline.has_groups
    await world.rcpt("b@other.example", "c@example.org")
    assert world.relay.asked == [("b@other.example", "c@example.org")]


async def test_a_policy_that_is_off_may_be_on_for_a_domain() -> None:
    world = World(step(Says(ALL), Override("example.org", Mode.ENFORCE), mode=Mode.OFF))
    talk = await world.mail()

    assert (await talk.rcpt([rcpt("b@example.net"), rcpt("b@example.org")])).replies == (
        reply.RECIPIENT_OK,
        LATER,
    )


async def test_the_policies_of_overrides_live_as_long_as_the_others() -> None:
    life: list[str] = []

    class Living(Says):
        def __init__(self, number: int) -> None:
            super().__init__()
            self._number = number

        async def start(self) -> None:
            life.append(f"start {self._number}")

        async def stop(self) -> None:
            life.append(f"stop {self._number}")

    overrides = [Override("a.example", Mode.ENFORCE, Living(2)), Override("b.example", Mode.OFF)]
    world = World(step(Living(1), *overrides))

    await world.pipeline.start()
    await world.pipeline.stop()

    assert life == ["start 1", "start 2", "stop 2", "stop 1"]


class SaysFirst(Says):
    name = "first"


class SaysSecond(Says):
    name = "second"


class SaysLast(Says):
    name = "last"
    after = ("first",)


@pytest.mark.parametrize("other", [SaysSecond, SaysLast])
@pytest.mark.parametrize("stage", EARLY)
async def test_a_refusal_of_one_policy_does_not_hide_that_of_another(stage: Stage, other: type[Says]) -> None:
    first = step(SaysFirst({stage: reject("a", NEVER)}), Override("free.example", Mode.OFF))
    talk = await World(first, step(other({stage: defer("b", LATER)}))).mail()

    answers = await talk.rcpt([rcpt("x@example.org"), rcpt("a@free.example")])

    assert answers.replies == (NEVER, LATER)


async def test_a_refusal_of_a_message_ends_its_stage_where_other_domains_differ_too() -> None:
    first = step(SaysFirst({Stage.EOM: reject("a", NEVER)}), Override("free.example", Mode.OFF))
    behind = SaysLast()
    talk = await World(first, step(behind)).content()

    assert (await talk.eom(None)).reply == NEVER
    assert [stage for stage, _ in behind.transactions] == [Stage.MAIL, Stage.RCPT]


@pytest.mark.parametrize("stage", EARLY)
async def test_a_held_refusal_is_not_for_domains_whose_policy_is_observed_or_off(stage: Stage) -> None:
    verdicts: dict[Stage | str, Verdict] = {stage: defer("grey", LATER)}
    overrides = [Override("off.example", Mode.OFF), Override("observe.example", Mode.OBSERVE)]
    # what else was said at the stage is not held, and spares no recipient its own stage
    second = SaysSecond({stage: proceed(reason="known"), "c@off.example": reject("no", NEVER)})
    world = World(step(Says(verdicts), *overrides), step(second))
    talk = await world.mail()

    answers = await talk.rcpt(
        [
            rcpt("b@example.org"),
            rcpt("c@off.example"),
            rcpt("b@off.example"),
            rcpt("b@observe.example"),
            rcpt("b@example.org"),
        ]
    )

    assert answers.replies == (LATER, NEVER, reply.RECIPIENT_OK, reply.RECIPIENT_OK, LATER)
