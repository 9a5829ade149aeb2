"""The built-in policies together, from MAIL to the reply: each scenario is judged as an operator expects."""

from __future__ import annotations

import re
import time
from ipaddress import ip_address

import pytest

from gateway.lookup import Answer, Found, Question
from gateway.session import Envelope
from gateway.smtp.address import parse_reverse_path
from gateway.testing import Zone
from policies.arc import Arc, ArcSettings
from policies.dkim import Dkim, DkimSettings
from policies.dmarc import Dmarc, DmarcSettings
from policies.spf import Spf, SpfSettings
from tests.fakes import FakeDns, FakeServices
from tests.scenarios import (
    LIST,
    SCENARIOS,
    TRUSTED_SEALERS,
    Scenario,
    by_a_trusted_list,
    during_an_outage,
    records,
    spoof_by_a_trusted_list,
)
from tests.world import World, rcpt, send


class Outage(Zone):
    """No name server answers."""

    def answer(self, question: Question) -> Answer:
        return Answer(Found.TEMPORARY_FAILURE, why="timeout")


async def reply_to(scenario: Scenario, zone: Zone) -> tuple[str, World]:
    """What the client is told, and the world it was told in."""
    services = FakeServices(dns=FakeDns(zone))
    services.clock.time_s = time.time()  # dkimpy signs with the time of this machine
    world = World(
        Spf(SpfSettings(), services),
        Dkim(DkimSettings(), services),
        Arc(ArcSettings(trusted_sealers=TRUSTED_SEALERS), services),
        Dmarc(DmarcSettings(), services),
        services=services,
    )
    talk = world.gate.open(ip_address(scenario.client), 1234)
    await talk.connect()
    await talk.ehlo("client.example", esmtp=True)
    await talk.mail(Envelope(parse_reverse_path(f"<{scenario.mail_from}>", smtputf8=True)))
    await talk.rcpt([rcpt("bob@example.org")])
    send(talk, scenario.content)
    answer = await talk.eom(None)
    return str(answer.reply), world


def results_of(message: bytes) -> dict[str, str]:
    """The first result of each method in our field."""
    header = message.partition(b"\r\n\r\n")[0].decode()
    field = re.split(r"\r\n(?![ \t])", header)[0]
    assert field.startswith("Authentication-Results: ")
    found: dict[str, str] = {}
    for method, word in re.findall(r";\s+(\w+)=(\w+)", field):
        found.setdefault(method, word)
    return found


@pytest.mark.parametrize("name", SCENARIOS)
async def test_during_an_outage_nothing_is_refused_for_good_and_nothing_passes(name: str) -> None:
    scenario = during_an_outage(SCENARIOS[name]())
    reply, world = await reply_to(scenario, Outage())

    assert reply.startswith(scenario.reply)
    (delivered,) = world.relay.delivered
    assert results_of(delivered.message).items() >= scenario.results.items()


@pytest.mark.parametrize("name", SCENARIOS)
async def test_each_is_judged_as_an_operator_expects(name: str) -> None:
    scenario = SCENARIOS[name]()
    reply, world = await reply_to(scenario, Zone.parse(records()))

    assert reply.startswith(scenario.reply)
    if scenario.reply == "250":
        (delivered,) = world.relay.delivered
        assert results_of(delivered.message).items() >= scenario.results.items()
        assert (b"X-Mxgate-Quarantine:" in delivered.message) is scenario.is_quarantined
    else:
        assert "DMARC" in reply
        assert "author.example" in reply
        assert not world.relay.delivered


async def test_mail_of_a_trusted_list_whose_key_cannot_be_looked_up_is_to_come_again() -> None:
    zone = Zone.parse(records())
    zone.nodes[LIST.name] = {"TXT": "servfail"}

    assert (await reply_to(by_a_trusted_list(), zone))[0].startswith("451 4.7.1")
    assert (await reply_to(spoof_by_a_trusted_list(), zone))[0].startswith("550 5.7.1")
