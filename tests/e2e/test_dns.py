"""A policy that asks DNS, in the running gateway: a real name server, its outage, and what operators see of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway
from tests.e2e.net import wait_until
from tests.nameserver import Unbound

pytestmark = pytest.mark.e2e

CONTENT = b"From: <sender@known.example.net>\r\n\r\nHello\r\n"
PUSH_S = 5
RECORDS = """
known.example.net. 300 IN A 192.0.2.1
"""
ASKER = '''
"""Wants the domain of the reverse-path to have an address."""

from gateway.api import Found, Policy, Question, Reply, RRType, Transaction, Verdict, ask, defer, proceed, reject


class Asker(Policy):
    name = "asker"

    async def on_mail(self, tx: Transaction) -> Verdict:
        name = str(tx.envelope.mail_from.domain)
        (answer,) = await self.services.dns.run(ask(Question(name, RRType.A)), tx)
        match answer.found:
            case Found.RECORDS:
                return proceed()
            case Found.TEMPORARY_FAILURE:
                return defer("dns", Reply(451, "4.4.3", answer.why))
        return reject("no_address", Reply(550, "5.1.8", answer.found))
'''


@pytest.fixture
def unbound(tmp_path: Path) -> Iterator[Unbound]:
    server = Unbound(RECORDS, tmp_path)
    yield server
    server.close()


@pytest.fixture
def gateway(start_gateway: StartGateway, sink: Downstream, unbound: Unbound, tmp_path: Path) -> Gateway:
    file = tmp_path / "asker.py"
    file.write_text(ASKER)
    host, port = unbound.address
    overrides: Config = {
        "dns": {"nameservers": [f"{host}:{port}"], "timeout_s": 1},
        # its questions alone are counted
        "policy": {"asker": {"file": str(file)}, "spf": {"mode": "off"}},
        "pipeline": {"delay_reject": False},
    }
    return start_gateway(sink.address, overrides)


def said_of(gateway: Gateway, domain: str) -> str:
    """What a client is told who sends mail of this domain."""
    with gateway.connect() as client:
        client.hello()
        return str(client.command(f"MAIL FROM:<sender@{domain}>"))


def state_of(gateway: Gateway) -> dict[str, Any]:
    """What /readyz shows of DNS."""
    status, body = gateway.admin("/readyz")
    assert status == 200
    (worker,) = json.loads(body)["workers"]
    return dict(worker["detail"]["dns"])


def test_answers_decide_and_are_counted(gateway: Gateway) -> None:
    for _ in range(2):
        assert "250" in said_of(gateway, "known.example.net")
    assert "no_such_name" in said_of(gateway, "unknown.example.net")
    asked = {"rrtype": "A", "outcome": "records"}
    wait_until(
        lambda: gateway.metric("mxgate_dns_questions_total", **asked) == 1,
        within_s=PUSH_S,
        what="it is counted",
    )
    assert gateway.metric("mxgate_dns_cache_total", outcome="hit") == 1


def test_an_outage_is_temporary_and_shown_and_passes(gateway: Gateway, unbound: Unbound) -> None:
    host, port = unbound.address
    assert state_of(gateway)["nameservers"] == [f"{host}:{port}"]
    unbound.stop()
    assert "451" in said_of(gateway, "known.example.net")
    wait_until(lambda: state_of(gateway)["unanswered"] == 1, within_s=PUSH_S, what="the outage is shown")
    unbound.start()
    assert "250" in said_of(gateway, "known.example.net")
    wait_until(lambda: state_of(gateway)["unanswered"] == 0, within_s=PUSH_S, what="its end is shown")
