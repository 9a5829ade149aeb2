"""listener: whose a connection is. PROXY headers of balancers, limits of the true client, balancers that hide them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from ipaddress import ip_address, ip_network

import pytest

from gateway.adapters.listener import _Arrival
from gateway.session import AddressSource, Session, Trust
from gateway.smtp.client import proxy_v2
from tests.adapters.test_listener import (
    HELLO,
    MAIL,
    MESSAGE,
    RCPT,
    Client,
    FakeTransport,
    World,
    arrive,
    certificates,
    dialogue,
)

BALANCER = "127.0.0.9"
FROM_BALANCER = (ip_network(f"{BALANCER}/32"),)
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\r\n"
V2 = proxy_v2((ip_address("192.0.2.7"), 56324), (ip_address("198.51.100.1"), 25))
LOCAL = proxy_v2(None, (ip_address("198.51.100.1"), 25))


async def balanced(world: World, header: bytes, *, tls: bool = False) -> Client:
    """A connection of the balancer that has sent this."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((BALANCER, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", world.ports[tls]))
    reader, writer = await asyncio.open_connection(sock=sock)
    client = Client(reader, writer)
    world.clients.append(client)
    client.send(header)
    return client


async def session_of(client: Client, world: World) -> Session:
    """The session behind a connection, by a message."""
    await client.greet()
    await client.say(MAIL, RCPT, "DATA")
    client.send(MESSAGE + b".\r\n")
    assert (await client.reply()).startswith("250 2.0.0")
    return world.relay.delivered[-1].tx.session


async def ends_in_silence(client: Client) -> None:
    """The gateway closes or resets the connection without a word."""
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await client.reader.readexactly(1)


def outcomes(world: World) -> dict[str, float]:
    return world.count("proxy_headers")


def refused(world: World) -> list[tuple[object, ...]]:
    lines = [line for line in world.services.log.of("warning") if line.event == "proxy.refused"]
    return [(line.keys["peer"], line.keys["error"]) for line in lines]


# --- the header -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_the_client_is_whom_the_header_names(world: World, header: bytes) -> None:
    client = await balanced(world, header)

    session = await session_of(client, world)

    assert (str(session.client), session.port) == ("192.0.2.7", 56324)
    assert session.address_source is AddressSource.PROXY
    assert b"192.0.2.7" in world.relay.delivered[0].prefix
    assert outcomes(world) == {"proxied": 1}
    (line,) = [line for line in world.services.log.of("info") if line.event == "client.proxied"]
    assert line.keys == {"session": session.id, "client": "192.0.2.7", "peer": BALANCER}
    await client.say("QUIT")
    await world.empty()


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_client_of_ipv6_is_named_and_a_mapped_one_is_ipv4(world: World) -> None:
    for named, expected in [("2001:db8::7", "2001:db8::7"), ("::ffff:192.0.2.7", "192.0.2.7")]:
        client = await balanced(world, f"PROXY TCP6 {named} 2001:db8::1 1 25\r\n".encode())
        assert str((await session_of(client, world)).client) == expected


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_others_connect_directly(world: World) -> None:
    client = await world.connect()

    session = await session_of(client, world)

    assert (str(session.client), session.address_source) == ("127.0.0.1", AddressSource.SOCKET)
    assert outcomes(world) == {}


@pytest.mark.parametrize("settings", [{}, {"proxy_protocol_from": FROM_BALANCER}], ids=["none", "others"])
@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_a_header_of_anybody_else_is_a_violation_of_the_protocol(
    header: bytes, settings: dict[str, object]
) -> None:
    async def main() -> None:
        async with World.started(timed=False, **settings) as world:
            client = await world.connect()
            client.send(header + b"EHLO client.example\r\n")
            said = await client.reader.readuntil(b"\r\n") + await client.reader.readuntil(b"\r\n")
            assert said.startswith(b"220 mx.example.org")
            assert b"\r\n5" in said
            assert outcomes(world) == {}

    asyncio.run(main())


OWN = f"PROXY TCP4 {BALANCER} 198.51.100.1 1 25\r\n".encode()


@pytest.mark.parametrize("header", [LOCAL, OWN], ids=["local", "its-own"])
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_health_check_is_the_balancers_own_session(world: World, header: bytes) -> None:
    client = await balanced(world, header)

    session = await session_of(client, world)

    assert (str(session.client), session.address_source) == (BALANCER, AddressSource.SOCKET)
    assert outcomes(world) == {"local": 1}
    assert [line for line in world.services.log.of("info") if line.event == "client.proxied"] == []


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", LOCAL.replace(b"\x20\x00", b"\x21\x00")])
@dialogue(proxy_protocol_from=FROM_BALANCER, max_connections_per_client=1)
async def test_a_client_that_the_balancer_cannot_name_is_hidden(world: World, header: bytes) -> None:
    client = await balanced(world, header)
    session = await session_of(client, world)
    second = await balanced(world, header)
    await second.greet()

    assert (str(session.client), session.address_source) == (BALANCER, AddressSource.HIDDEN)
    assert outcomes(world) == {"unknown": 2}


@pytest.mark.parametrize("header", [V1, V2, LOCAL], ids=["v1", "v2", "local"])
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_header_may_come_octet_by_octet_and_nothing_is_said_before(
    world: World, header: bytes
) -> None:
    client = await balanced(world, b"")
    for octet in header:
        assert not client.reader._buffer  # type: ignore[attr-defined]
        client.send(bytes([octet]))
        await world.until(lambda: world.listener.arrivals or world.listener.sessions)
        for _ in range(3):
            await asyncio.sleep(0)

    await client.greet()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4112, 100_000])
@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_client_that_speaks_behind_the_header_is_an_early_talker(
    world: World, header: bytes, size: int
) -> None:
    client = await balanced(world, header + b"E" * size)

    assert (await client.rest()).startswith("554 5.5.1")
    client.close()
    await world.empty()
    assert world.count("closed_sessions") == {"early_talker": 1}


@pytest.mark.parametrize(
    "sent",
    [
        b"EHLO client.example\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
        b"PROXY " + b"x" * 200,
        V2[:13] + b"\x13" + V2[14:],
        V2[:14] + b"\xff\xff",
    ],
)
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_what_is_no_header_gets_no_word(world: World, sent: bytes) -> None:
    client = await balanced(world, sent)

    await ends_in_silence(client)
    assert outcomes(world) == {"invalid": 1}
    assert refused(world) == [(BALANCER, "invalid")]
    assert world.count("connections") == {}
    await world.empty()


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_header_that_is_cut_off_is_told_and_a_port_check_is_not(world: World) -> None:
    for header in (V1[:-1], V2[:20], b""):
        client = await balanced(world, header)
        await world.until(lambda: world.listener.arrivals)
        for _ in range(5):
            await asyncio.sleep(0)
        client.writer.write_eof()
        assert await client.rest() == ""

    assert outcomes(world) == {"truncated": 2, "empty": 1}
    assert refused(world) == [(BALANCER, "truncated")] * 2
    await world.empty()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("begin", [b"", V1[:-1]])
@dialogue(timed=True, proxy_protocol_from=FROM_BALANCER)
async def test_a_header_has_10_s(world: World, begin: bytes, tls: bool) -> None:
    client = await balanced(world, begin, tls=tls)
    await world.until(lambda: world.listener.arrivals)
    await world.advance(10)
    assert world.listener.arrivals
    assert not client.reader._buffer  # type: ignore[attr-defined]

    await world.advance(1)

    await world.until(lambda: not world.listener.arrivals)
    assert outcomes(world) == {"timeout": 1}
    assert refused(world) == [(BALANCER, "timeout")]
    await world.empty()


@dialogue(timed=True, proxy_protocol_from=FROM_BALANCER)
async def test_a_late_header_is_good_and_the_session_has_its_whole_time(world: World) -> None:
    client = await balanced(world, b"")
    await world.until(lambda: world.listener.arrivals)
    await world.advance(9)
    client.send(V2)
    await client.greet()
    await world.advance(295)

    assert await client.say("NOOP") == ["250 2.0.0"]


# --- TLS behind the header ------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("is_one_write", [True, False])
@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_the_header_comes_before_the_handshake(world: World, header: bytes, is_one_write: bool) -> None:
    client = await balanced(world, b"", tls=True)
    sock = client.writer.get_extra_info("socket")
    # what the TLS layer writes first goes out together with the header, or behind it
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_one_write)
    client.send(header)
    if not is_one_write:
        await world.until(lambda: world.listener.sessions)
    handshake = asyncio.ensure_future(
        client.writer.start_tls(certificates()[1], server_hostname="mx.example.org")
    )
    for _ in range(20):
        await asyncio.sleep(0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, False)
    await handshake

    session = await session_of(client, world)

    assert (str(session.client), session.address_source) == ("192.0.2.7", AddressSource.PROXY)
    assert session.tls is not None
    assert world.count("tls_handshakes") == {"done": 1}
    await client.say("QUIT")
    await world.empty()


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_starttls_goes_on_behind_a_header(world: World) -> None:
    client = await balanced(world, V2)
    await client.greet()
    await client.starttls()

    assert (await client.say(HELLO))[0].startswith("250")
    assert await client.say(MAIL) == ["250 2.1.0"]


@dialogue()
async def test_unfinished_handshakes_are_connections(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[1])
    client = Client(reader, writer)
    world.clients.append(client)

    await world.until(lambda: world.listener.sessions)

    assert world.services.metrics["mxgate_open_connections", "mx"] == 1
    client.send(b"EHLO client.example\r\n")
    await reader.read()
    await world.empty()
    assert world.count("tls_handshakes") == {"failed": 1}
    assert sum(world.count("closed_sessions").values()) == 1
    assert world.errors == []


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_client"])
def test_unfinished_handshakes_count_towards_the_limits(limit: str) -> None:
    async def main() -> None:
        async with World.started(timed=False, **{limit: 2}) as world:
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[1])
                world.clients.append(Client(reader, writer))
            await world.until(lambda: len(world.listener.sessions) == 2)

            with pytest.raises((ConnectionError, ssl.SSLError)):
                await world.connect(tls=certificates()[1])
            plain = await world.connect()
            assert (await plain.rest()).startswith("421 4.7.0")

            outcome = "limit" if limit == "max_connections" else "client_limit"
            assert world.count("connections") == {"served": 2, outcome: 2}

    asyncio.run(main())


@dialogue(timed=True)
async def test_an_implicit_handshake_that_hangs_is_cut_after_30_s(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[1])
    world.clients.append(Client(reader, writer))
    await world.until(lambda: world.listener.sessions)
    await world.advance(29)
    assert world.listener.sessions

    await world.advance(2)

    await world.empty()
    assert world.count("tls_handshakes") == {"failed": 1}


@dialogue()
async def test_drain_lets_a_handshake_end_and_then_says_goodbye(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[1])
    client = Client(reader, writer)
    world.clients.append(client)
    await world.until(lambda: world.listener.sessions)
    draining = asyncio.ensure_future(world.listener.drain(60))
    await asyncio.sleep(0)

    await writer.start_tls(certificates()[1], server_hostname="mx.example.org")

    assert "421 4.3.2" in await client.rest()
    await draining


# --- limits go by the true address ----------------------------------------------------------------------


def proxied(client: str) -> bytes:
    return f"PROXY TCP4 {client} 198.51.100.1 1 25\r\n".encode()


@dialogue(proxy_protocol_from=FROM_BALANCER, max_connections_per_client=1)
async def test_the_limit_of_a_client_is_the_clients_and_not_the_balancers(world: World) -> None:
    first = await balanced(world, proxied("192.0.2.1"))
    await first.greet()
    other = await balanced(world, proxied("192.0.2.2"))
    await other.greet()

    second = await balanced(world, proxied("192.0.2.1"))
    assert await second.rest() == "421 4.7.0 Too many connections from your address\r\n"
    await first.say("QUIT")
    await world.until(lambda: len(world.listener.sessions) == 1)
    third = await balanced(world, proxied("192.0.2.1"))
    await third.greet()

    assert world.count("connections") == {"served": 3, "client_limit": 1}


@dialogue(proxy_protocol_from=FROM_BALANCER, max_connections=2)
async def test_the_limit_of_connections_counts_those_without_a_header_too(world: World) -> None:
    waiting = await balanced(world, b"")
    await world.until(lambda: world.listener.arrivals)
    await (await balanced(world, V1)).greet()

    refused = [await balanced(world, b""), await world.connect()]
    for client in refused:
        assert (await client.rest()).startswith("421 4.7.0 Too many connections")
    over_tls = await balanced(world, b"", tls=True)
    await ends_in_silence(over_tls)
    waiting.send(V1)
    await waiting.greet()

    assert world.count("connections") == {"served": 2, "limit": 3}


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_trust_goes_by_the_clients_address_and_never_by_the_balancers(world: World) -> None:
    object.__setattr__(
        world.gate.settings, "trusted_networks", (ip_network("127.0.0.0/8"), ip_network("192.0.2.7/32"))
    )
    for header, trust in [
        (proxied("192.0.2.7"), Trust.TRUSTED),
        (proxied("192.0.2.8"), Trust.UNTRUSTED),
    ]:
        client = await balanced(world, header)
        assert (await session_of(client, world)).trust is trust


@dialogue(proxy_protocol_from=FROM_BALANCER, allow_bare_lf_from=(ip_network("192.0.2.7/32"),))
async def test_bare_lf_goes_by_the_clients_address(world: World) -> None:
    for source, answer in [("192.0.2.7", "250 2.0.0"), ("192.0.2.8", "550 5.5.2")]:
        client = await balanced(world, proxied(source))
        await client.begin()
        client.send(b"Subject: x\n\nbody\r\n.\r\n")
        assert (await client.reply())[:9] == answer


@dialogue(timed=True, max_new_connections_per_client_per_minute=2)
async def test_a_client_may_come_so_many_times_a_minute(world: World) -> None:
    for _ in range(2):
        client = await world.greeted()
        await client.say("QUIT")
    third = await world.connect()
    assert await third.rest() == "421 4.7.0 Too many connections from your address\r\n"
    other = await world.connect("127.0.0.2")
    await other.greet()

    await world.advance(120)
    await world.greeted()

    assert world.count("connections") == {"served": 4, "client_rate": 1}


# --- drain ----------------------------------------------------------------------------------------------


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_drain_ends_connections_whose_header_has_not_come(world: World) -> None:
    client = await balanced(world, V1[:10])
    await world.until(lambda: world.listener.arrivals)

    await world.listener.drain(60)

    await ends_in_silence(client)
    assert world.listener.arrivals == set()
    assert refused(world) == []


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_balancer_that_connects_while_we_drain_is_told_so(world: World) -> None:
    world.listener.draining_since = 0.0
    client = await balanced(world, b"")

    assert (await client.rest()).startswith("421 4.3.2")
    assert world.listener.arrivals == set()


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_a_peer_that_is_gone_before_it_is_seen_is_nobody(world: World) -> None:
    transport = FakeTransport(None)
    arrival = _Arrival(world.listener)

    arrival.connection_made(transport)

    assert (transport.ended, transport.written) == ("aborted", b"")
    transport.protocol.connection_lost(None)
    assert outcomes(world) == {}


# --- a balancer that hides its clients ------------------------------------------------------------------


def hellos(world: World, address: str, count: int) -> None:
    """Clients of this address that come, say EHLO and go."""
    for _ in range(count):
        connection, _ = arrive(world, (address, 1234))
        connection.data_received(b"EHLO client.example\r\n")
        connection.connection_lost(None)


@dialogue(timed=True, max_connections_per_client=1, max_new_connections_per_client_per_minute=100)
async def test_most_clients_from_one_private_address_are_hidden_clients(world: World) -> None:
    hellos(world, "10.0.0.1", 100)
    await world.advance(1)

    here = [arrive(world, ("10.0.0.1", port)) for port in range(3)]
    direct = [arrive(world, ("192.0.2.1", port)) for port in range(2)]

    sources = [connection._conversation.session.address_source for connection, _ in here]
    assert sources == [AddressSource.HIDDEN] * 3
    assert direct[0][0]._conversation.session.address_source is AddressSource.SOCKET
    assert direct[1][1].written.startswith(b"421 "), "limits of others stay"
    assert world.listener.state() == {"hidden_by": "10.0.0.1"}
    assert world.services.metrics["mxgate_source_hidden", "mx"] == 1
    assert world.services.metrics["mxgate_source_share", "mx"] == 1
    for connection, _ in (*here, *direct):
        connection.connection_lost(None)


@dialogue(timed=True)
async def test_it_is_told_once_when_it_begins_and_once_when_it_ends(world: World) -> None:
    hellos(world, "10.0.0.1", 150)
    await world.advance(5)
    hellos(world, "198.51.100.1", 50)
    await world.advance(5)

    assert [
        (line.level, line.event, line.keys)
        for line in world.services.log.lines
        if line.event.startswith("client.")
    ] == [
        ("warning", "client.hidden", {"peer": "10.0.0.1", "share": 1.0}),
        ("info", "client.visible", {"peer": "10.0.0.1", "share": 0.75}),
    ]
    assert world.services.metrics["mxgate_source_hidden", "mx"] == 0
    assert world.services.metrics["mxgate_source_share", "mx"] == 0.75
    assert world.listener.state() == {"hidden_by": ""}


@dialogue(timed=True)
async def test_connections_that_say_no_ehlo_are_no_clients(world: World) -> None:
    for _ in range(200):
        arrive(world, ("10.0.0.1", 1234))[0].connection_lost(None)
    await world.advance(1)

    assert world.listener.watch.share == 0


@dialogue(proxy_protocol_from=FROM_BALANCER)
async def test_clients_of_a_header_are_not_watched(world: World) -> None:
    for header in (proxied("10.0.0.1"), LOCAL, b"PROXY UNKNOWN\r\n"):
        for _ in range(101):
            client = await balanced(world, header)
            await client.greet()
            client.close()

    assert len(world.listener.watch._recent) == 0


@dialogue()
async def test_a_client_is_seen_once_however_often_it_says_ehlo(world: World) -> None:
    connection, _ = arrive(world, ("10.0.0.1", 1234))
    for _ in range(5):
        connection.data_received(b"EHLO client.example\r\n")

    assert len(world.listener.watch._recent) == 1
    connection.connection_lost(None)
