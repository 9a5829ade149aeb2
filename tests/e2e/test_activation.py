"""Sockets of a service manager: of systemd's own program for that, and of one that keeps them over a restart."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import COMMAND, Gateway, config_for
from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, free_port, wait_until

pytestmark = pytest.mark.e2e

CONTENT = b"From: <sender@client.example.net>\r\nSubject: activated\r\n\r\nHello\r\n"


def submit(gateway: Gateway) -> int:
    with gateway.connect() as client:
        client.hello()
        return client.submit("sender@client.example.net", ["user@example.org"], CONTENT).code


def is_accepting(gateway: Gateway) -> bool:
    return any(worker["listening"] for worker in json.loads(gateway.admin("/readyz")[1])["workers"])


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_serves_on_the_sockets_of_systemd_with_several_workers(
    sink: Downstream, tmp_path: Path, cleanup: ExitStack
) -> None:
    require(program="systemd-socket-activate")
    config = config_for(sink.address, overrides={"server": {"workers": 2}})
    listen, admin = config["server"]["listen"][0], config["admin"]["listen"]  # type: ignore[index,call-overload]
    # What systemd has bound could not be bound again.
    activate = ["systemd-socket-activate", f"--listen={listen}", f"--listen={admin}", "--fdname=smtp:admin"]
    gateway = Gateway(config, tmp_path, [*activate, COMMAND])
    cleanup.callback(gateway.kill)
    # the first question starts it
    gateway.wait_ready()
    first = set(gateway.worker_pids())
    assert len(first) == 2
    assert {submit(gateway) for _ in range(10)} == {250}
    assert gateway.metric("mxgate_workers") == 2
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload.done" in gateway.log(), within_s=30, what="the reload is over")
    wait_until(lambda: not first & set(gateway.worker_pids()), within_s=30, what="the old workers are gone")
    assert {submit(gateway) for _ in range(10)} == {250}
    gateway.stop()


@pytest.mark.full
def test_a_restart_refuses_nobody_where_the_manager_keeps_the_socket(
    sink: Downstream, tmp_path: Path, cleanup: ExitStack
) -> None:
    sock = cleanup.enter_context(socket.create_server((LOOPBACK, 0)))
    address = f"{LOOPBACK}:{sock.getsockname()[1]}"
    config = config_for(sink.address, overrides={"server": {"listen": [address]}})
    # What a manager does: the socket is descriptor 3, and the variables are for this process.
    script = f'exec 3<&{sock.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=smtp exec "$@"'

    def start(name: str) -> Gateway:
        directory = tmp_path / name
        directory.mkdir()
        command = ["bash", "-c", script, "manager", COMMAND]
        gateway = Gateway(config, directory, command, pass_fds=[sock.fileno()])
        cleanup.callback(gateway.kill)
        gateway.wait_ready()
        return gateway

    old = start("old")
    assert submit(old) == 250
    with old.connect() as busy:
        # a message under way makes the drain last
        busy.hello()
        busy.envelope("sender@client.example.net", ["user@example.org"])
        assert busy.command("DATA").code == 354
        old.terminate()
        wait_until(lambda: not is_accepting(old), within_s=10, what="its worker accepts nothing more")
        waiting = cleanup.enter_context(Client(old.address))
        busy.send(CONTENT + b".\r\n")
        assert busy.read_reply().code == 250
    assert old.wait_exit() == 0
    late = cleanup.enter_context(Client(old.address))
    new = start("new")
    for client in (waiting, late):
        client.hello()
        assert client.submit("sender@client.example.net", ["user@example.org"], CONTENT).code == 250
        client.close()
    new.stop()


@pytest.mark.parametrize(
    ("address", "names", "says"),
    [
        (
            LOOPBACK,
            "mxgate.socket",
            "by the name 'mxgate.socket': FileDescriptorName= has to be smtp, smtps, submission, submissions or admin",
        ),
        (LOOPBACK, "", "by the name ''"),
        (LOOPBACK, "smtps", "a socket 'smtps', which needs server.tls"),
        (LOOPBACK, "submission", "a socket 'submission', which needs submission.listen"),
        ("::", "smtp", "it has to be BindIPv6Only=ipv6-only"),
    ],
)
def test_what_cannot_be_used_stops_the_start(
    sink: Downstream, tmp_path: Path, cleanup: ExitStack, address: str, names: str, says: str
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    is_dual = family == socket.AF_INET6
    sock = cleanup.enter_context(socket.create_server((address, 0), family=family, dualstack_ipv6=is_dual))
    script = f'exec 3<&{sock.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES={names} exec "$@"'
    command = ["bash", "-c", script, "manager", COMMAND]
    gateway = Gateway(config_for(sink.address), tmp_path, command, pass_fds=[sock.fileno()])
    cleanup.callback(gateway.kill)
    assert gateway.wait_exit() == 78
    assert says in gateway.log()


@pytest.mark.full
def test_sockets_of_another_process_are_left_alone(
    sink: Downstream, tmp_path: Path, cleanup: ExitStack
) -> None:
    # What a shell between the manager and us has left in the environment.
    command = ["env", "LISTEN_PID=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=smtp", COMMAND]
    config = config_for(sink.address, overrides={"admin": {"listen": f"{LOOPBACK}:{free_port()}"}})
    gateway = Gateway(config, tmp_path, command)
    cleanup.callback(gateway.kill)
    gateway.wait_ready()
    assert submit(gateway) == 250
    gateway.stop()
