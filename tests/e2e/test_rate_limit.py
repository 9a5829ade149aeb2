"""rate_limit in a running gateway: workers share what the store counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import StartGateway, Value
from tests.e2e.net import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.full]


def test_workers_share_a_bucket_and_the_client_is_told_to_come_again(
    tmp_path: Path, sink: Downstream, start_gateway: StartGateway
) -> None:
    limits: dict[str, Value] = {"limits": [{"per": "client", "count": 10, "within_s": 86_400}]}
    gateway = start_gateway(
        sink.address,
        {
            "server": {"workers": 2},
            "state": {"url": f"sqlite://{tmp_path}/state.db"},
            "policy": {"rate_limit": {"settings": limits}},
        },
    )
    codes = []
    for _ in range(20):
        with gateway.connect() as client:
            client.hello()
            client.command("MAIL FROM:<ann@client.example>")
            codes.append(client.command("RCPT TO:<bob@example.org>").code)
    assert sorted(codes) == [250] * 10 + [450] * 10
    assert codes[-1] == 450
    wait_until(
        lambda: gateway.metric("mxgate_rate_limit_deferred_total", per="client") == 10,
        within_s=10,
        what="both workers have told what they counted",
    )
