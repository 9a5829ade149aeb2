"""Quarantine by header and by route: what the downstream gets, and that a refusal there is never the sender's."""

from __future__ import annotations

import pytest

from gateway.gatekeeper import Answer, GatekeeperSettings
from gateway.plan import Step
from gateway.policy import Mode, OnError
from gateway.relaying import Delivery
from gateway.smtp import reply
from gateway.smtp.reply import Reply
from gateway.verdict import AddField, RemoveFields, Stage, proceed, quarantine
from tests.fakes import STORED, Says
from tests.world import ABOVE, AUTHRES, MESSAGE, RECEIVED, World, rcpt

FIELD = b"X-Mxgate-Quarantine: spam\r\n"
REFUSALS = [
    Delivery(Reply(554, "5.7.1", "Spam"), stored=False, error="refused"),
    Delivery(Reply(552, "5.3.4", "Too big for us"), stored=False, error="refused"),
    Delivery(Reply(452, "4.2.2", "Full"), stored=False, error="refused"),
    Delivery(reply.PARTIAL_REFUSAL, stored=False, error="partial"),
    Delivery(reply.DOWNSTREAM_TROUBLE, stored=False, error="connect"),
    Delivery(reply.FINAL_REPLY_LOST, stored=False, error="final_lost"),
    Delivery(STORED, stored=False, error="protocol"),
]


def world_of(route: str = "", header: str = "X-Mxgate-Quarantine") -> World:
    settings = GatekeeperSettings("mx.example.org", quarantine_header=header, quarantine_route=route)
    return World(Says({Stage.EOM: quarantine("spam")}), settings=settings)


@pytest.mark.parametrize("route", ["", "quarantine"])
async def test_a_quarantined_message_says_why_and_goes_where_it_is_to_go(route: str) -> None:
    world = world_of(route)

    assert await world.message() == Answer(STORED)

    assert world.relay.delivered_to == [route]
    assert world.relay.delivered[0].message == AUTHRES + FIELD + RECEIVED + MESSAGE
    ((event, keys),) = world.lines
    assert (event, keys["action"], keys["policy"], keys["reason"]) == (
        "message.quarantined",
        "quarantined",
        "says",
        "spam",
    )
    assert world.count("transactions") == {"quarantined": 1}


async def test_a_good_message_goes_its_own_way() -> None:
    settings = GatekeeperSettings("mx.example.org", quarantine_route="quarantine")
    world = World(settings=settings)

    await world.message()

    assert world.relay.delivered_to == [""]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.reply.code}-{refusal.error}")
async def test_any_refusal_of_the_quarantine_is_a_451(refusal: Delivery) -> None:
    world = world_of("quarantine")
    world.relay.deliveries = {"quarantine": refusal}

    assert await world.message() == Answer(reply.INTERNAL)

    assert world.relay.delivered == []
    assert world.relay.delivered_to == ["quarantine"], "it is not tried another way"
    ((event, keys),) = world.lines
    assert (event, keys["policy"], keys["reason"]) == ("message.deferred", "says", "quarantine")
    assert keys["error"] == f"{refusal.error}: {refusal.reply}"
    assert world.count("transactions") == {"deferred": 1}


async def test_a_refusal_of_the_recipients_own_downstream_stays_its_own() -> None:
    world = world_of()
    world.relay.delivery = REFUSALS[0]

    assert await world.message() == Answer(REFUSALS[0].reply)


async def test_the_field_has_the_name_that_the_operator_gave_it_and_no_forgery_stays() -> None:
    world = world_of(header="X-Jail")

    await world.message(b"x-jail: no\r\nX-Mxgate-Quarantine: theirs\r\n" + MESSAGE)

    assert world.relay.delivered[0].message == (
        AUTHRES + b"X-Jail: spam\r\n" + RECEIVED + b"X-Mxgate-Quarantine: theirs\r\n" + MESSAGE
    )


@pytest.mark.parametrize("edit", [AddField("X-JAIL", "1"), RemoveFields("x-jail")], ids=repr)
async def test_no_policy_writes_or_removes_the_field(edit: AddField | RemoveFields) -> None:
    settings = GatekeeperSettings("mx.example.org", quarantine_header="X-Jail")
    step = Step(Says({Stage.EOM: proceed(edits=[edit])}), 10, OnError.DEFER)

    assert await World(step, settings=settings).message() == Answer(reply.INTERNAL)


async def test_an_observed_policy_puts_nothing_into_quarantine() -> None:
    step = Step(Says({Stage.EOM: quarantine("spam")}), 10, OnError.DEFER, Mode.OBSERVE)
    world = World(step, settings=GatekeeperSettings("mx.example.org", quarantine_route="quarantine"))

    assert await world.message() == Answer(STORED)

    assert world.relay.delivered_to == [""]
    assert world.relay.delivered[0].message == ABOVE + MESSAGE
    assert world.services.metrics["mxgate_policy_would_total", "says", "eom", "quarantine"] == 1


async def test_a_message_has_no_more_recipients_than_the_quarantine_takes() -> None:
    world = world_of("quarantine")
    world.relay.limits = {"quarantine": 1}
    talk = await world.rcpt("b@example.org")

    assert (await talk.rcpt([rcpt("c@example.org")])).replies == (reply.TOO_MANY_RECIPIENTS,)
