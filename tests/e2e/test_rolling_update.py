"""A rolling update on one machine: three gateways behind HAProxy with PROXY headers, replaced one by one under load."""

from __future__ import annotations

import smtplib
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.balancer import SOURCE
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, config_for
from tests.e2e.haproxy import HAProxyProcess
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.full]

GATEWAYS = 3
CLIENTS = 4
CONTENT = b"From: <sender@client.example.net>\r\nSubject: update\r\n\r\nHello\r\n"
_CONFIGURATION = """\
global
    log stdout format raw local0
    stats socket {socket} level admin
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen smtp
    bind {address[0]}:{address[1]}
    source {source}
    option redispatch
"""
_SERVER = "    server pod{number} {address[0]}:{address[1]} send-proxy-v2\n"


class Service(HAProxyProcess):
    """What a Service and its balancer are in a cluster: it brings new connections to those that are in it."""

    def __init__(self, pods: Sequence[Address], directory: Path) -> None:
        self.address: Address = (LOOPBACK, free_port())
        self._socket = directory / "haproxy.sock"
        head = _CONFIGURATION.format(socket=self._socket, address=self.address, source=SOURCE)
        servers = [_SERVER.format(number=number, address=pod) for number, pod in enumerate(pods)]
        super().__init__(head + "".join(servers), directory, [self.address])

    def set_state(self, number: int, state: str) -> None:
        """`drain`: no new connections, old ones go on; `ready`: in use."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._socket))
            control.sendall(f"set server smtp/pod{number} state {state}\n".encode())
            assert control.recv(1000).strip() == b""


class Pods:
    """Gateways that take clients' addresses from HAProxy's headers; `replace` starts a new one in a place."""

    def __init__(self, downstream: Address, directories: pytest.TempPathFactory) -> None:
        self._directories = directories
        self._configs = [
            config_for(downstream, overrides={"server": {"proxy_protocol_from": [f"{SOURCE}/32"]}})
            for _ in range(GATEWAYS)
        ]
        self.running = [self._start(number) for number in range(GATEWAYS)]

    def replace(self, number: int) -> None:
        self.running[number] = self._start(number)

    def _start(self, number: int) -> Gateway:
        pod = Gateway(self._configs[number], self._directories.mktemp("pod"))
        pod.wait_ready()
        return pod


class Senders:
    """Clients that send one message after the other, a connection for each, until `stop`."""

    def __init__(self, address: Address) -> None:
        self.sent = 0
        self.failures: Counter[str] = Counter()
        self._address = address
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._is_over.is_set():
            try:
                with smtplib.SMTP(*self._address, local_hostname="client.example.net", timeout=30) as client:
                    client.sendmail("sender@client.example.net", ["user@example.org"], CONTENT)
            except (OSError, smtplib.SMTPException) as exc:
                with self._lock:
                    self.failures[repr(exc)] += 1
            else:
                with self._lock:
                    self.sent += 1


@pytest.fixture
def pods(sink: Downstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    pods = Pods(sink.address, tmp_path_factory)
    yield pods
    for pod in pods.running:
        pod.kill()


def test_an_update_loses_and_refuses_nothing(pods: Pods, sink: Downstream, tmp_path: Path) -> None:
    service = Service([pod.address for pod in pods.running], tmp_path)
    senders = Senders(service.address)
    try:
        for number in range(GATEWAYS):
            sent = senders.sent
            wait_until(partial(_has_grown, senders, sent + 50), within_s=30, what="50 more messages")
            # the preStop hook: Kubernetes takes the pod out of the Service and lets it go on for some seconds
            service.set_state(number, "drain")
            old = pods.running[number]
            wait_until(partial(_is_idle, old), within_s=10, what="the pod's connections end")
            old.stop()
            pods.replace(number)
            service.set_state(number, "ready")
        sent = senders.sent
        wait_until(partial(_has_grown, senders, sent + 50), within_s=30, what="50 more messages")
    finally:
        senders.stop()
        service.close()
    assert senders.failures == {}
    assert len(sink.messages) == senders.sent
    assert sink.unconfirmed == []
    for pod in pods.running:
        wait_until(partial(_has_accepted, pod), within_s=10, what="mail in the new pod's metrics")


def _has_grown(senders: Senders, to: int) -> bool:
    assert not senders.failures, senders.failures
    return senders.sent >= to


def _is_idle(pod: Gateway) -> bool:
    return pod.metric("mxgate_open_connections") == 0


def _has_accepted(pod: Gateway) -> bool:
    return pod.metric("mxgate_transactions_total", action="accepted") > 0
