"""A worker is killed at any octet of the dialogue, on either side of it: stored messages and 250s agree."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.e2e.chaos import arrived
from tests.e2e.client import Client, stuff
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, config_for
from tests.e2e.net import wait_until
from tests.e2e.tap import Tap

pytestmark = pytest.mark.e2e

KILLS = 100
SENDER = "sender@client.example.net"
# Its deaths are ours: no pause before the next worker
HEEDLESS = "from gateway import cli, supervisor; supervisor._RESTART_MAX_S = 0; cli.cli()"


class Wires:
    """The gateway with a tap on both sides."""

    def __init__(self, sink: Downstream, directory: Path, stack: ExitStack) -> None:
        self.sink = sink
        self.behind = Tap(sink.address)
        stack.callback(self.behind.close)
        # each message goes its whole way: MAIL and RCPT to ask, then the transaction
        config = config_for(self.behind.address, overrides={"relay": {"recipient_cache_s": 0}})
        self.gateway = Gateway(config, directory, command=(sys.executable, "-c", HEEDLESS))
        stack.callback(self.gateway.kill)
        self.gateway.wait_ready()
        self.before = Tap(self.gateway.address)
        stack.callback(self.before.close)
        self.killed = 0

    def kill(self) -> None:
        """The only worker, at once."""
        for pid in self.gateway.worker_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed += 1

    def bring(self, name: str) -> bool:
        """One message on a connection of its own; whether it was confirmed. OSError when the connection broke."""
        content = f"From: <{SENDER}>\r\nSubject: {name}\r\n\r\n".encode() + b".0123456789abcdef\r\n" * 40
        with Client(self.before.address, timeout_s=30) as client:
            client.hello()
            for reply in client.envelope(SENDER, ["ann@example.org"]):
                assert reply.code == 250, reply
            assert client.command("DATA").code == 354
            client.send(stuff(content) + b".\r\n")
            reply = client.read_reply()
            assert reply.code == 250, reply
            return True


@pytest.fixture
def wires(tmp_path: Path) -> Iterator[Wires]:
    with ExitStack() as stack:
        sink = Downstream()
        stack.callback(sink.close)
        yield Wires(sink, tmp_path, stack)


def octets_of_a_message(wires: Wires, tap: Tap) -> int:
    """How many octets pass there for one message."""
    count = 1 << 30
    tap.watch(count, lambda: None)
    assert wires.bring("chaos-first")
    return count - tap._left


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_250_if_and_only_if_stored_wherever_a_worker_is_killed(seed: int, wires: Wires) -> None:
    chance = random.Random(seed)
    octets = {tap: octets_of_a_message(wires, tap) for tap in (wires.before, wires.behind)}
    wires.sink.behave()
    confirmed: list[str] = []
    broken: list[str] = []
    for number in range(KILLS):
        name = f"chaos-{seed}-{number}"
        tap = chance.choice([*octets])
        dead = wires.killed
        tap.watch(chance.randrange(octets[tap]), wires.kill)
        try:
            wires.bring(name)
            confirmed.append(name)
        except OSError:
            broken.append(name)
        # a message that came through although its octet passed: killed behind its confirmation, or in the next one
        if wires.killed == dead:
            tap.watch(-1, lambda: None)
        wait_until(lambda: len(wires.gateway.worker_pids()) == 1, within_s=10, what="a new worker")
        wait_until(lambda: wires.gateway.admin_status("/readyz") == 200, within_s=10, what="it is ready")
    stored = arrived(wires.sink.messages)
    every = stored + arrived(wires.sink.unconfirmed)
    assert wires.killed >= KILLS * 0.9
    # not one that was confirmed is missing, and nothing came twice
    assert [name for name in confirmed if stored[name] != 1] == []
    assert {name: count for name, count in every.items() if count != 1} == {}
    # what is stored and was not confirmed is of senders who lost their connection, and will come again
    assert stored - Counter(confirmed) - Counter(broken) == Counter()
    assert broken
