"""The resolver as a worker makes it: which back end, which name servers, what /readyz shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import aiodns
import pytest
from dns import rcode
from dns.message import Message

from gateway.adapters.dns import Dns, DnsSettings, DnsSettingsError, Nameserver, cares
from gateway.adapters.dns.system import system_nameservers
from gateway.app import SystemClock
from gateway.lookup import Found, Question, RRType, ask
from gateway.services import Instruments
from tests.adapters.fake_nameserver import FakeNameserver, reply_to
from tests.e2e.net import LOOPBACK, free_port
from tests.fakes import FakeLog, FakeMetrics

LOCAL = (Nameserver("127.0.0.1"),)


def instruments() -> Instruments:
    return Instruments(SystemClock(), FakeLog(), FakeMetrics())


@pytest.mark.parametrize("is_installed", [True, False])
async def test_takes_aiodns_where_it_is_installed(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_installed:
        monkeypatch.setitem(sys.modules, "aiodns", None)
        monkeypatch.delitem(sys.modules, "gateway.adapters.dns.cares", raising=False)
    reply = "a.example.org. 60 IN A 192.0.2.1"
    async with FakeNameserver(lambda query, _: [reply_to(query, reply).to_wire()]).running() as server:
        dns = Dns(DnsSettings((server.at,)), instruments())
        (answer,) = await dns.run(ask(Question("a.example.org", RRType.A)))
        assert answer.found is Found.RECORDS
        assert dns.state() == {
            "nameservers": [str(server.at)],
            "back_end": "aiodns" if is_installed else "dnspython",
            "unanswered": 0,
        }
        await dns.close()


@pytest.mark.parametrize("at_once", [1, 3, 8])
async def test_no_channel_stays_open_that_is_used_up(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    closed: list[object] = []

    class Counted(aiodns.DNSResolver):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

        async def close(self) -> None:
            closed.append(self)
            await super().close()

    monkeypatch.setattr(aiodns, "DNSResolver", Counted)
    monkeypatch.setattr(cares, "_MAX_QUESTIONS", 4)
    reply = "{} 60 IN A 192.0.2.1"
    async with FakeNameserver(
        lambda query, _: [reply_to(query, reply.format(query.question[0].name)).to_wire()]
    ).running() as server:
        dns = Dns(DnsSettings((server.at,)), instruments())
        for first in range(0, 24, at_once):
            names = (f"a{number}.example.org" for number in range(first, first + at_once))
            answers = await dns.run(ask(*(Question(name, RRType.A) for name in names)))
            assert [answer.found for answer in answers] == [Found.RECORDS] * at_once
        assert len(opened) == 7  # one for each four questions, and the next
        assert set(closed) == set(opened[:-1])
        await dns.close()
    assert set(closed) == set(opened)


async def test_one_answer_without_soa_is_not_taken_for_all_that_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cares, "_MAX_QUESTIONS", 2)
    has_soa = False

    def no_such_name(query: Message, is_tcp: bool) -> list[bytes]:
        message = reply_to(query, code=rcode.NXDOMAIN)
        if has_soa:
            message.authority += reply_to(query, "example.org. 60 IN SOA a. b. 1 2 3 4 60").answer
        return [message.to_wire()]

    async def ask_twice(name: str) -> int:
        """How many of two questions in sequence go to the name server."""
        before = metrics["mxgate_dns_cache_total", "miss"]
        for _ in range(2):
            await dns.run(ask(Question(name, RRType.A)))
        return int(metrics["mxgate_dns_cache_total", "miss"] - before)

    metrics = FakeMetrics()
    async with FakeNameserver(no_such_name).running() as server:
        dns = Dns(DnsSettings((server.at,)), Instruments(SystemClock(), FakeLog(), metrics))
        assert await ask_twice("a.example.net") == 2
        has_soa = True
        assert await ask_twice("b.example.org") == 1
        await dns.close()


async def test_tells_how_long_nobody_answers() -> None:
    dns = Dns(DnsSettings((Nameserver(LOOPBACK, free_port()),), timeout_s=0.5), instruments())
    for number in range(3):
        await dns.run(ask(Question(f"a{number}.example.org", RRType.A)))
    state = dns.state()
    assert state["unanswered"] == 3
    assert isinstance(state["failing_since"], float)
    await dns.close()


async def test_an_address_of_one_link_is_one_to_ask() -> None:
    dns = Dns(DnsSettings((Nameserver("fe80::1%lo"),), timeout_s=0.5), instruments())
    (answer,) = await dns.run(ask(Question("a.example.org", RRType.A)))
    assert answer.is_temporary
    assert dns.state()["nameservers"] == ["[fe80::1%lo]:53"]
    await dns.close()


async def test_name_servers_that_cannot_be_used_stop_the_start() -> None:
    with pytest.raises(DnsSettingsError, match=r"not an address:53"):
        Dns(DnsSettings((Nameserver("not an address"),)), instruments())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# comment\nsearch example.net\nnameserver 192.0.2.53\n nameserver\t2001:db8::53 # too\noptions ndots:5",
            (Nameserver("192.0.2.53"), Nameserver("2001:db8::53")),
        ),
        ("nameserver fe80::1%eth0\n", (Nameserver("fe80::1%eth0"),)),
        ("nameserver no.address\nnameserver\n;nameserver 192.0.2.1\n", LOCAL),
        ("", LOCAL),
    ],
)
def test_the_systems_name_servers_are_those_of_resolv_conf(
    tmp_path: Path, text: str, expected: tuple[Nameserver, ...]
) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    assert system_nameservers(file) == expected


def test_this_machine_is_asked_where_there_is_no_resolv_conf(tmp_path: Path) -> None:
    assert system_nameservers(tmp_path / "none") == LOCAL


async def test_without_name_servers_the_systems_are_asked() -> None:
    dns = Dns(DnsSettings(), instruments())
    assert dns.state()["nameservers"] == [str(each) for each in system_nameservers()]
    await dns.close()
