"""The admin port: health, and metrics that tell what happened."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, StartGateway
from tests.e2e.net import wait_until

pytestmark = pytest.mark.e2e

SENDER = "sender@client.example.net"
CONTENT = b"From: <sender@client.example.net>\r\n\r\nHello\r\n"
SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-z_]+="[^"]*",?)*\})? [-+0-9.eEinfNa]+')
# Workers push their counters each second.
PUSH_S = 5


@pytest.fixture
def busy_gateway(start_gateway: StartGateway, sink: Downstream, rcpt: str) -> Gateway:
    """A gateway that has seen one message and one refused recipient."""
    gateway = start_gateway(sink.address)
    with gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [rcpt], CONTENT).code == 250
        assert client.submit(SENDER, ["user@foreign.example"], CONTENT).code == 550
    return gateway


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_says_that_it_is_well(path: str, sink_gateway: Gateway) -> None:
    assert sink_gateway.admin_status(path) == 200


def test_knows_no_other_paths(sink_gateway: Gateway) -> None:
    assert sink_gateway.admin_status("/etc/passwd") == 404


def test_an_ill_downstream_is_shown_and_is_no_reason_to_get_no_mail(
    start_gateway: StartGateway, rcpt: str
) -> None:
    with contextlib.closing(Downstream()) as sink:
        gateway = start_gateway(sink.address)

        def shown() -> dict[str, Any]:
            status, body = gateway.admin("/readyz")
            assert status == 200
            (worker,) = json.loads(body)["workers"]
            (route,) = worker["detail"]["relay"]["routes"]
            (host,) = route["hosts"]
            assert (route["name"], host["host"]) == ("route1", f"{sink.address[0]}:{sink.address[1]}")
            return dict(host)

        wait_until(lambda: shown()["up"], within_s=PUSH_S, what="the downstream is up in /readyz")
        assert shown()["last_error"] == ""
        sink.down()
        with gateway.connect() as client:
            client.hello()
            assert client.submit(SENDER, [rcpt], CONTENT).code == 451
        wait_until(lambda: not shown()["up"], within_s=PUSH_S, what="the downstream is down in /readyz")
        assert shown()["last_error"] == "connect"
        sink.up()
        wait_until(lambda: shown()["up"], within_s=4 * PUSH_S, what="the downstream is up again in /readyz")


def test_counts_what_happened(busy_gateway: Gateway) -> None:
    def is_counted() -> bool:
        return busy_gateway.metric("mxgate_transactions_total") >= 1

    wait_until(is_counted, within_s=PUSH_S, what="the transaction in /metrics")
    assert busy_gateway.metric("mxgate_connections_total") >= 1
    assert busy_gateway.metric("mxgate_transactions_total", action="accepted") == 1
    assert busy_gateway.metric("mxgate_replies_total", code="250") >= 4
    assert busy_gateway.metric("mxgate_replies_total", code="354") == 1
    assert busy_gateway.metric("mxgate_replies_total", code="550") == 1
    assert busy_gateway.metric("mxgate_relay_duration_seconds_count") >= 1


def test_metrics_are_in_the_text_format_and_name_no_address(busy_gateway: Gateway, rcpt: str) -> None:
    def page() -> str:
        return busy_gateway.admin("/metrics")[1]

    wait_until(
        lambda: "mxgate_transactions_total{" in page(), within_s=PUSH_S, what="the transaction in /metrics"
    )
    lines = [line for line in page().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not SAMPLE.fullmatch(line)] == []
    # STYLE 17: labels are from closed sets, never a domain or an address
    for text in (SENDER, rcpt, "foreign.example", "client.example.net"):
        assert text not in page()


def test_writes_one_info_line_for_each_transaction(busy_gateway: Gateway, rcpt: str) -> None:
    # STYLE 16
    lines = [line for line in busy_gateway.log().splitlines() if "message." in line and SENDER in line]
    assert len(lines) == 1, busy_gateway.log()
    assert rcpt not in busy_gateway.admin("/metrics")[1]
