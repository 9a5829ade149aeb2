"""Several workers: they share connections and limits, are replaced, and are reloaded, all under load."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest

from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Config, Gateway, StartGateway, config_for
from tests.e2e.net import Address, free_port, is_listening, wait_until

pytestmark = pytest.mark.e2e
full = pytest.mark.full

TWO: Config = {"server": {"workers": 2}}
SENDER = "sender@client.example.net"
POLICY = """
    import time
    from gateway.api import Policy, Reply, Transaction, Verdict, proceed, reject

    class Magic(Policy):
        name = "magic"

        async def on_mail(self, tx: Transaction) -> Verdict:
            if "sleep" in str(tx.envelope.mail_from):
                time.sleep(600)
            return %s
"""


class Load:
    """Clients that bring one message after the other, each on its own connection."""

    def __init__(self, address: Address, clients: int = 4) -> None:
        self._address = address
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self.stored: list[str] = []  # what got 250
        self.refused: list[str] = []
        self.broken: list[OSError] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self._is_over.is_set():
            name = f"message-{next(self._numbers)}"
            content = f"From: <{SENDER}>\r\nSubject: {name}\r\n\r\nHello\r\n".encode()
            try:
                with Client(self._address) as client:
                    reply = client.read_reply()
                    if reply.code == 220:
                        reply = client.command("EHLO client.example.net")
                    if reply.code == 250:
                        reply = client.submit(SENDER, ["ann@example.org"], content)
            except OSError as exc:
                self.broken.append(exc)
                continue
            (self.stored if reply.code == 250 else self.refused).append(
                name if reply.code == 250 else str(reply)
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the clients send."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()

    def wait_for(self, more: int) -> None:
        """So many further messages are stored."""
        wanted = len(self.stored) + more
        wait_until(lambda: len(self.stored) >= wanted, within_s=30, what=f"{more} messages are stored")


def arrived(sink: Downstream) -> Counter[str]:
    """What the downstream confirmed, by subject."""
    found = (re.search(rb"Subject: (\S+)", message.content) for message in sink.messages)
    return Counter(match[1].decode() for match in found if match)


def logged(gateway: Gateway, event: str) -> list[dict[str, object]]:
    """The lines of this event."""
    return [json.loads(line) for line in gateway.log().splitlines() if f'"event":"{event}"' in line]


def reload(gateway: Gateway, event: str = "reload.done") -> dict[str, object]:
    """SIGHUP; its outcome."""
    before = len(logged(gateway, event))
    gateway.process.send_signal(signal.SIGHUP)
    lines = wait_until(
        lambda: len(found := logged(gateway, event)) > before and found, within_s=30, what=event
    )
    assert lines
    return lines[-1]


def wait_for_workers(gateway: Gateway, count: int) -> None:
    """So many have started, from the first on."""
    wait_until(lambda: len(logged(gateway, "worker.started")) >= count, within_s=10, what="a new worker")


def rewrite(gateway: Gateway, old: str, new: str) -> None:
    """Change its configuration."""
    text = gateway.config_file.read_text(encoding="utf-8")
    assert old in text
    gateway.config_file.write_text(text.replace(old, new), encoding="utf-8")


def is_served(client: Client) -> bool:
    """Whether the banner welcomes, and does not turn away."""
    return client.read_reply().code == 220


# --- sharing ---------------------------------------------------------------------------------------------------


def test_workers_share_the_connections(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address, TWO)
    with ExitStack() as clients:
        for _ in range(40):
            assert is_served(clients.enter_context(gateway.connect()))
        status = json.loads(gateway.admin("/api/v1/status")[1])
        sessions = [worker["status"]["sessions"] for worker in status["workers"]]
    assert sum(sessions) == 40
    # of a fair coin, less often than once in a million runs
    assert min(sessions) > 3


@pytest.mark.parametrize(
    ("key", "limit", "sources"),
    [
        ("max_connections", 5, ["127.0.0.2", "127.0.0.3", "127.0.0.4"]),
        ("max_connections_per_client", 5, ["127.0.0.2"]),
        ("max_new_connections_per_client_per_minute", 5, ["127.0.0.2"]),
    ],
)
def test_limits_are_of_all_workers_together(
    start_gateway: StartGateway, sink: Downstream, key: str, limit: int, sources: list[str]
) -> None:
    gateway = start_gateway(sink.address, {"server": {"workers": 2, key: limit}})
    with ExitStack() as clients:
        served = [
            is_served(clients.enter_context(gateway.connect(source)))
            for source, _ in zip(itertools.cycle(sources), range(12), strict=False)
        ]
    assert served == [True] * limit + [False] * (12 - limit)


def test_connections_of_a_killed_worker_count_no_more(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(
        sink.address, {"server": {"workers": 2, "max_connections": 4, "max_connections_per_client": 4}}
    )
    with ExitStack() as clients:
        for _ in range(4):
            assert is_served(clients.enter_context(gateway.connect()))
        pids = gateway.worker_pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gateway.admin_status("/readyz") == 200, within_s=10, what="new workers")
        wait_until(lambda: not set(pids) & set(gateway.worker_pids()), within_s=10, what="new workers")
        assert [is_served(clients.enter_context(gateway.connect())) for _ in range(5)] == [True] * 4 + [False]


# --- workers that die or hang ----------------------------------------------------------------------------------


def test_a_killed_worker_loses_nothing_that_was_confirmed_and_is_replaced_at_once(
    start_gateway: StartGateway, sink: Downstream
) -> None:
    gateway = start_gateway(sink.address, TWO)
    load = Load(gateway.address)
    with load.running():
        for count, pid in enumerate(gateway.worker_pids()):
            load.wait_for(50)
            killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for_workers(gateway, 3 + count)
            # a third of a second on an idle machine
            assert time.monotonic() - killed_at < 2
            load.wait_for(10)
    assert not load.refused
    # a session for each client at most
    assert len(load.broken) <= 2 * 4
    stored = arrived(sink)
    assert [name for name in load.stored if stored[name] != 1] == []


def test_a_worker_that_a_policy_blocks_is_replaced(sink: Downstream, tmp_path: Path) -> None:
    policy = tmp_path / "magic.py"
    policy.write_text(textwrap.dedent(POLICY % "proceed()"))
    config = config_for(
        sink.address,
        overrides={"server": {"workers": 2}, "policy": {"magic": {"file": str(policy), "mode": "enforce"}}},
    )
    impatient = "from gateway import cli, supervisor; supervisor._STUCK_S = 2; cli.cli()"
    gateway = Gateway(config, tmp_path, command=(sys.executable, "-c", impatient))
    try:
        gateway.wait_ready()
        load = Load(gateway.address, clients=2)
        with gateway.connect() as victim, load.running():
            victim.hello()
            victim.send(b"MAIL FROM:<sleep@example.net>\r\n")
            wait_until(lambda: logged(gateway, "worker.stuck"), within_s=20, what="worker.stuck")
            wait_for_workers(gateway, 3)
            load.wait_for(20)
        assert not load.refused
        (stuck,) = logged(gateway, "worker.stuck")
        (died,) = logged(gateway, "worker.died")
        assert (stuck["pid"], died["code"]) == (died["pid"], -signal.SIGKILL)
        gateway.stop()
    finally:
        gateway.kill()


BUSY = {
    "sleep": "time.sleep(600)",
    "loop": "while True: pass",
    "regex": 're.match(r"(a+)+$", "a" * 60 + "b")',
    "watch": "",
}


@pytest.mark.parametrize(
    "way", ["sleep", *(pytest.param(way, marks=full) for way in ("loop", "regex", "watch"))]
)
def test_who_blocks_a_worker_is_named(way: str, sink: Downstream, tmp_path: Path) -> None:
    policy = tmp_path / "blocker.py"
    policy.write_text(
        textwrap.dedent(f"""
            import re, time
            from gateway.api import Policy, proceed

            class Watch:
                def block(self, data):
                    time.sleep(600)

                def end(self):
                    pass

            class Blocker(Policy):
                name = "blocker"

                async def on_mail(self, tx):
                    {BUSY[way] or "pass"}
                    return proceed()

                def on_header(self, tx):
                    return Watch()
        """)
    )
    config = config_for(
        sink.address, overrides={"policy": {"blocker": {"file": str(policy), "mode": "enforce"}}}
    )
    impatient = "from gateway import cli, supervisor as s; s._BLOCKED_S, s._STUCK_S = 1.5, 6; cli.cli()"
    gateway = Gateway(config, tmp_path, command=(sys.executable, "-c", impatient))
    try:
        gateway.wait_ready()
        with gateway.connect() as victim:
            victim.hello()
            victim.send(b"MAIL FROM:<a@example.net>\r\nRCPT TO:<ann@example.org>\r\nDATA\r\n")
            if way == "watch":
                while victim.read_reply().code != 354:
                    pass
                victim.send(b"Subject: x\r\n\r\nbody\r\n")
            wait_until(lambda: logged(gateway, "worker.blocked"), within_s=20, what="worker.blocked")
            assert gateway.metric("mxgate_worker_blocked_total", policy="blocker") == 1
            wait_until(lambda: logged(gateway, "worker.died"), within_s=20, what="worker.died")
        (blocked,), (stuck,) = logged(gateway, "worker.blocked"), logged(gateway, "worker.stuck")
        assert (blocked["policy"], blocked["stage"]) == ("blocker", "" if way == "watch" else "mail")
        assert any(f"{policy}:" in str(frame) for frame in cast("list[object]", blocked["frames"]))
        assert stuck["policy"] == "blocker"
        gateway.stop()
    finally:
        gateway.kill()


# --- reload ----------------------------------------------------------------------------------------------------


@full
def test_ten_reloads_under_load_refuse_nobody_and_lose_nothing(
    start_gateway: StartGateway, sink: Downstream
) -> None:
    gateway = start_gateway(sink.address, TWO)
    load = Load(gateway.address)
    with load.running():
        for number in range(2, 12):
            assert reload(gateway)["generation"] == number
            load.wait_for(10)
    assert (load.refused, load.broken) == ([], [])
    assert arrived(sink) == Counter(load.stored)
    wait_until(lambda: len(gateway.worker_pids()) == 2, within_s=10, what="old workers have ended")


def test_a_session_goes_on_over_a_reload(
    start_gateway: StartGateway, sink: Downstream, new_rcpt: Callable[[], str]
) -> None:
    gateway = start_gateway(sink.address, TWO)
    content = b"From: <sender@client.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
    with gateway.connect() as client:
        client.hello()
        assert client.submit(SENDER, [new_rcpt()], content).code == 250
        reload(gateway)
        assert client.submit(SENDER, [new_rcpt()], content).code == 250
        reload(gateway)
        reply = client.read_reply()
        assert (reply.code, reply.enhanced) == (421, "4.3.2")
    wait_until(lambda: len(gateway.worker_pids()) == 2, within_s=10, what="old workers have ended")


def test_policies_are_imported_anew_and_bad_ones_keep_the_old(
    start_gateway: StartGateway, sink: Downstream, tmp_path: Path, rcpt: str
) -> None:
    policy = tmp_path / "magic.py"
    policy.write_text(textwrap.dedent(POLICY % "proceed()"))
    gateway = start_gateway(
        sink.address,
        {"server": {"workers": 2}, "policy": {"magic": {"file": str(policy), "mode": "enforce"}}},
    )

    def answer() -> int:
        with gateway.connect() as client:
            client.hello()
            return client.envelope(SENDER, [rcpt])[-1].code

    assert answer() == 250
    policy.write_text("no python")
    assert "ended with 78" in str(reload(gateway, "reload.failed")["problems"])
    assert [answer() for _ in range(10)] == [250] * 10
    policy.write_text(textwrap.dedent(POLICY % "reject('magic', Reply(550, '5.7.1', 'Magic'))"))
    reload(gateway)
    assert [answer() for _ in range(10)] == [550] * 10


@full
def test_addresses_and_workers_change_under_load(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address, TWO)
    load = Load(gateway.address)
    second = ("127.0.0.1", free_port())
    first = f'"{gateway.address[0]}:{gateway.address[1]}"'
    with load.running():
        load.wait_for(10)
        rewrite(gateway, first, f'{first}, "{second[0]}:{second[1]}"')
        reload(gateway)
        assert is_listening(second)
        for workers in (3, 1, 2):
            rewrite(gateway, "workers = ", f"workers = {workers} # ")
            assert reload(gateway)["workers"] == workers
            load.wait_for(20)
        rewrite(gateway, f', "{second[0]}:{second[1]}"', "")
        reload(gateway)
        assert not is_listening(second)
        load.wait_for(10)
    assert (load.refused, load.broken) == ([], [])
    assert arrived(sink) == Counter(load.stored)


@full
def test_a_file_that_is_half_written_keeps_the_old_configuration(
    start_gateway: StartGateway, sink: Downstream
) -> None:
    gateway = start_gateway(sink.address, TWO)
    pids = gateway.worker_pids()
    good = gateway.config_file.read_text(encoding="utf-8")
    gateway.config_file.write_text(good[: len(good) // 2], encoding="utf-8")
    assert str(gateway.config_file) in str(reload(gateway, "reload.failed")["problems"])
    assert gateway.metric("mxgate_config_last_reload_success") == 0
    assert gateway.worker_pids() == pids
    assert gateway.admin_status("/readyz") == 200
    gateway.config_file.write_text(good, encoding="utf-8")
    reload(gateway)
    assert gateway.metric("mxgate_config_last_reload_success") == 1


def test_sigterm_under_load_refuses_with_421_only(start_gateway: StartGateway, sink: Downstream) -> None:
    gateway = start_gateway(sink.address, TWO)
    load = Load(gateway.address, clients=8)
    with load.running():
        load.wait_for(50)
        gateway.terminate()
        assert gateway.wait_exit() == 0
    assert all(reply.startswith("421 4.3.2") for reply in load.refused)
    # who comes later finds nobody; nobody is cut off in the middle
    ends = {ConnectionRefusedError, ConnectionResetError, BrokenPipeError}
    assert {type(exc) for exc in load.broken} <= ends
    stored = arrived(sink)
    assert [name for name in load.stored if stored[name] != 1] == []
