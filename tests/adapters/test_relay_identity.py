"""Whom the downstream takes for the client: XFORWARD beside the mail, XCLIENT and PROXY for the whole connection."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from gateway.adapters.relay import Identity, Protocol
from gateway.session import Session
from gateway.smtp.client import proxy_v2, xclient_command, xforward_commands
from tests.adapters.relaykit import SESSION, TROUBLE, both_loops, relay_to, turns
from tests.adapters.sink import CLOSE, EXTENSIONS, HANG, OK, Do, Peer, Sink, say

XFORWARD = frozenset(["NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE"])
XCLIENT = frozenset(["NAME", "ADDR", "PORT", "PROTO", "HELO"])
FORWARDING = (*EXTENSIONS, "XFORWARD " + " ".join(sorted(XFORWARD)))
INTRODUCING = (*EXTENSIONS, "XCLIENT " + " ".join(sorted(XCLIENT)))
ACCEPTED = "250 2.1.5 Recipient ok"


def client(number: int, **changes: Any) -> Session:
    address = ip_address(f"192.0.2.{number}")
    return replace(SESSION, client=address, port=1000 + number, helo=f"c{number}.example.net", **changes)


def seen_by(sink: Sink, peer: Peer) -> Any:
    """The address in a PROXY header for IPv4, None for LOCAL."""
    assert peer.header.startswith(b"\r\n\r\n\0\r\nQUIT\n")
    if peer.header[12] == 0x20:
        return None
    assert peer.header[12:14] == b"\x21\x11"
    assert int.from_bytes(peer.header[26:28]) == sink.port
    return ip_address(peer.header[16:20])


# --- XFORWARD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
@both_loops
async def test_xforward_names_the_client_of_each_mail_over_shared_connections(pipelining: bool) -> None:
    extensions = FORWARDING if pipelining else FORWARDING[1:]
    async with Sink(extensions=extensions) as sink, relay_to(sink, identity=Identity.XFORWARD) as bench:
        for number in (1, 2, 1, 3):
            assert await bench.verify("b@example.org", session=client(number)) == [ACCEPTED]
            assert (await bench.deliver(session=client(number))).stored
        assert len(sink.peers) == 1
        expected = [xforward_commands(client(number), "t1", XFORWARD) for number in (1, 2, 1, 3)]
        told = [
            [line for line in message.commands if line.startswith(b"XFORWARD")] for message in sink.messages
        ]
        assert told == [[line.removesuffix(b"\r\n") for line in lines] for lines in expected]
        # the recipient's answer is everybody's: it was asked for once, for the session that asked
        asked = [line for line in sink.commands if b"IDENT=s1" in line]
        assert len(asked) == 1
        if pipelining:
            group = next(piece for piece in sink.peers[0].pieces if b"DATA" in piece)
            assert group.startswith(b"XFORWARD ")


@both_loops
async def test_a_refused_xforward_does_not_stop_the_mail() -> None:
    async with (
        Sink(extensions=FORWARDING, xforward=say("501 5.5.4 No")) as sink,
        relay_to(sink, identity=Identity.XFORWARD) as bench,
    ):
        assert await bench.verify("b@example.org") == [ACCEPTED]
        assert (await bench.deliver()).stored
        assert bench.errors == {}


@both_loops
async def test_mail_goes_on_without_xforward_and_a_warning_says_so_until_it_is_offered() -> None:
    async with Sink() as sink, relay_to(sink, identity=Identity.XFORWARD) as bench:

        async def reconnect(*extensions: str) -> None:
            sink.extensions = extensions
            bench.pool.dismiss()
            assert (await bench.deliver()).stored

        for extensions in (EXTENSIONS, EXTENSIONS, EXTENSIONS[1:]):
            await reconnect(*extensions)
        (warning,) = bench.logged("relay.identity_not_offered")
        assert warning == {"route": "main", "host": bench.hosts[0].name}
        await reconnect(*FORWARDING)
        await reconnect(*EXTENSIONS)
        assert len(bench.logged("relay.identity_not_offered")) == 2
        assert len(sink.messages) == 5


# --- XCLIENT -----------------------------------------------------------------------------------------


@both_loops
async def test_a_connection_of_xclient_serves_its_client_only() -> None:
    async with Sink(extensions=INTRODUCING) as sink, relay_to(sink, identity=Identity.XCLIENT) as bench:
        for number in (1, 2, 3, 2, 1, 3, 3, 1):
            assert (await bench.deliver(session=client(number))).stored
        assert len(sink.peers) == 3
        lines = {number: xclient_command(client(number), XCLIENT)[:-2] for number in (1, 2, 3)}
        assert [message.peer.xclient for message in sink.messages] == [
            lines[number] for number in (1, 2, 3, 2, 1, 3, 3, 1)
        ]
        # RFC 5321 4.1.4: XCLIENT's 220 begins a new dialogue, in the client's name
        assert sink.commands[:3] == [b"EHLO gw.example.org", lines[1], b"EHLO c1.example.net"]


@both_loops
async def test_another_helo_or_protocol_is_another_client_for_xclient() -> None:
    async with Sink(extensions=INTRODUCING) as sink, relay_to(sink, identity=Identity.XCLIENT) as bench:
        for session in (client(1), replace(client(1), helo="other"), client(1, esmtp=True), client(1)):
            assert (await bench.deliver(session=session)).stored
        assert len(sink.peers) == 3


@both_loops
async def test_clients_interleaved_over_few_connections_are_never_mixed() -> None:
    async with (
        Sink(extensions=INTRODUCING) as sink,
        relay_to(sink, identity=Identity.XCLIENT, max_connections_per_host=3) as bench,
    ):

        async def send(number: int) -> None:
            session = client(number % 7)
            rcpt = f"u{number % 7}@example.org"
            assert await bench.verify(rcpt, session=session) == [ACCEPTED]
            assert (await bench.deliver(rcpt, session=session)).stored

        await asyncio.gather(*(send(number) for number in range(60)))
        assert len(sink.messages) == 60
        for message in sink.messages:
            (rcpt,) = (line for line in message.commands if line.startswith(b"RCPT"))
            assert b"ADDR=192.0.2." + rcpt[10:11] + b" " in message.peer.xclient + b" "
        assert max(len(sink.open_peers), 3) == 3
        assert sum(bench.connections.values()) <= 3
        assert bench.errors == {}


@both_loops
async def test_at_the_limit_an_idle_connection_of_another_client_makes_room() -> None:
    async with (
        Sink(extensions=INTRODUCING) as sink,
        relay_to(sink, identity=Identity.XCLIENT, max_connections_per_host=2) as bench,
    ):
        for number in (1, 2, 3):
            assert (await bench.deliver(session=client(number))).stored
        # the one that idled longest
        await sink.until(lambda sink: sink.peers[0].is_closed)
        assert [peer.is_closed for peer in sink.peers] == [True, False, False]
        assert bench.connections == {"idle": 2}
        assert (await bench.deliver(session=client(2))).stored
        assert len(sink.peers) == 3


@both_loops
async def test_who_waits_gets_a_connection_of_its_own_and_not_one_of_another_client() -> None:
    gate = asyncio.Event()
    async with (
        Sink(extensions=INTRODUCING, dot=[Do(gate=gate)]) as sink,
        relay_to(sink, identity=Identity.XCLIENT, max_connections_per_host=1) as bench,
    ):
        first = asyncio.create_task(bench.deliver(session=client(1)))
        await sink.until(lambda sink: sink.messages)
        waiting = [asyncio.create_task(bench.deliver(session=client(number))) for number in (1, 2)]
        await turns(lambda: len(bench.pool._waiters) == 2)
        gate.set()
        assert all(delivery.stored for delivery in await asyncio.gather(first, *waiting))
        assert [b"ADDR=192.0.2.2" in message.peer.xclient for message in sink.messages] == [
            False,
            False,
            True,
        ]
        assert len(sink.peers) == 2


@both_loops
async def test_recipients_are_remembered_for_the_client_that_asked() -> None:
    async with Sink(extensions=INTRODUCING) as sink, relay_to(sink, identity=Identity.XCLIENT) as bench:
        sink.steps["rcpt"] = [OK, say("550 5.1.1 Not for you")]
        for _ in range(2):
            assert await bench.verify("b@example.org", session=client(1)) == [ACCEPTED]
            assert await bench.verify("b@example.org", session=client(2)) == ["550 5.1.1 Not for you"]
        assert len([line for line in sink.commands if line.startswith(b"RCPT")]) == 2


@both_loops
async def test_without_xclient_there_is_no_mail_and_the_host_is_down() -> None:
    async with Sink() as sink, relay_to(sink, identity=Identity.XCLIENT, probe_min_s=0.001) as bench:
        await bench.start()
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "identity")
        assert await bench.verify("b@example.org") == [TROUBLE]
        assert not any(line.startswith(b"MAIL") for line in sink.commands)
        assert bench.up == [False]
        sink.extensions = INTRODUCING
        await bench.until(lambda: bench.up == [True])
        assert (await bench.deliver()).stored


@pytest.mark.parametrize("step", ["xclient", "ehlo"])
@both_loops
async def test_a_client_that_is_refused_by_one_host_may_pass_at_another(step: str) -> None:
    steps: dict[str, Any] = {step: say("550 5.7.1 Go away")}
    if step == "ehlo":
        steps[step] = [OK, say("550 5.7.1 Go away")]
    async with (
        Sink(extensions=INTRODUCING, **steps) as first,
        Sink(extensions=INTRODUCING) as second,
        relay_to([[first], [second]], identity=Identity.XCLIENT) as bench,
    ):
        assert (await bench.deliver()).stored
        assert bench.errors == {"identity": 1}
        # it says nothing about other clients
        assert bench.up == [True, True]
        assert len(second.messages) == 1


@both_loops
async def test_a_client_that_is_refused_everywhere_is_deferred() -> None:
    async with (
        Sink(extensions=INTRODUCING, xclient=say("554 5.7.1 Go away")) as sink,
        relay_to(sink, identity=Identity.XCLIENT) as bench,
    ):
        delivery = await bench.deliver()
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "identity")
        assert "554 5.7.1 Go away" in bench.failures[0]["detail"]
        assert bench.up == [True]
        assert bench.connections == {}


@pytest.mark.parametrize("do", [CLOSE, HANG, say("what"), Do(b"220 go\r\n250 more\r\n")])
@both_loops
async def test_trouble_with_xclient_is_trouble_of_the_host(do: Do) -> None:
    async with (
        Sink(extensions=INTRODUCING, xclient=do) as sink,
        relay_to(sink, identity=Identity.XCLIENT, connect_timeout_s=0.3) as bench,
    ):
        assert (await bench.deliver()).error == "ehlo"
        assert bench.up == [False]


@both_loops
async def test_a_probe_of_an_xclient_route_asks_for_nobody_and_is_used_by_nobody() -> None:
    async with Sink(extensions=INTRODUCING) as sink, relay_to(sink, identity=Identity.XCLIENT) as bench:
        await bench.start()
        await sink.until(lambda sink: sink.peers[0].is_closed)
        assert sink.commands == [b"EHLO gw.example.org", b"QUIT"]
        assert bench.connections == {}
        assert (await bench.deliver()).stored
        assert len(sink.peers) == 2


@both_loops
async def test_what_one_client_is_offered_says_nothing_about_the_route() -> None:
    async with Sink(extensions=INTRODUCING) as sink, relay_to(sink, identity=Identity.XCLIENT) as bench:
        await bench.start()
        offer = bench.relay.offer()
        assert offer.smtputf8
        # Postfix offers XCLIENT to us and not to the client, and other things may differ as well
        sink.steps["ehlo"] = [OK, Do(b"250-sink\r\n250 PIPELINING\r\n")]
        assert (await bench.deliver()).stored
        assert bench.relay.offer() == offer
        assert sink.messages[0].commands[0] == b"MAIL FROM:<a@example.net>"


@both_loops
async def test_lmtp_after_xclient_begins_with_lhlo_again() -> None:
    async with (
        Sink(extensions=INTRODUCING) as sink,
        relay_to(sink, identity=Identity.XCLIENT, protocol=Protocol.LMTP) as bench,
    ):
        assert (await bench.deliver(session=client(1))).stored
        assert sink.commands[0] == b"LHLO gw.example.org"
        assert sink.commands[2] == b"LHLO c1.example.net"


# --- PROXY -------------------------------------------------------------------------------------------


@both_loops
async def test_the_proxy_header_comes_before_everything_and_names_the_client() -> None:
    async with Sink(has_proxy_header=True) as sink, relay_to(sink, identity=Identity.PROXY_V2) as bench:
        for number in (1, 2, 1, 2):
            assert (await bench.deliver(session=client(number))).stored
        destination = (ip_address("127.0.0.1"), sink.port)
        assert [peer.header for peer in sink.peers] == [
            proxy_v2((client(number).client, client(number).port), destination) for number in (1, 2)
        ]
        assert [seen_by(sink, message.peer) for message in sink.messages] == [
            client(number).client for number in (1, 2, 1, 2)
        ]


@both_loops
async def test_another_helo_of_the_same_address_may_share_a_proxied_connection() -> None:
    async with Sink(has_proxy_header=True) as sink, relay_to(sink, identity=Identity.PROXY_V2) as bench:
        assert (await bench.deliver(session=client(1))).stored
        assert (await bench.deliver(session=replace(client(1), helo="other", port=9))).stored
        assert len(sink.peers) == 1


@both_loops
async def test_probes_are_local_and_serve_no_client() -> None:
    async with Sink(has_proxy_header=True) as sink, relay_to(sink, identity=Identity.PROXY_V2) as bench:
        await bench.start()
        assert (await bench.deliver(session=client(1))).stored
        assert [seen_by(sink, peer) for peer in sink.peers] == [None, client(1).client]
        await sink.until(lambda sink: sink.peers[0].is_closed)
        assert sink.messages[0].peer is sink.peers[1]


@both_loops
async def test_clients_behind_proxied_connections_are_never_mixed() -> None:
    async with (
        Sink(has_proxy_header=True) as sink,
        relay_to(sink, identity=Identity.PROXY_V2, max_connections_per_host=2) as bench,
    ):
        await asyncio.gather(
            *(bench.deliver(f"u{number % 5}@example.org", session=client(number % 5)) for number in range(40))
        )
        assert len(sink.messages) == 40
        for message in sink.messages:
            number = int(message.commands[1][10:11])
            assert seen_by(sink, message.peer) == client(number).client
