"""Answers from a real unbound, and from servers that do what a server must not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import dns.flags
import dns.message
import dns.name
import dns.rcode
import pytest

from gateway.adapters.dns.stub import Nameserver
from gateway.lookup import NO_DATA, NO_SUCH_NAME, Answer, Found, Mx, Question, RRType, ask
from tests.adapters.dnskit import Kit, transaction
from tests.adapters.fake_nameserver import FakeNameserver, Script, reply_to
from tests.e2e.net import LOOPBACK, free_port
from tests.nameserver import Unbound

A, AAAA, MX, NS, PTR, TXT = RRType.A, RRType.AAAA, RRType.MX, RRType.NS, RRType.PTR, RRType.TXT
LONG = b"".join(b"%03d" % number * 85 for number in range(12))  # 3060 octets: more than fits into UDP

RECORDS = rf"""
a.example.org. 300 IN A 192.0.2.1
a.example.org. 300 IN A 192.0.2.2
a.example.org. 300 IN AAAA 2001:db8::1
example.org. 300 IN MX 10 a.example.org.
example.org. 300 IN MX 20 B.Example.ORG.
example.org. 300 IN NS ns.example.org.
null.example.org. 300 IN MX 0 .
1.2.0.192.in-addr.arpa. 300 IN PTR a.example.org.
two.example.org. 300 IN TXT "v=spf1 " "-all"
octets.example.org. 300 IN TXT "caf\195\169 \255\000 \" \\ ;"
long.example.org. 300 IN TXT {" ".join(f'"{f"{number:03d}" * 85}"' for number in range(12))}
alias.example.org. 300 IN CNAME middle.example.org.
middle.example.org. 300 IN CNAME a.example.org.
astray.example.org. 300 IN CNAME nothing.example.org.
loop.example.org. 300 IN CNAME pool.example.org.
pool.example.org. 300 IN CNAME loop.example.org.
a\032b.example.org. 300 IN A 192.0.2.32
per\037cent.example.org. 300 IN A 192.0.2.37
quo\034te.example.org. 300 IN A 192.0.2.34
back\092slash.example.org. 300 IN A 192.0.2.92
caf\195\169.example.org. 300 IN A 192.0.2.233
x_y.example.org. 300 IN A 192.0.2.95
odd.example.org. 300 IN PTR a\046b.caf\195\169.\255\032.example.org.
a.example.org.search.example.net. 300 IN A 192.0.2.200
"""


@pytest.fixture(scope="module")
def unbound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unbound]:
    server = Unbound(RECORDS, tmp_path_factory.mktemp("unbound"))
    yield server
    server.close()


@pytest.fixture
async def kit(unbound: Unbound) -> AsyncIterator[Kit]:
    kit = Kit([Nameserver(*unbound.address)])
    yield kit
    await kit.close()


# --- a real server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rrtype", "records"),
    [
        ("a.example.org", A, {IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")}),
        ("A.EXAMPLE.org.", A, {IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")}),
        ("a.example.org", AAAA, {IPv6Address("2001:db8::1")}),
        ("example.org", MX, {Mx(10, "a.example.org"), Mx(20, "b.example.org")}),
        ("example.org", NS, {"ns.example.org"}),
        ("null.example.org", MX, {Mx(0, "")}),
        ("1.2.0.192.in-addr.arpa", PTR, {"a.example.org"}),
        ("two.example.org", TXT, {b"v=spf1 -all"}),
        ("octets.example.org", TXT, {b'caf\xc3\xa9 \xff\x00 " \\ ;'}),
        ("long.example.org", TXT, {LONG}),
        ("alias.example.org", AAAA, {IPv6Address("2001:db8::1")}),
        ("a b.example.org", A, {IPv4Address("192.0.2.32")}),
        ("per%cent.example.org", A, {IPv4Address("192.0.2.37")}),
        ('quo"te.example.org', A, {IPv4Address("192.0.2.34")}),
        ("back\\slash.example.org", A, {IPv4Address("192.0.2.92")}),
        ("caf\u00e9.example.org", A, {IPv4Address("192.0.2.233")}),
        ("x_y.example.org", A, {IPv4Address("192.0.2.95")}),
        ("odd.example.org", PTR, {"a\\046b.caf\u00e9.\\xff .example.org"}),
    ],
)
async def test_records_are_those_of_the_name(
    kit: Kit, name: str, rrtype: RRType, records: set[object]
) -> None:
    answer = await kit.ask(name, rrtype)
    assert answer.found is Found.RECORDS
    assert set(answer.records) == records


@pytest.mark.parametrize(
    ("name", "rrtype", "answer"),
    [
        ("a.example.org", TXT, NO_DATA),
        ("alias.example.org", TXT, NO_DATA),
        ("nothing.example.org", A, NO_SUCH_NAME),
        ("astray.example.org", A, NO_SUCH_NAME),
        ("loop.example.org", A, NO_DATA),
        # RFC 4343: the case of ASCII letters alone does not matter
        ("caf\u00c9.example.org", A, NO_SUCH_NAME),
        ("localhost", A, NO_SUCH_NAME),
    ],
)
async def test_there_is_nothing_in_two_ways(kit: Kit, name: str, rrtype: RRType, answer: Answer) -> None:
    assert await kit.ask(name, rrtype) == answer


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        ".a",
        "a..",
        "\ud800.org",
        "a" * 64 + ".org",
        ".".join(["a" * 49] * 6),
        "\u00e9" * 32 + ".org",
    ],
)
async def test_nobody_is_asked_for_a_name_that_cannot_be(kit: Kit, name: str) -> None:
    assert await kit.ask(name) == NO_SUCH_NAME
    assert kit.metrics.of("mxgate_dns_questions_total") == {}


async def test_a_search_list_is_never_used(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    # what resolvers of the C library's kind read like a search list of resolv.conf
    monkeypatch.setenv("LOCALDOMAIN", "search.example.net")
    monkeypatch.setenv("RES_OPTIONS", "ndots:9")
    searching = Kit(kit.upstream.servers)
    try:
        assert await searching.ask("a.example.org.search.example.net") != NO_SUCH_NAME
        assert await searching.ask("a") == NO_SUCH_NAME
        assert await searching.ask("a.example.org", TXT) == NO_DATA
    finally:
        await searching.close()


async def test_a_hosts_file_is_never_read(kit: Kit) -> None:
    # it is in everybody's /etc/hosts
    assert await kit.ask("localhost") == NO_SUCH_NAME


async def test_many_questions_leave_nothing_open(unbound: Unbound) -> None:
    async def ask_many() -> None:
        kit = Kit([Nameserver(*unbound.address)])
        answers = await asyncio.gather(*(kit.ask(f"x{number}.example.org") for number in range(600)))
        assert set(answers) == {NO_SUCH_NAME}
        await kit.ask("long.example.org", TXT)
        await kit.close()

    def opened() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    await ask_many()
    before = opened()
    await ask_many()
    assert opened() <= before


async def test_recovers_when_the_server_is_back(tmp_path: Path) -> None:
    server = Unbound("a.example.org. 300 IN A 192.0.2.1", tmp_path)
    kit = Kit([Nameserver(*server.address)], timeout_s=1)
    try:
        server.stop()
        assert (await kit.ask("a.example.org")).is_temporary
        assert kit.upstream.unanswered == 1
        assert kit.upstream.failing_since is not None
        server.start()
        assert (await kit.ask("a.example.org")).found is Found.RECORDS
        assert kit.upstream.unanswered == 0
    finally:
        server.close()
        await kit.close()


# --- servers that follow a script ---------------------------------------------------------------------

GOOD = "a.example.org. 60 IN A 192.0.2.7"
FOUND = Answer(Found.RECORDS, (IPv4Address("192.0.2.7"),))


def failure(why: str) -> Answer:
    return Answer(Found.TEMPORARY_FAILURE, why=why)


async def answer_of(
    script: Script | None, rrtype: RRType = A, *, timeout_s: float = 3.0, with_tcp: bool = True
) -> Answer:
    """What is answered for a.example.org by a server with this script."""
    async with FakeNameserver(script).running(with_tcp=with_tcp) as server:
        kit = Kit([server.at], timeout_s=timeout_s)
        try:
            return await kit.ask("a.example.org", rrtype)
        finally:
            await kit.close()


def changed(wire: bytes, place: int, octet: int) -> bytes:
    return wire[:place] + bytes([wire[place] ^ octet]) + wire[place + 1 :]


def other_question(query: dns.message.Message) -> bytes:
    other = reply_to(dns.message.make_query("b.example.org", "A"), "b.example.org. 60 IN A 192.0.2.66")
    other.id = query.id
    return other.to_wire()


@pytest.mark.parametrize(
    "bad",
    [
        lambda query: changed(reply_to(query, "a.example.org. 60 IN A 192.0.2.66").to_wire(), 1, 1),
        lambda query: query.to_wire()[:2] + b"\x81\x80" + b"\xff" * 40,
        lambda query: reply_to(query, GOOD).to_wire()[:-3],
        lambda _: b"",
        lambda _: b"x",
        other_question,
    ],
    ids=["other id", "garbage", "cut off", "empty", "one octet", "other question"],
)
async def test_a_bad_packet_does_not_end_the_wait_for_the_good_one(bad: object) -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield bad(query)  # type: ignore[operator]
        yield reply_to(query, GOOD).to_wire()

    assert await answer_of(script) == FOUND


@pytest.mark.parametrize("code", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.FORMERR, dns.rcode.NOTIMP])
async def test_an_error_of_the_server_is_temporary(code: dns.rcode.Rcode) -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, code=code).to_wire()

    assert await answer_of(script) == failure(code.name.lower())


async def test_who_refers_to_others_has_no_answer() -> None:
    """As of a name server that has zones, and asks nobody for what is not in them."""

    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        message = reply_to(query)
        message.flags &= ~dns.flags.RA
        message.authority += reply_to(query, ". 60 IN NS a.root-servers.net.").answer
        yield message.to_wire()

    assert await answer_of(script) == failure("refused")


async def test_a_code_that_nobody_knows_is_temporary() -> None:
    answer = await answer_of(lambda query, _: [reply_to(query, code=11).to_wire()])
    assert answer.is_temporary


def without_edns(code: dns.rcode.Rcode) -> Script:
    """Of a server that knows no EDNS and tells so by this code; what it says else does not fit into UDP."""

    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        if query.edns >= 0:
            plain = dns.message.make_query("a.example.org", "A")
            plain.id = query.id
            yield reply_to(plain, code=code).to_wire()
        else:
            yield reply_to(query, GOOD).to_wire() if is_tcp else cut(query)

    return script


@pytest.mark.parametrize("code", [dns.rcode.FORMERR, dns.rcode.NOTIMP])
async def test_a_server_that_does_not_know_edns_is_asked_without(code: dns.rcode.Rcode) -> None:
    assert await answer_of(without_edns(code)) == FOUND


async def test_silence_is_a_timeout_in_time() -> None:
    began = time.monotonic()
    assert await answer_of(None, timeout_s=0.6) == failure("timeout")
    assert 0.5 < time.monotonic() - began < 1.5


async def test_a_question_that_was_lost_is_sent_again() -> None:
    count = 0

    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        nonlocal count
        count += 1
        if count > 1:
            yield reply_to(query, GOOD).to_wire()

    assert await answer_of(script) == FOUND


async def test_a_slow_answer_is_waited_for() -> None:
    assert await answer_of(lambda query, _: [1.2, reply_to(query, GOOD).to_wire()]) == FOUND


async def test_nobody_there_is_told_at_once() -> None:
    kit = Kit([Nameserver(LOOPBACK, free_port())], timeout_s=20)
    began = time.monotonic()
    assert await kit.ask("a.example.org") == failure("network")
    assert time.monotonic() - began < 10
    await kit.close()


async def test_nobody_there_is_told_to_questions_that_are_asked_together() -> None:
    kit = Kit([Nameserver(LOOPBACK, free_port())], timeout_s=20)
    tx = transaction()
    many = [Question(f"a{number}.example.org", A) for number in range(5)]
    kit.resolver.prefetch(ask(*many), tx)
    for each in tx, transaction():
        assert await kit.resolver.run(ask(*many), each) == [failure("network")] * 5
    assert kit.log.of("error") == []
    assert kit.log.of("debug") == []
    await kit.close()


async def test_the_same_question_reaches_the_server_again() -> None:
    numbers = iter(range(1, 9))

    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        return [reply_to(query, f"a.example.org. 1 IN A 192.0.2.{next(numbers)}").to_wire()]

    async with FakeNameserver(script).running() as server:
        kit = Kit([server.at])
        answers = [await kit.ask("a.example.org") for _ in range(3)]
        await kit.close()
    assert [str(answer.records[0]) for answer in answers] == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


async def test_another_server_takes_over() -> None:
    dead = Nameserver(LOOPBACK, free_port())

    def refuses(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, code=dns.rcode.REFUSED).to_wire()

    def good(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, f"{query.question[0].name} 60 IN A 192.0.2.7").to_wire()

    async with FakeNameserver(refuses).running() as first, FakeNameserver(good).running() as second:
        kit = Kit([dead, first.at, second.at])
        for number in range(9):
            assert await kit.ask(f"n{number}.example.org") == FOUND
        await kit.close()
        assert len(second.heard) == 9
        assert 3 <= len(first.heard) <= 6  # its turn only


async def test_servers_are_asked_in_turn() -> None:
    def good(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, f"{query.question[0].name} 60 IN A 192.0.2.7").to_wire()

    async with FakeNameserver(good).running() as first, FakeNameserver(good).running() as second:
        kit = Kit([first.at, second.at])
        for number in range(10):
            assert await kit.ask(f"n{number}.example.org") == FOUND
        await kit.close()
        assert (len(first.heard), len(second.heard)) == (5, 5)


def cut(query: dns.message.Message) -> bytes:
    message = reply_to(query)
    message.flags |= dns.flags.TC
    return message.to_wire()


async def test_a_cut_answer_is_asked_for_by_tcp() -> None:
    strings = " ".join(['"' + "x" * 250 + '"'] * 240)  # 60 kB

    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, f"a.example.org. 60 IN TXT {strings}").to_wire() if is_tcp else cut(query)

    assert (await answer_of(script, TXT)).texts == (b"x" * 60_000,)


async def test_an_answer_cut_within_a_record_is_asked_for_by_tcp() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        whole = reply_to(query, GOOD)
        if is_tcp:
            yield whole.to_wire()
        else:
            whole.flags |= dns.flags.TC
            yield whole.to_wire()[:-15]

    assert await answer_of(script) == FOUND


async def test_a_cut_answer_without_tcp_is_temporary() -> None:
    assert (await answer_of(lambda query, _: [cut(query)], with_tcp=False)).is_temporary


async def test_a_cut_answer_with_silent_tcp_is_temporary_in_time() -> None:
    began = time.monotonic()
    answer = await answer_of(lambda query, is_tcp: [] if is_tcp else [cut(query)], timeout_s=0.6)
    assert answer == failure("timeout")
    assert time.monotonic() - began < 1.5


async def test_records_of_other_names_and_classes_are_ignored() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(
            query,
            "b.example.org. 60 IN A 192.0.2.66",
            GOOD,
            "a.example.org. 60 CH TXT x",
            "a.example.org. 60 IN AAAA ::1",
        ).to_wire()

    assert await answer_of(script) == FOUND


async def test_only_records_of_other_names_are_no_data() -> None:
    script: Script = lambda query, _: [reply_to(query, "b.example.org. 60 IN A 192.0.2.66").to_wire()]  # noqa: E731
    assert await answer_of(script) == NO_DATA


@pytest.mark.parametrize(
    ("records", "answer"),
    [
        (["a.example.org. 60 IN CNAME B.example.org.", "b.example.org. 60 IN A 192.0.2.7"], FOUND),
        (["a.example.org. 60 IN CNAME b.example.org.", "b.example.org. 60 IN CNAME a.example.org."], NO_DATA),
        (["a.example.org. 60 IN CNAME a.example.org."], NO_DATA),
    ],
    ids=["chain", "loop", "itself"],
)
async def test_aliases_of_one_answer_are_followed(records: list[str], answer: Answer) -> None:
    assert await answer_of(lambda query, _: [reply_to(query, *records).to_wire()]) == answer


async def test_a_chain_that_ends_in_nothing_is_no_data_without_another_question() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        message = reply_to(query, "a.example.org. 60 IN CNAME b.example.org.")
        message.authority += reply_to(query, "example.org. 60 IN SOA a. b. 1 2 3 4 5").answer
        yield message.to_wire()

    async with FakeNameserver(script).running() as server:
        kit = Kit([server.at])
        assert await kit.ask("a.example.org") == NO_DATA
        await kit.close()
        assert len(server.heard) == 1


async def test_aliases_without_end_are_followed_eight_times() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        name = query.question[0].name
        yield reply_to(query, f"{name} 60 IN CNAME x.{name}").to_wire()

    async with FakeNameserver(script).running() as server:
        kit = Kit([server.at])
        assert await kit.ask("a.example.org") == NO_DATA
        await kit.close()
        assert len(server.heard) == 9


@pytest.mark.parametrize("target", [".", "\\255" * 63 + ".", ("\\255" * 15 + ".") * 15])
async def test_an_alias_of_what_cannot_be_asked_for_is_no_data(target: str) -> None:
    assert (
        await answer_of(lambda query, _: [reply_to(query, f"a.example.org. 60 IN CNAME {target}").to_wire()])
        == NO_DATA
    )


async def test_the_code_is_about_the_end_of_the_chain() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        yield reply_to(query, "a.example.org. 60 IN CNAME b.example.org.", code=dns.rcode.NXDOMAIN).to_wire()

    assert await answer_of(script) == NO_SUCH_NAME


async def test_more_records_than_anybody_needs_are_refused() -> None:
    def script(query: dns.message.Message, is_tcp: bool) -> Iterable[bytes | float]:
        if not is_tcp:
            yield cut(query)
            return
        message = reply_to(query)
        addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(2000)]
        message.answer.append(dns.rrset.from_text("a.example.org.", 60, "IN", "A", *addresses))
        yield message.to_wire()

    assert await answer_of(script) == failure("too_large")


async def test_questions_say_what_they_should() -> None:
    async with FakeNameserver(lambda query, _: [reply_to(query, GOOD).to_wire()]).running() as server:
        kit = Kit([server.at])
        await kit.ask("a.example.org")
        await kit.close()
        query = dns.message.from_wire(server.packets[0])
        assert query.flags == dns.flags.RD
        assert query.edns == 0
        assert query.payload == 1232
        assert query.question[0].name == dns.name.from_text("a.example.org.")
