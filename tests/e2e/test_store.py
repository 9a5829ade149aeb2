"""A policy that remembers, in real gateways: on SQLite, on a shared Redis, and while that one is away."""

from __future__ import annotations

import json
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import COMMAND, Config, Gateway, StartGateway
from tests.e2e.net import wait_until
from tests.e2e.redis import RedisServer, started

pytestmark = pytest.mark.e2e

# Defers each reverse-path once.
POLICY = """\
from gateway.api import NoSettings, Policy, Reply, StoreDownError, OnError, defer, proceed

class Once(Policy[NoSettings]):
    name = "once"
    needs_store = True

    async def on_rcpt(self, tx, rcpt):
        store = self.services.store
        try:
            seen = await store.ask(store.put_if_absent(str(tx.envelope.mail_from), b"1", ttl_s=600))
        except StoreDownError as exc:
            seen = b"" if exc.on_outage is OnError.CONTINUE else None
        return proceed() if seen is not None else defer("once", Reply(451, "4.7.1", "Once more, please"))
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "once.py"
    path.write_text(textwrap.dedent(POLICY), "utf-8")
    return path


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    yield from started(RedisServer)


def config(policy: Path, url: str, **keys: str) -> Config:
    return {"policy": {"once": {"file": str(policy)}}, "state": {"url": url, **keys}}


def rcpt(gateway: Gateway, sender: str) -> tuple[int, float]:
    """The code of the reply to RCPT, and how long it took."""
    with gateway.connect() as client:
        client.hello()
        client.command(f"MAIL FROM:<{sender}@example.net>")
        begun = time.monotonic()
        code = client.command("RCPT TO:<b@example.org>").code
        return code, time.monotonic() - begun


def store_detail(gateway: Gateway) -> dict[str, object]:
    body = json.loads(gateway.admin("/readyz")[1])
    detail: dict[str, object] = body["workers"][0]["detail"]["store"]
    return detail


def test_sqlite_remembers_over_a_restart(
    policy: Path, tmp_path: Path, sink: Downstream, start_gateway: StartGateway
) -> None:
    url = f"sqlite://{tmp_path}/state.db"
    for codes in ((451, 250), (250, 250)):
        gateway = start_gateway(sink.address, config(policy, url))
        assert tuple(rcpt(gateway, "ann")[0] for _ in codes) == codes
        assert store_detail(gateway) == {"kind": "sqlite", "up": True, "last_error": ""}
        gateway.stop()


def test_two_gateways_on_one_redis_are_one(
    policy: Path, redis: RedisServer, sink: Downstream, start_gateway: StartGateway
) -> None:
    one, other = (start_gateway(sink.address, config(policy, redis.url)) for _ in range(2))
    assert [rcpt(one, "ann")[0], rcpt(other, "ann")[0]] == [451, 250]
    assert [rcpt(other, "bob")[0], rcpt(one, "bob")[0]] == [451, 250]


@pytest.mark.parametrize(
    ("on_outage", "codes"),
    [("local", [250, 451, 250]), ("continue", [250, 250, 250]), ("defer", [451, 451, 451])],
)
def test_redis_goes_and_comes_back(
    policy: Path,
    redis: RedisServer,
    sink: Downstream,
    start_gateway: StartGateway,
    on_outage: str,
    codes: list[int],
) -> None:
    gateway = start_gateway(sink.address, config(policy, redis.url, on_outage=on_outage))
    assert [rcpt(gateway, "ann")[0] for _ in range(2)] == [451, 250]
    redis.kill()
    # ann is known to this worker, bob is a stranger
    answers = [rcpt(gateway, sender) for sender in ("ann", "bob", "bob")]
    assert [code for code, _ in answers] == codes
    assert max(took for _, took in answers) < 0.5
    wait_until(
        lambda: gateway.metric("mxgate_store_outage") == 1, within_s=5, what="the gauge tells of the outage"
    )
    wait_until(lambda: store_detail(gateway)["up"] is False, within_s=5, what="/readyz shows the outage")
    assert gateway.admin_status("/readyz") == 200
    redis.start()
    wait_until(lambda: gateway.metric("mxgate_store_outage") == 0, within_s=6, what="the store is used again")
    assert [rcpt(gateway, "cid")[0] for _ in range(2)] == [451, 250]
    for event in ("store.down", "store.up"):
        assert event in gateway.log()


def test_it_starts_without_redis(policy: Path, sink: Downstream, start_gateway: StartGateway) -> None:
    gateway = start_gateway(sink.address, config(policy, "redis://:hunter2@127.0.0.1:1/0"))
    assert [rcpt(gateway, "ann")[0] for _ in range(2)] == [451, 250]
    assert store_detail(gateway) == {"kind": "redis", "up": False, "last_error": "connect"}
    assert "hunter2" not in gateway.log()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///nowhere/state.db", "state.url: /nowhere/state.db cannot be written"),
        ("redis+sentinel://10.0.0.1", "state.url: must name the service"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_with_78(
    policy: Path, tmp_path: Path, url: str, message: str
) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(
        'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'
        f'[[relay.routes]]\ndownstream = ["192.0.2.5:25"]\n[state]\nurl = "{url}"\n'
        f'[policy.once]\nfile = "{policy}"\n',
        "utf-8",
    )
    command = [COMMAND, "check-config", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    assert message in done.stderr


def test_a_file_that_cannot_be_used_stops_the_start(policy: Path, tmp_path: Path, sink: Downstream) -> None:
    from tests.e2e.gateway import config_for

    (tmp_path / "state.db").write_bytes(b"precious" * 1000)
    overrides = config(policy, f"sqlite://{tmp_path}/state.db")
    gateway = Gateway(config_for(sink.address, overrides=overrides), tmp_path)
    try:
        assert gateway.process.wait(timeout=30) == 78
        assert "the store cannot be opened" in gateway.log()
        assert (tmp_path / "state.db").read_bytes() == b"precious" * 1000
    finally:
        gateway.kill()
