"""Reloads while as much mail comes as this machine takes: good ones, broken ones, and a renewed certificate.

The clients and the downstream are the C programs of bench/, which account for each message by its number and octets.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.traffic import Load, Sent, Sink, compile_programs
from tests.e2e.certificates import Tls
from tests.e2e.gateway import Gateway, StartGateway
from tests.e2e.net import LOOPBACK, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(300),
]

MESSAGES = 20_000
RELOADS = 12


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    compile_programs(tmp_path)
    return tmp_path


@pytest.fixture
def sink_program(programs: Path) -> Iterator[Sink]:
    with Sink(programs) as sink:
        yield sink


def count(gateway: Gateway, event: str) -> int:
    return gateway.log().count(f'"event":"{event}"')


def test_reloads_under_load_lose_nothing_and_refuse_nobody(
    start_gateway: StartGateway, sink_program: Sink, programs: Path, tls: Tls, tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(tls.cert_file, cert)
    shutil.copy(tls.key_file, key)
    gateway = start_gateway(
        (LOOPBACK, sink_program.port),
        {
            "server": {
                "workers": 2,
                "tls": {"cert_file": str(cert), "key_file": str(key)},
                "max_connections_per_client": 2000,
            },
            "relay": {"domains": ["rcpt.example"]},
        },
    )
    good = gateway.config_file.read_text()
    sent: list[Sent] = []
    load = Load(programs, gateway.address[1], 2048, MESSAGES, connections=50)
    clients = threading.Thread(target=lambda: sent.append(load.run()))
    clients.start()
    done = failed = 0
    while clients.is_alive() and done + failed < RELOADS:
        is_broken = (done + failed) % 3 == 2
        gateway.config_file.write_text(good + "\n[nonsense]\nx = 1\n" if is_broken else good)
        event = "reload.failed" if is_broken else "reload.done"
        before = count(gateway, event)
        gateway.reload()
        wait_until(lambda: count(gateway, event) > before, within_s=60, what=event)  # noqa: B023  # waited for here
        done, failed = done + (not is_broken), failed + is_broken
        status = json.loads(gateway.admin("/readyz")[1])
        assert status["ready"], status
        assert status["config"]["last_reload"]["ok"] is not is_broken
        assert gateway.metric("mxgate_config_last_reload_success") == (not is_broken)
    # a renewal that goes wrong, then right, without any signal
    cert.write_text("no certificate")
    wait_until(lambda: count(gateway, "tls.reload_failed") >= 2, within_s=30, what="both workers say so")
    shutil.copy(tls.cert_file, cert)
    wait_until(lambda: count(gateway, "tls.reloaded") >= 2, within_s=30, what="both workers have it")
    clients.join()
    assert done >= 2
    assert failed >= 1
    sink_program.check(sent[0])
    assert sent[0].accepted == MESSAGES
    print(  # noqa: T201  # what `pytest -s` is asked for
        f"\n{MESSAGES / sent[0].wall_s:.0f} messages a second over {done} reloads and {failed} that failed; "
        f"p50 {sent[0].p50_ms:.1f} ms, p95 {sent[0].p95_ms:.1f} ms"
    )
