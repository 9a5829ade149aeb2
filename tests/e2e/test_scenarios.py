"""Signed, forwarded and forged mail through the running gateway to Postfix, with a real name server."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.e2e.client import Reply
from tests.e2e.gateway import Config, Gateway, shared_gateway
from tests.e2e.postfix import Postfix
from tests.nameserver import Unbound
from tests.scenarios import SCENARIOS, TRUSTED_SEALERS, Scenario, during_an_outage, records

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def unbound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unbound]:
    server = Unbound(records(), tmp_path_factory.mktemp("unbound"))
    yield server
    server.close()


def config(unbound: Unbound) -> Config:
    host, port = unbound.address
    return {
        "dns": {"nameservers": [f"{host}:{port}"], "timeout_s": 1},
        "policy": {"arc": {"settings": {"trusted_sealers": [*TRUSTED_SEALERS]}}},
    }


@pytest.fixture(scope="module")
def gateway(
    postfix: Postfix, unbound: Unbound, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    yield from shared_gateway(postfix.address, config(unbound), tmp_path_factory.mktemp("gateway"))


@pytest.fixture(scope="module")
def cut_off(postfix: Postfix, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose name server does not answer."""
    dead = Unbound(records(), tmp_path_factory.mktemp("dead"))
    dead.stop()
    yield from shared_gateway(postfix.address, config(dead), tmp_path_factory.mktemp("gateway"))


def send(scenario: Scenario, gateway: Gateway, rcpt: str) -> Reply:
    with gateway.connect(scenario.client) as client:
        client.hello()
        return client.submit(scenario.mail_from, [rcpt], scenario.content)


def results_of(stored: bytes) -> dict[str, str]:
    """The first result of each method in our field."""
    field = re.search(rb"^Authentication-Results: mx\.example\.org;.*\n(?:[ \t].*\n)*", stored, re.MULTILINE)
    assert field, stored
    found: dict[str, str] = {}
    for method, word in re.findall(r";\s+([\w-]+)=(\w+)", field[0].decode()):
        found.setdefault(method, word)
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_is_judged_as_an_operator_expects(
    name: str, gateway: Gateway, postfix: Postfix, rcpt: str
) -> None:
    scenario = SCENARIOS[name]()
    reply = send(scenario, gateway, rcpt)

    assert str(reply).startswith(scenario.reply)
    if reply.code != 250:
        assert re.search(r"DMARC.* author\.example", str(reply))
        assert not postfix.stored_for(rcpt)
        return
    stored = postfix.wait_stored(rcpt)
    assert results_of(stored).items() >= scenario.results.items()
    assert (b"\nX-Mxgate-Quarantine:" in stored) is scenario.is_quarantined
    assert stored.replace(b"\n", b"\r\n").endswith(scenario.content)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_outage_of_dns_refuses_nothing_for_good_and_lets_nothing_pass(
    name: str, cut_off: Gateway, postfix: Postfix, rcpt: str
) -> None:
    scenario = during_an_outage(SCENARIOS[name]())
    reply = send(scenario, cut_off, rcpt)

    assert str(reply).startswith(scenario.reply)
    assert results_of(postfix.wait_stored(rcpt)).items() >= scenario.results.items()
