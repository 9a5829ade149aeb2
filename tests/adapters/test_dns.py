"""The resolver as a worker makes it: which back end, which name servers, what /readyz shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.adapters.dns import Dns, DnsSettings, DnsSettingsError, Nameserver
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


async def test_says_which_servers_it_asks_and_how_they_do() -> None:
    reply = "a.example.org. 60 IN A 192.0.2.1"
    async with FakeNameserver(lambda query, _: [reply_to(query, reply).to_wire()]).running() as server:
        dns = Dns(DnsSettings((server.at,)), instruments())
        (answer,) = await dns.run(ask(Question("a.example.org", RRType.A)))
        assert answer.found is Found.RECORDS
        assert dns.state() == {"nameservers": [str(server.at)], "unanswered": 0}
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


async def test_a_defect_of_ours_is_a_failure_and_no_wait_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    reply = "a.example.org. 60 IN A 192.0.2.1"
    log = FakeLog()
    async with FakeNameserver(lambda query, _: [reply_to(query, reply).to_wire()]).running() as server:
        dns = Dns(DnsSettings((server.at,)), Instruments(SystemClock(), log, FakeMetrics()))
        with monkeypatch.context() as patched:
            patched.setattr("gateway.adapters.dns.upstream.read", broken)
            (answer,) = await dns.run(ask(Question("a.example.org", RRType.A)))
        assert answer.is_temporary
        assert [line.event for line in log.of("error")] == ["dns.failed"]
        (answer,) = await dns.run(ask(Question("a.example.org", RRType.A)))
        assert answer.found is Found.RECORDS
        await dns.close()
