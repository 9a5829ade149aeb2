"""The stub's sockets and ids, which are what keeps a stranger from answering (RFC 5452)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import dns.message
import pytest

from gateway.adapters.dns.reply import Reply
from gateway.adapters.dns.stub import Nameserver, Stub
from gateway.lookup import RRType
from tests.adapters.fake_nameserver import FakeNameserver, reply_to
from tests.e2e.net import LOOPBACK, free_port

QUESTIONS = 32


def good(query: dns.message.Message, is_tcp: bool) -> list[bytes]:
    return [reply_to(query, f"{query.question[0].name} 60 IN A 192.0.2.7").to_wire()]


def sockets() -> int:
    """How many this process has open."""
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            count += stat.S_ISSOCK(os.fstat(int(each.name)).st_mode)
    return count


async def asked(stub: Stub, name: str, timeout_s: float = 3.0) -> Reply | str:
    future: asyncio.Future[Reply | str] = asyncio.get_running_loop().create_future()
    stub.ask(0, name, RRType.A, timeout_s, future.set_result)
    return await future


@pytest.fixture
async def server() -> AsyncIterator[FakeNameserver]:
    async with FakeNameserver(good).running() as server:
        yield server


@pytest.mark.parametrize("at_once", [1, 7, 200])
async def test_a_port_serves_some_questions_each_with_an_id_of_its_own(
    server: FakeNameserver, at_once: int
) -> None:
    before = sockets()
    stub = Stub([server.at])
    for first in range(0, 196, at_once):
        names = (f"a{number}.example.org" for number in range(first, first + at_once))
        heard = await asyncio.gather(*(asked(stub, name) for name in names))
        assert all(isinstance(each, Reply) for each in heard)
    served = Counter(server.ports)
    assert max(served.values()) <= QUESTIONS
    assert len(served) >= len(server.ports) // QUESTIONS
    ids = {(port, packet[:2]) for port, packet in zip(server.ports, server.packets, strict=True)}
    assert len(ids) == len(server.packets)
    # only the last one may have questions left
    assert sockets() <= before + 1
    await stub.close()
    assert sockets() == before


async def test_ids_and_ports_follow_no_order(server: FakeNameserver) -> None:
    stub = Stub([server.at])
    for number in range(4 * QUESTIONS):
        await asked(stub, f"a{number}.example.org")
    await stub.close()
    ids = [int.from_bytes(packet[:2]) for packet in server.packets]
    steps = {(after - before) % 2**16 for before, after in pairwise(ids)}
    assert len(steps) > QUESTIONS
    assert max(ids) - min(ids) > 2**15


async def test_a_port_from_which_nothing_is_heard_is_not_asked_from_again() -> None:
    """As of a NAT that has it lead to a server that is gone, as long as packets come from there."""

    def script(query: dns.message.Message, is_tcp: bool) -> list[bytes]:
        return [] if silent_for_one.ports[-1] == silent_for_one.ports[0] else good(query, is_tcp)

    async with FakeNameserver(script).running() as silent_for_one:
        stub = Stub([silent_for_one.at])
        assert await asked(stub, "a.example.org", 0.3) == "timeout"
        assert stub.open == set()
        assert isinstance(await asked(stub, "b.example.org"), Reply)
        await stub.close()


async def test_what_is_under_way_when_it_closes_is_nobodys() -> None:
    before = sockets()
    async with FakeNameserver().running() as server:
        stub = Stub([server.at])
        heard: list[Reply | str] = []
        stub.ask(0, "a.example.org", RRType.A, 0.05, heard.append)
        await stub.close()
        other = Stub([server.at])
        assert await asked(other, "b.example.org", 0.1) == "timeout"  # later than the first would have
        await other.close()
        assert heard == []
    assert sockets() == before


async def test_each_of_many_who_wait_hears_that_nobody_is_there() -> None:
    stub = Stub([Nameserver(LOOPBACK, free_port())])
    heard = await asyncio.gather(*(asked(stub, f"a{number}.example.org", 30) for number in range(50)))
    assert heard == ["network"] * 50
    await stub.close()


async def test_a_mistake_of_who_asked_is_not_the_others_trouble() -> None:
    def fails(_: Reply | str) -> None:
        raise ValueError

    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(lambda *_: told.set())
    async with FakeNameserver().running() as silent, asyncio.timeout(5):
        stub = Stub([silent.at])
        stub.ask(0, "a.example.org", RRType.A, 0.1, fails)
        assert await asked(stub, "b.example.org", 0.2) == "timeout"
        assert await asked(stub, "c.example.org", 0.1) == "timeout"
        assert told.is_set()
        await stub.close()


async def test_many_who_wait_take_few_sockets() -> None:
    before = sockets()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        stub = Stub([Nameserver(*silent.getsockname())])
        waiting = asyncio.gather(*(asked(stub, f"a{number}.example.org", 0.3) for number in range(5000)))
        await asyncio.sleep(0)
        assert sockets() <= before + 2 + 5000 // (QUESTIONS - 1)
        assert set(await waiting) == {"timeout"}
        assert sockets() == before + 1
        await stub.close()


async def test_without_a_socket_to_ask_from_it_says_so(
    server: FakeNameserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, "Too many open files")

    stub = Stub([server.at])
    with monkeypatch.context() as patched:
        patched.setattr("gateway.adapters.dns.stub.socket.socket", none_left)
        assert await asked(stub, "a.example.org") == "network"
    assert isinstance(await asked(stub, "a.example.org"), Reply)
    await stub.close()


async def test_who_was_not_there_is_asked_again(server: FakeNameserver) -> None:
    elsewhere = Nameserver(LOOPBACK, free_port())
    stub = Stub([elsewhere])
    assert await asked(stub, "a.example.org", 30) == "network"
    async with FakeNameserver(good, at=elsewhere).running() as other:
        assert isinstance(await asked(stub, "b.example.org"), Reply)
        assert isinstance(await asked(stub, "c.example.org"), Reply)
        assert len(other.packets) == 2
    assert await asked(stub, "d.example.org", 30) == "network"
    await stub.close()


class Unreachable(socket.socket):
    """Says, where the first question is sent again, that there is no way to the server any more."""

    has_sent = False

    def send(self, wire: bytes) -> int:  # type: ignore[override]  # flags are not used
        if b"first" in wire:
            if self.has_sent:
                raise OSError(errno.ENETUNREACH, "Network is unreachable")
            self.has_sent = True
        return super().send(wire)


async def test_each_question_ends_once_where_the_network_goes_while_they_are_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeNameserver().running() as server, asyncio.timeout(5):
        stub = Stub([server.at])
        with monkeypatch.context() as patched:
            patched.setattr("gateway.adapters.dns.stub.socket.socket", Unreachable)
            # sent again when some of the others are given up
            first = asked(stub, "first.example.org", 0.6)
            others = (asked(stub, f"a{number}.example.org", number / 100) for number in range(10, 35))
            heard = await asyncio.gather(first, *others)
        assert heard[0] == "network"
        assert set(heard) == {"network", "timeout"}
        assert await asked(stub, "b.example.org", 0.1) == "timeout"
        await stub.close()
