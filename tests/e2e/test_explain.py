"""A decision of the running gateway, fetched by its id and judged again when neither gateway nor DNS is there any more.

And the same message explained beforehand: `mxgate explain` says what the gateway will answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.plugins import installed
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, StartGateway, Value, run_mxgate
from tests.mailkit import compose, dkim_sign, rsa_key, txt_line, zone_text
from tests.nameserver import Unbound

pytestmark = pytest.mark.e2e

AUTHOR = rsa_key("author.example")
SIGNED = dkim_sign(compose(body=".A dot.\r\nMore.\r\n" * 1000), AUTHOR)
MAIL = {"signed": SIGNED, "changed": SIGNED + b"footer\r\n", "spoofed": compose()}
RECORDS = zone_text(AUTHOR) + txt_line("_dmarc.author.example", "v=DMARC1; p=reject")
POLICIES = Path(__file__).parents[2] / "policies"


@pytest.fixture
def unbound(tmp_path: Path) -> Iterator[Unbound]:
    server = Unbound(RECORDS, tmp_path)
    yield server
    server.close()


@pytest.fixture
def gateway(start_gateway: StartGateway, sink: Downstream, unbound: Unbound) -> Gateway:
    host, port = unbound.address
    own: dict[str, Value] = {
        name: {"file": str(POLICIES / f"{name}.py")}
        for name in ("spf", "dkim", "arc", "dmarc")
        if name not in installed()
    }
    return start_gateway(sink.address, {"dns": {"nameservers": [f"{host}:{port}"]}, "policy": own})


def sent(gateway: Gateway, message: bytes) -> str:
    """What a client is told."""
    with gateway.connect() as client:
        client.hello()
        client.envelope("ann@author.example", ["bob@example.org"])
        return str(client.data(message))


def explained(gateway: Gateway, message: Path) -> dict[str, Any]:
    client = ("--ip", "127.0.0.1", "--helo", "client.example.net", "--mail-from", "ann@author.example")
    where = ("--rcpt", "bob@example.org", "--config", str(gateway.config_file), "--json")
    done = run_mxgate("explain", str(message), *client, *where, timeout_s=60)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_live_decision_is_judged_again_offline(gateway: Gateway, unbound: Unbound, tmp_path: Path) -> None:
    records = {}
    for name, message in MAIL.items():
        (tmp_path / "mail.eml").write_bytes(message)
        before = explained(gateway, tmp_path / "mail.eml")["decision"]
        reply = sent(gateway, message)
        assert str(before["code"]) == reply[:3]
        (newest,) = json.loads(gateway.admin("/api/v1/decisions?limit=1")[1])["decisions"]
        assert newest["results"] == before["results"]
        done = run_mxgate("decisions", "--tx", newest["tx"], "--json", "--config", str(gateway.config_file))
        records[name] = done.stdout
        status, body = gateway.admin(f"/api/v1/decisions/{newest['tx']}")
        assert (status, json.loads(body)) == (200, json.loads(done.stdout)["decisions"][0])
    gateway.stop()
    unbound.stop()
    actions = []
    for text in records.values():
        file = tmp_path / "record.json"
        file.write_text(text)
        done = run_mxgate(
            "explain", "--record", str(file), "--json", "--config", str(gateway.config_file), timeout_s=60
        )
        told = json.loads(done.stdout)
        assert (done.returncode, told["replay"]) == (0, {"same": True, "differences": [], "missing": []})
        actions.append(told["decision"]["action"])
    assert actions == ["accepted", "rejected", "rejected"]
