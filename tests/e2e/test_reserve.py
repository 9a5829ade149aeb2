"""A worker that is short of descriptors or memory turns new clients away, serves the others, and recovers."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import COMMAND, Config, Gateway, config_for
from tests.e2e.net import wait_until

pytestmark = pytest.mark.e2e

CONTENT = b"From: <a@client.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
DESCRIPTORS = 120
CLIENTS = 400


def limited(*, descriptors: int) -> list[str]:
    return ["sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', COMMAND]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_counted(gateway: Gateway, count: float) -> bool:
    """Connect once more; whether so many connections have been told."""
    with gateway.connect() as client:
        client.sock.recv(100)
    return gateway.metric("mxgate_connections_total") >= count


def events(gateway: Gateway, event: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in gateway.log().splitlines() if f'"event":"{event}"' in line]


def takes_mail(client: Client, number: int = 0) -> bool:
    client.hello()
    return client.submit("a@client.example.net", [f"ann-{number}@example.org"], CONTENT).code == 250


def start(sink: Downstream, directory: Path, command: list[str], **server: int) -> Gateway:
    overrides: Config = {"server": {"max_connections_per_client": 1000, **server}}
    gateway = Gateway(config_for(sink.address, overrides=overrides), directory, command=command)
    gateway.wait_ready()
    return gateway


def test_descriptors_are_kept_for_the_mail_that_is_here_already(sink: Downstream, tmp_path: Path) -> None:
    gateway = start(sink, tmp_path, limited(descriptors=DESCRIPTORS))
    try:
        (pid,) = gateway.worker_pids()
        (few,) = events(gateway, "descriptors.few")
        assert few["limit"] == DESCRIPTORS
        with ExitStack() as stack:
            clients = [stack.enter_context(gateway.connect()) for _ in range(CLIENTS)]
            greeted: list[Client] = []
            codes: Counter[object] = Counter()
            for client in clients:
                try:
                    code = client.read_reply().code
                except OSError:
                    code = 0  # not even its refusal could be said
                codes[code] += 1
                if code == 220:
                    greeted.append(client)
            assert codes[220] >= 20
            assert codes[421] >= 1
            assert codes[220] < DESCRIPTORS
            # those that are here can still bring mail: that needs a connection to the downstream, and names
            wait_until(
                lambda: events(gateway, "connections.refused"), within_s=10, what="the log tells of it"
            )
            for number, client in enumerate(greeted[:5]):
                assert client.command("EHLO client.example.net").code == 250
                reply = client.submit("a@client.example.net", [f"ann-{number}@example.org"], CONTENT)
                assert reply.code == 250, reply
            # it does not spin: a sweep a second is all that it does now
            before, told = cpu_s(pid), gateway.metric("mxgate_connections_total")
            wait_until(lambda: is_counted(gateway, told + 3), within_s=15, what="further clients are counted")
            assert cpu_s(pid) - before < 1.5
            assert gateway.metric("mxgate_connections_total", outcome="descriptors") >= 1
        wait_until(
            lambda: events(gateway, "connections.accepted"), within_s=10, what="the log tells of the end"
        )
        with gateway.connect() as client:
            assert takes_mail(client, 99)
        assert gateway.worker_pids() == [pid]
        gateway.stop()
    finally:
        gateway.kill()


def test_a_worker_that_is_too_large_takes_no_more_connections(sink: Downstream, tmp_path: Path) -> None:
    # less than a worker needs at all
    gateway = start(sink, tmp_path, [COMMAND], max_worker_memory_bytes=1_000_000)
    try:
        with gateway.connect() as client:
            assert client.read_reply().code == 421
        assert gateway.metric("mxgate_connections_total", outcome="memory") >= 0
        wait_until(lambda: events(gateway, "connections.refused"), within_s=10, what="the log tells of it")
        assert events(gateway, "connections.refused")[0]["reason"] == "memory"
        gateway.stop()
    finally:
        gateway.kill()
