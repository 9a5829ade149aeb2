"""Routes: which one takes a recipient, what is offered, what is known not to be taken."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.adapters.relay import HostSettings, RelaySettings, RelaySettingsError, RouteSettings
from gateway.relaying import Offer
from gateway.smtp.reply import (
    ROUTE_NO_SMTPUTF8,
    ROUTE_TOO_BIG,
)
from tests.adapters.relaykit import (
    TROUBLE,
    Bench,
    both_loops,
    envelope,
    mailbox,
    relay_to,
    turns,
)
from tests.adapters.sink import CLOSE, Sink, say
from tests.fakes import FakeServices

# --- what is offered ---------------------------------------------------------------------------------

CAUTIOUS = Offer(eightbitmime=True, smtputf8=False, dsn=False, size=0)


@both_loops
async def test_the_offer_is_cautious_until_the_downstream_answered() -> None:
    async with Sink(extensions=("DSN", "SMTPUTF8", "SIZE 1000")) as sink, relay_to(sink) as bench:
        assert bench.relay.offer() == CAUTIOUS
        assert bench.relay.refusal("main", envelope(smtputf8=True, size_hint=10**9)) is None
        await bench.relay.start()
        await sink.until(lambda sink: sink.commands)
        await turns(lambda: bench.relay.offer() != CAUTIOUS)
        assert bench.relay.offer() == Offer(eightbitmime=False, smtputf8=True, dsn=True, size=1000)


@both_loops
async def test_the_probe_goes_on_until_there_is_an_answer() -> None:
    async with (
        Sink(banner=[say("554 5.7.1 No", "close"), CLOSE]) as sink,
        relay_to(sink, probe_min_s=0.001) as bench,
    ):
        await bench.relay.start()
        await sink.until(lambda sink: sink.commands)
        assert len(sink.peers) == 3
        assert bench.errors == {"banner": 2}
        assert {keys["step"] for keys in bench.failures} == {"probe"}


@both_loops
async def test_a_probe_that_ends_by_a_defect_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Sink() as sink, relay_to(sink) as bench:

        async def acquire(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(bench.pool, "acquire", acquire)
            await bench.relay.start()
            await turns(lambda: bench.services.log.of("error"))
        assert [line.event for line in bench.services.log.of("error")] == ["relay.failed"]
        assert (await bench.deliver()).stored


@both_loops
async def test_each_new_connection_teaches_what_is_offered() -> None:
    async with Sink(dot=say("250 2.0.0 Stored", "close")) as sink, relay_to(sink) as bench:
        await bench.deliver()
        assert bench.relay.offer() == Offer(eightbitmime=True, smtputf8=True, dsn=True, size=10**9)
        sink.extensions = ("SIZE",)
        await sink.until(lambda sink: not sink.open_peers)
        await bench.deliver()
        assert bench.relay.offer() == Offer(eightbitmime=False, smtputf8=False, dsn=False, size=0)


async def test_what_a_route_is_known_not_to_take_is_refused() -> None:
    async with Sink(extensions=("SIZE 1000",)) as sink, relay_to(sink) as bench:
        await bench.deliver()
        assert bench.relay.refusal("main", envelope(size_hint=1000)) is None
        assert bench.relay.refusal("main", envelope(size_hint=1001)) == ROUTE_TOO_BIG
        assert bench.relay.refusal("main", envelope(smtputf8=True)) == ROUTE_NO_SMTPUTF8


@both_loops
async def test_smtputf8_that_vanished_is_refused_at_rcpt_and_deferred_later() -> None:
    async with Sink(extensions=("PIPELINING",)) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver(smtputf8=True)
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "smtputf8")
        assert await bench.verify("b@example.org", smtputf8=True) == [str(ROUTE_NO_SMTPUTF8)]
        assert await bench.verify("b@example.org") == ["250 2.1.5 Recipient ok"]
        assert (await bench.deliver()).stored


# --- routes ------------------------------------------------------------------------------------------


def routed(*routes: RouteSettings) -> Bench:
    services = FakeServices()
    settings = RelaySettings("gw.example.org", routes)
    from gateway.adapters.relay import SmtpRelay

    relay = SmtpRelay(settings, clock=services.clock, log=services.log, metrics=services.metrics)
    return Bench(relay, services)


HOST = ((HostSettings("192.0.2.1", 25),),)


def test_the_closest_domain_decides_the_route() -> None:
    relay = routed(
        RouteSettings("rest", ("*",), HOST),
        RouteSettings("own", ("example.org",), HOST),
        RouteSettings("below", (".example.org",), HOST),
        RouteSettings("deep", (".deep.example.org", "x.example.org"), HOST),
    ).relay
    routes = {
        "a@example.org": "own",
        "a@b.example.org": "below",
        "a@b.c.example.org": "below",
        "a@deep.example.org": "below",
        "a@b.deep.example.org": "deep",
        "a@x.example.org": "deep",
        "a@y.x.example.org": "below",
        "a@example.net": "rest",
        "a@org": "rest",
    }
    assert {text: relay.route(mailbox(text)) for text in routes} == routes


def test_no_route_takes_what_no_route_names() -> None:
    relay = routed(RouteSettings("own", ("example.org",), HOST)).relay
    assert relay.route(mailbox("a@example.net")) is None
    assert relay.route(mailbox("a@b.example.org")) is None


def test_literals_go_the_common_way_and_postmaster_always_goes() -> None:
    from gateway.smtp.address import AddressLiteral, Mailbox

    literal = Mailbox("a", AddressLiteral.parse("[192.0.2.1]"))
    postmaster = Mailbox("postmaster", None)
    own = routed(RouteSettings("own", ("example.org",), HOST)).relay
    rest = routed(RouteSettings("own", ("example.org",), HOST), RouteSettings("rest", ("*",), HOST)).relay
    assert (own.route(literal), own.route(postmaster)) == (None, "own")
    assert (rest.route(literal), rest.route(postmaster)) == ("rest", "rest")


def test_settings_that_make_no_sense_are_refused() -> None:
    for routes in (
        (),
        (RouteSettings("a", ("*",), ()),),
        (RouteSettings("a", ("*",), (*HOST, ())),),
        (RouteSettings("a", ("*",), HOST * 2),),
        (RouteSettings("a", ("*",), (HOST[0] * 2,)),),
        (RouteSettings("a", ("*",), HOST), RouteSettings("a", ("example.org",), HOST)),
    ):
        with pytest.raises(RelaySettingsError):
            routed(*routes)
