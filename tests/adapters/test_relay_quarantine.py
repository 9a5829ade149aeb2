"""A delivery by a route that is not the recipients' own: quarantine, which teaches nothing about them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from gateway.adapters.relay import RouteSettings
from gateway.relaying import Delivery
from gateway.session import Transaction
from gateway.smtp.address import Mailbox
from tests.adapters.relaykit import (
    SESSION,
    Bench,
    Mail,
    both_loops,
    envelope,
    host_of,
    relay_to,
    settings_for,
)
from tests.adapters.sink import Sink, say

ACCEPTED = "250 2.1.5 Recipient ok"


@asynccontextmanager
async def two_routes(own: Sink, jail: Sink) -> AsyncIterator[Bench]:
    routes = (
        RouteSettings("jail", (), groups=((host_of(jail),),)),
        *(replace(route, domains=("example.org",)) for route in settings_for(own).routes),
    )
    async with relay_to(own, routes=routes) as bench:
        yield bench


async def quarantined(bench: Bench, *rcpts: str) -> Delivery:
    tx = Transaction("t1", SESSION, envelope(*rcpts))
    return await bench.relay.deliver(tx, Mail(), "jail")


@both_loops
async def test_a_message_goes_to_the_route_that_is_named() -> None:
    async with Sink() as own, Sink() as jail, two_routes(own, jail) as bench:
        assert (await quarantined(bench, "b@example.org", "c@example.org")).stored
        assert (await bench.deliver()).stored

    assert (len(jail.messages), len(own.messages)) == (1, 1)


@pytest.mark.parametrize("step", ["mail", "rcpt", "data", "dot"])
async def test_a_refusal_there_is_not_remembered_for_the_recipients(step: str) -> None:
    async with Sink() as own, Sink() as jail, two_routes(own, jail) as bench:
        assert bench.relay.route(Mailbox("postmaster", None)) == "main", "quarantine is nobody's own route"
        assert await bench.verify("b@example.org") == [ACCEPTED]
        jail.steps[step] = [say("554 5.7.1 No room in jail")]

        delivery = await quarantined(bench)

        assert not delivery.stored
        assert str(delivery.reply) == "554 5.7.1 No room in jail"
        assert await bench.verify("b@example.org") == [ACCEPTED]
        assert (await bench.deliver()).stored
