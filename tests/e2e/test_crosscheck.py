"""crosscheck in a running gateway: it agrees on real mail, and leaves out what would cost too much."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, shared_gateway
from tests.e2e.net import wait_until
from tests.mailkit import compose, dkim_sign
from tests.nameserver import Unbound
from tests.scenarios import AUTHOR, SCENARIOS, records

pytestmark = [pytest.mark.e2e, pytest.mark.full]  # numbers come once a second


@pytest.fixture(scope="module")
def gateway(shared_sink: Downstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    unbound = Unbound(records(), tmp_path_factory.mktemp("unbound"))
    host, port = unbound.address
    overrides: Config = {
        "dns": {"nameservers": [f"{host}:{port}"], "timeout_s": 1},
        "policy": {"crosscheck": {"settings": {"share": 1.0, "max_bytes": 1_000_000}}},
    }
    shared_sink.behave()
    yield from shared_gateway(shared_sink.address, overrides, tmp_path_factory.mktemp("gateway"))
    unbound.close()


def test_it_agrees_and_is_counted(gateway: Gateway) -> None:
    costly = dkim_sign(compose(body="x" + " " * 7000 + "\r\n" * 9000 + "x\r\n"), AUTHOR)
    with gateway.connect("127.0.0.2") as client:
        client.hello()
        assert client.submit("ann@author.example", ["a@example.org"], costly).code == 250
    wait_until(lambda: messages(gateway, "costly") == 1, within_s=10, what="what is costly is left out")
    for number, make in enumerate(SCENARIOS.values(), 1):
        scenario = make()
        with gateway.connect(scenario.client) as client:
            client.hello()
            client.submit(scenario.mail_from, ["a@example.org"], scenario.content)
        wait_checked(gateway, number)

    for method in ("spf", "dkim", "arc"):
        assert results(gateway, method, "agree") > 0
        for word in ("disagree", "explained", "failed", "unanswered"):
            assert results(gateway, method, word) == 0, (method, word, gateway.log())
    assert "crosscheck.disagreed" not in gateway.log()


def wait_checked(gateway: Gateway, count: int) -> None:
    wait_until(lambda: messages(gateway, "checked") == count, within_s=10, what="it was judged again")


def messages(gateway: Gateway, outcome: str) -> float:
    return gateway.metric("mxgate_crosscheck_messages_total", outcome=outcome)


def results(gateway: Gateway, method: str, agreement: str) -> float:
    return gateway.metric("mxgate_crosscheck_results_total", method=method, agreement=agreement)
