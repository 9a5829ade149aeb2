"""listener: sessions over loopback sockets, in both event loops; what needs time is moved by a fake loop time."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any, Concatenate, ParamSpec

import pytest
import trustme
import uvloop

from gateway.adapters.listener import Connection, Listener, ListenerSettings, _tls_class
from gateway.debugging import Debugging
from gateway.gatekeeper import Conversation, Gatekeeper, GatekeeperSettings
from gateway.mail.body import Spool
from gateway.policy import Outcome
from gateway.session import TlsInfo
from gateway.smtp.reply import Reply
from gateway.smtp.server import Server, ServerSettings
from gateway.verdict import Stage, reject
from tests.fakes import STORED, FakeLog, FakeRelay, FakeServices, LoopTime, Says, pipeline_of

P = ParamSpec("P")

HELLO = "EHLO client.example"
MAIL = "MAIL FROM:<a@client.example>"
RCPT = "RCPT TO:<b@example.org>"
MESSAGE = b"Subject: x\r\n\r\nbody\r\n"
NEVER = Reply(550, "5.7.1", "Never")


# --- the world ----------------------------------------------------------------------------------------------


@functools.cache
def certificates() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's context, and that of a client who trusts it."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("mx.example.org").configure_cert(server)
    authority.configure_trust(client)
    return server, client


class FixedTls:
    """A certificate that never changes."""

    def __init__(self) -> None:
        self.context = certificates()[0]
        self.looked = 0

    def refresh(self) -> None:
        self.looked += 1


class Client:
    """A client that says what a test wants and reads replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self) -> str:
        """The next reply's last line, without CRLF."""
        while True:
            line = await self.reader.readuntil(b"\r\n")
            if line[3:4] == b" ":
                return line[:-2].decode("ascii")

    async def say(self, *lines: str) -> list[str]:
        """Lines in one write; as many replies as lines, each by its code and enhanced code."""
        self.send("".join(f"{line}\r\n" for line in lines).encode("ascii"))
        return [(await self.reply())[:9] for _ in lines]

    async def rest(self) -> str:
        """Everything until the server closes."""
        return (await self.reader.read()).decode("ascii")

    async def greet(self) -> None:
        assert (await self.reply()).startswith("220 mx.example.org")
        assert (await self.say(HELLO))[0].startswith("250 ")

    async def begin(self) -> None:
        """Up to the reply that asks for content."""
        await self.greet()
        assert [r[:3] for r in await self.say(MAIL, RCPT, "DATA")] == ["250", "250", "354"]

    async def starttls(self, context: ssl.SSLContext | None = None) -> None:
        assert await self.say("STARTTLS") == ["220 2.0.0"]
        await self.writer.start_tls(context or certificates()[1], server_hostname="mx.example.org")

    def reset(self) -> None:
        """Leave without a word: the server's kernel gets RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.transport.abort()


class World:
    """A listener on two loopback ports with everything behind it, fakes where sockets would be."""

    def __init__(self, *, timed: bool, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.time = LoopTime(loop)
        if timed:
            loop.time = self.time  # type: ignore[method-assign]
        self.services = FakeServices()
        self.says = Says()
        self.relay = FakeRelay()
        self.spool = Spool(memory_bytes=10_000)
        self.tls = FixedTls()
        self.clients: list[Client] = []
        ids = iter(range(1000))
        pipeline = pipeline_of(self.services, self.says)
        self.gate = Gatekeeper(
            GatekeeperSettings("mx.example.org"),
            pipeline,
            self.relay,
            self.spool,
            self.services,
            lambda: f"T{next(ids)}",
        )
        commands = settings.pop("max_commands_without_mail", 100)
        self.listener = Listener(
            ListenerSettings(**settings),
            ServerSettings("mx.example.org", has_tls=True, max_commands_without_mail=commands),
            self.gate,
            self.services,
            self.tls,
        )
        self.ports: list[int] = []

    @classmethod
    @asynccontextmanager
    async def started(cls, *, timed: bool, **settings: Any) -> AsyncIterator[World]:
        world = cls(timed=timed, **settings)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        world.ports = [sock.getsockname()[1] for sock in sockets]
        await world.listener.start(sockets[:1], sockets[1:])
        try:
            yield world
        finally:
            for client in world.clients:
                client.close()
            await world.listener.drain(0)
        await world.empty()

    async def connect(self, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Client:
        """A client that has connected; nothing was said."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.ports[tls is not None],
            local_addr=(source, 0),
            ssl=tls,
            server_hostname="mx.example.org" if tls else None,
        )
        client = Client(reader, writer)
        self.clients.append(client)
        return client

    async def greeted(self) -> Client:
        client = await self.connect()
        await client.greet()
        return client

    async def until(self, is_so: Callable[[], object]) -> None:
        """Turn the loop until it is so."""
        for _ in range(100_000):
            if is_so():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never came to that")

    async def empty(self) -> None:
        """Until no session is left; then there must be nothing else left either."""
        await self.until(lambda: not self.listener.sessions)
        await self.until(lambda: self.spool.used_bytes == 0)
        assert not any(self.listener.counts._words[self.listener.counts._open :])
        assert self.listener.counts.total == 0
        assert self.services.metrics["mxgate_open_connections", "mx"] == 0

    async def advance(self, seconds: float) -> None:
        """Let time pass; the sweep looks at each second of it."""
        for _ in range(int(seconds)):
            self.time.advance(1)
            for _ in range(3):
                await asyncio.sleep(0)

    def count(self, name: str) -> dict[str, float]:
        return {key[0]: value for key, value in self.services.metrics.of(f"mxgate_{name}_total").items()}

    @property
    def messages(self) -> list[bytes]:
        return [d.message.partition(b"+0000\r\n")[2] for d in self.relay.delivered]

    @property
    def errors(self) -> list[str]:
        return [line.event for line in self.services.log.of("error")]


Test = Callable[Concatenate[World, P], Coroutine[Any, Any, None]]
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def dialogue(*, timed: bool = False, **settings: Any) -> Callable[[Test[P]], Callable[..., None]]:
    """A test gets a World with these listener settings, in each loop; `timed`: in asyncio's, with its fake time."""

    def decorate(test: Test[P]) -> Callable[..., None]:
        async def main(*args: P.args, **kwargs: P.kwargs) -> None:
            async with World.started(timed=timed, **settings) as world:
                await test(world, *args, **kwargs)

        @functools.wraps(test)
        def run(loop_name: str, *args: P.args, **kwargs: P.kwargs) -> None:
            with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
                runner.run(main(*args, **kwargs))

        own = list(inspect.signature(test).parameters.values())[1:]
        loop_name = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([loop_name, *own])  # type: ignore[attr-defined]  # pytest reads it
        return pytest.mark.parametrize("loop_name", ["asyncio"] if timed else LOOPS)(run)

    return decorate


# --- the dialogue -------------------------------------------------------------------------------------------


@dialogue()
async def test_a_message_from_greeting_to_quit(world: World) -> None:
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE + b".\r\n")

    assert await client.reply() == "250 2.0.0 Stored as 1"
    assert await client.say("QUIT") == ["221 2.0.0"]
    assert await client.rest() == ""

    assert world.messages == [MESSAGE]
    await world.empty()
    await world.listener.drain(0)
    assert world.count("replies") == {"220": 1, "250": 4, "354": 1, "221": 1}
    assert world.count("connections") == {"served": 1}
    assert world.count("closed_sessions") == {"quit": 1}


@dialogue()
async def test_a_session_that_is_over_is_not_left_for_the_garbage_collector(world: World) -> None:
    def sessions() -> list[Connection]:
        found = [each for each in gc.get_objects() if isinstance(each, Connection)]
        return [each for each in found if each._listener is world.listener]

    gc.disable()
    try:
        client = await world.greeted()
        assert len(sessions()) == 1
        await client.say("QUIT")
        client.close()
        await world.empty()
        await asyncio.sleep(0)
        assert sessions() == []
    finally:
        gc.enable()


@dialogue()
async def test_a_pipelined_group_is_answered_in_one_write(world: World) -> None:
    client = await world.greeted()

    client.send(f"{MAIL}\r\n{RCPT}\r\nRCPT TO:<c@example.org>\r\nDATA\r\n".encode())

    replies = await client.reader.read(10_000)
    assert [line[:3] for line in replies.splitlines()] == [b"250", b"250", b"250", b"354"]
    assert world.relay.asked == [("b@example.org", "c@example.org")]


@dialogue()
async def test_a_pipelined_group_is_answered_in_order_when_the_downstream_takes_its_time(
    world: World,
) -> None:
    world.relay.verify_gate = asyncio.Event()
    client = await world.greeted()
    client.send(f"{MAIL}\r\n{RCPT}\r\nNOOP\r\nQUIT\r\n".encode())
    await world.relay.called.wait()

    world.relay.verify_gate.set()

    assert [line[:9] for line in (await client.rest()).splitlines()] == [
        "250 2.1.0",
        "250 2.1.5",
        "250 2.0.0",
        "221 2.0.0",
    ]


@dialogue()
async def test_content_may_come_octet_by_octet_and_in_chunks(world: World) -> None:
    client = await world.greeted()
    await client.say(MAIL, RCPT)
    client.send(b"BDAT 5\r\nSubje")
    assert await client.reply() == "250 2.0.0 5 octets received"
    client.send(b"BDAT %d LAST\r\n" % (len(MESSAGE) - 5))
    for octet in MESSAGE[5:]:
        client.send(bytes([octet]))
        await asyncio.sleep(0)

    assert await client.reply() == "250 2.0.0 Stored as 1"
    assert world.messages == [MESSAGE]


@dialogue()
async def test_a_large_message_is_delivered_as_it_came(world: World) -> None:
    message = b"Subject: x\r\n\r\n" + b"".join(b"line %d\r\n" % n for n in range(100_000))
    client = await world.connect()
    await client.begin()

    client.send(message + b".\r\n")

    assert await client.reply() == "250 2.0.0 Stored as 1"
    assert world.messages == [message]


@dialogue()
async def test_rset_and_ehlo_give_up_the_open_transaction(world: World) -> None:
    client = await world.greeted()
    for command in ("RSET", HELLO):
        await client.say(MAIL, RCPT)
        assert (await client.say(command))[0].startswith("250")

    assert world.count("transactions") == {"aborted": 2}


@pytest.mark.parametrize("ending", ["QUIT", "RSET", "STARTTLS", "lost"])
@dialogue()
async def test_nothing_of_a_session_waits_for_the_cycle_collector(world: World, ending: str) -> None:
    def alive() -> list[object]:
        return [each for each in gc.get_objects() if type(each) in (Connection, Conversation, Server)]

    gc.collect()
    before = alive()  # what other tests have left
    gc.disable()
    try:
        client = await world.greeted()
        await client.say(MAIL, RCPT)
        if ending != "lost":
            client.send(f"{ending}\r\n".encode())
        client.writer.close()
        await world.empty()
        await asyncio.sleep(0)
        left = alive()
    finally:
        gc.enable()
    assert [each for each in left if not any(each is other for other in before)] == []


@dialogue()
async def test_helo_announces_nothing(world: World) -> None:
    client = await world.connect()
    await client.reply()
    client.send(b"HELO client.example\r\n")

    assert await client.reply() == "250 mx.example.org"


@dialogue()
async def test_policies_may_refuse_at_every_stage(world: World) -> None:
    closing = reject("listed", NEVER, close=True)
    for stage, said in [(Stage.CONNECT, []), (Stage.EHLO, [HELLO]), (Stage.MAIL, [HELLO, MAIL])]:
        world.says.verdicts = {stage: closing}
        client = await world.connect()
        for line in said:
            await client.reply()
            client.send(f"{line}\r\n".encode())
        assert await client.reply() == "550 5.7.1 Never"
        assert await client.rest() == ""
    assert world.count("closed_sessions") == {"refused": 3}


@dialogue(allow_bare_lf_from=(ip_network("127.0.0.2/32"),))
async def test_bare_lf_is_repaired_for_listed_clients_only(world: World) -> None:
    for source, answer in [("127.0.0.1", "550 5.5.2"), ("127.0.0.2", "250 2.0.0")]:
        client = await world.connect(source)
        await client.begin()
        client.send(b"Subject: x\n\nbody\r\n.\r\n")
        assert (await client.reply())[:9] == answer

    assert world.messages == [MESSAGE]


@dialogue()
async def test_the_outcome_is_told_once_for_each_message_also_when_nothing_had_to_wait(world: World) -> None:
    client = await world.greeted()
    for _ in range(2):
        await client.say(MAIL, RCPT, "DATA")
        client.send(MESSAGE + b".\r\n")
        await client.reply()
    world.says.verdicts = {Stage.EOM: reject("spam", NEVER)}
    await client.say(MAIL, RCPT, "DATA")
    client.send(MESSAGE + b".\r\n")
    await client.reply()

    stored, refused = Outcome(STORED, delivered=True), Outcome(NEVER, delivered=False)
    assert [(tx.id, told) for tx, told in world.says.told] == [
        ("T0-1", stored),
        ("T0-2", stored),
        ("T0-3", refused),
    ]


@dialogue()
async def test_the_outcome_of_messages_in_one_write_is_told_for_each(world: World) -> None:
    client = await world.greeted()
    chunk = MESSAGE.decode()
    one = f"{MAIL}\r\n{RCPT}\r\nBDAT {len(chunk)} LAST\r\n{chunk}"

    client.send((one * 3 + "QUIT\r\n").encode())
    await client.rest()

    assert [tx.id for tx, _ in world.says.told] == ["T0-1", "T0-2", "T0-3"]


@dialogue()
async def test_the_outcome_is_told_behind_the_reply_and_delays_nobody(world: World) -> None:
    gate = asyncio.Event()
    told = []

    async def wait(tx: object, outcome: object) -> None:
        await gate.wait()
        told.append(tx)

    world.says.on_outcome = wait  # type: ignore[method-assign]
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE + b".\r\n")
    await client.reply()
    assert await client.say("NOOP", "QUIT") == ["250 2.0.0", "221 2.0.0"]
    draining = asyncio.ensure_future(world.listener.drain(60))
    await world.until(lambda: not world.listener.sessions)
    assert not draining.done(), "drain waits for it"

    gate.set()

    await draining
    assert len(told) == 1


# --- limits of connections ------------------------------------------------------------------------------------


@dialogue(max_connections=2)
async def test_as_many_connections_as_the_limit_and_no_more(world: World) -> None:
    first = await world.greeted()
    await world.greeted()

    third = await world.connect()
    assert await third.rest() == "421 4.7.0 Too many connections, try again later\r\n"
    await first.say("QUIT")
    await world.until(lambda: len(world.listener.sessions) == 1)
    await world.greeted()

    assert world.count("connections") == {"served": 3, "limit": 1}
    assert world.services.metrics["mxgate_open_connections", "mx"] == 2


@dialogue(max_connections_per_client=1)
async def test_as_many_connections_of_one_client_as_the_limit_and_no_more(world: World) -> None:
    first = await world.greeted()

    second = await world.connect()
    assert await second.rest() == "421 4.7.0 Too many connections from your address\r\n"
    other = await world.connect("127.0.0.2")
    await other.greet()
    await first.say("QUIT")
    await world.until(lambda: len(world.listener.sessions) == 1)
    await world.greeted()

    assert world.count("connections") == {"served": 3, "client_limit": 1}


class FakeTransport(asyncio.Transport):
    """Enough of a transport for a connection that says nothing."""

    def __init__(self, peer: tuple[str, int] | None) -> None:
        super().__init__({"peername": peer})
        self.written = b""
        self.ended = ""
        self.protocol: asyncio.BaseProtocol = asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = self.ended or "aborted"


def arrive(world: World, peer: tuple[str, int] | None) -> tuple[Connection, FakeTransport]:
    connection, transport = Connection(world.listener), FakeTransport(peer)
    connection.connection_made(transport)
    return connection, transport


@dialogue(max_connections_per_client=1)
async def test_an_ipv6_client_is_its_64_bits_and_a_mapped_one_is_ipv4(world: World) -> None:
    here: list[Connection] = []
    for address, is_served in [
        ("2001:db8::1", True),
        ("2001:db8::ffff:1", False),
        ("2001:db8:0:1::1", True),
        ("fe80::1%eth0", True),
        ("192.0.2.1", True),
        ("::ffff:192.0.2.1", False),
        ("::ffff:192.0.2.2", True),
    ]:
        connection, transport = arrive(world, (address, 1234))
        assert transport.written[:3] == (b"220" if is_served else b"421"), address
        assert transport.is_closing() is not is_served
        here.append(connection)

    for connection in here:
        connection.connection_lost(None)
    assert world.listener.counts.total == 0


@dialogue()
async def test_a_connection_that_is_gone_before_it_is_seen_is_nobody(world: World) -> None:
    connection, transport = arrive(world, None)

    assert (transport.ended, transport.written) == ("aborted", b"")
    connection.connection_lost(None)
    assert world.count("connections") == {}


# --- greeting delay -------------------------------------------------------------------------------------------


@dialogue(timed=True, greeting_delay_s=2.0)
async def test_a_patient_client_is_greeted_after_the_delay(world: World) -> None:
    client = await world.connect()
    await world.until(lambda: world.listener.sessions)
    await world.advance(1)
    assert not client.reader._buffer  # type: ignore[attr-defined]

    await world.advance(1)

    await client.greet()


@dialogue(timed=True, greeting_delay_s=2.0)
async def test_who_speaks_before_the_greeting_is_refused(world: World) -> None:
    client = await world.connect()
    await world.until(lambda: world.listener.sessions)
    client.send(b"EHLO client.example\r\nMAIL FROM:<>\r\n")
    await world.advance(1)
    assert world.listener.sessions

    await world.advance(1)

    assert (await client.rest()).startswith("554 5.5.1")
    client.close()
    await world.empty()
    assert world.count("closed_sessions") == {"early_talker": 1}
    (line,) = world.services.log.of("info")
    assert (line.event, line.keys) == (
        "session.ended",
        {"session": "T0", "client": "127.0.0.1", "helo": "", "reason": "early_talker"},
    )


@dialogue(timed=True, max_connections_per_client=1)
async def test_who_is_turned_away_has_a_line_but_cannot_flood_the_log(world: World) -> None:
    await world.greeted()
    for _ in range(30):
        await (await world.connect()).rest()
    lines = world.services.log.of("info")
    assert len(lines) == 20
    assert (lines[0].event, lines[0].keys) == (
        "connection.refused",
        {"client": "127.0.0.1", "reason": "client_limit"},
    )
    await world.advance(1)
    (untold,) = world.services.log.of("warning")
    assert (untold.event, untold.keys) == ("session.untold", {"count": 10})
    await (await world.connect()).rest()
    assert len(world.services.log.of("info")) == 21


@dialogue()
async def test_a_client_that_is_debugged_is_heard_in_full_but_for_its_content(world: World) -> None:
    log = FakeLog()
    world.listener.debugging = Debugging(log, [ip_network("127.0.0.0/8")])
    client = await world.greeted()
    await client.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "DATA")
    await client.say("Subject: secret\r\n.")
    await client.say("QUIT")
    await world.until(lambda: not world.listener.sessions)
    told = [(line.keys["side"], str(line.keys["line"])[:12]) for line in log.lines]
    assert ("client", "MAIL FROM:<a") in told
    assert told.index(("client", "RCPT TO:<b@e")) < told.index(("gateway", "354 End data"))
    assert told[-2:] == [("client", "QUIT"), ("gateway", "221 2.0.0 By")]
    assert "secret" not in str(log.lines)


@dialogue(timed=True, greeting_delay_s=2.0)
async def test_who_leaves_before_the_greeting_leaves_nothing(world: World) -> None:
    client = await world.connect()
    await world.until(lambda: world.listener.sessions)
    client.reset()
    await world.empty()

    await world.advance(3)

    assert world.errors == []
    assert world.count("replies") == {}


# --- TLS ------------------------------------------------------------------------------------------------------


@dialogue()
async def test_a_session_may_go_on_under_tls(world: World) -> None:
    client = await world.greeted()
    await client.starttls()

    client.send(b"EHLO client.example\r\n")
    announced = (await client.reader.readuntil(b"250 LIMITS RCPTMAX=200\r\n")).decode()
    assert "STARTTLS" not in announced
    assert await client.say("STARTTLS") == ["503 5.5.1"]
    await client.say(MAIL, RCPT, "DATA")
    client.send(MESSAGE + b".\r\n")
    await client.reply()

    (delivered,) = world.relay.delivered
    assert delivered.tx.session.tls is not None
    assert b"with ESMTPS id T0-1\r\n\t(TLSv1.3 " in delivered.prefix
    assert world.count("tls_handshakes") == {"done": 1}
    assert world.services.metrics.of("mxgate_tls_sessions_total") == {("TLSv1.3", "aes_gcm"): 1}
    await client.say("QUIT")
    await world.empty()


@pytest.mark.parametrize(
    ("tls", "found"),
    [
        (("TLSv1.3", "TLS_AES_256_GCM_SHA384"), ("TLSv1.3", "aes_gcm")),
        (("TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256"), ("TLSv1.3", "chacha20_poly1305")),
        (("TLSv1.3", "TLS_AES_128_CCM_8_SHA256"), ("TLSv1.3", "aes_ccm")),
        (("TLSv1.2", "ECDHE-RSA-CHACHA20-POLY1305"), ("TLSv1.2", "chacha20_poly1305")),
        (("TLSv1.2", "ECDHE-RSA-AES128-SHA256"), ("TLSv1.2", "cbc")),
        (("TLSv1.2", "AES256-SHA"), ("TLSv1.2", "cbc")),
        (("TLSv1.4", "NEWHOPE"), ("other", "other")),
    ],
)
def test_ciphers_have_families(tls: tuple[str, str], found: tuple[str, str]) -> None:
    assert _tls_class(TlsInfo(*tls)) == found


@dialogue()
async def test_commands_are_counted_by_their_verb(world: World) -> None:
    client = await world.greeted()
    client.send(b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\n")
    for _ in range(3):
        await client.reply()
    await client.say("NONSENSE", "RCPT TO:nobody", "QUIT")
    await world.empty()
    world.listener._count_replies()
    assert world.services.metrics.of("mxgate_clients_total") == {("loopback",): 1}
    assert world.services.metrics.of("mxgate_commands_total") == {
        ("ehlo",): 1,
        ("mail",): 1,
        ("rcpt",): 2,
        ("invalid",): 2,
        ("quit",): 1,
    }


@dialogue()
async def test_nothing_said_before_tls_counts_after_it(world: World) -> None:
    client = await world.greeted()
    await client.starttls()

    assert await client.say(MAIL, "DATA") == ["503 5.5.1", "503 5.5.1"]


@dialogue()
async def test_plaintext_behind_starttls_closes_the_session(world: World) -> None:
    client = await world.greeted()

    client.send(b"STARTTLS\r\nMAIL FROM:<evil@client.example>\r\n")

    assert await client.rest() == ""
    client.close()
    await world.empty()
    assert world.count("closed_sessions") == {"plaintext_behind_starttls": 1}
    assert world.says.transactions == []


@dialogue()
async def test_a_handshake_that_fails_ends_the_session(world: World) -> None:
    client = await world.greeted()
    await client.say("STARTTLS")

    client.send(b"MAIL FROM:<evil@client.example>\r\n" * 10)

    await client.reader.read()
    await world.empty()
    assert world.count("tls_handshakes") == {"failed": 1}
    assert sum(world.count("closed_sessions").values()) == 1
    assert world.errors == []


@dialogue()
async def test_a_client_that_does_not_trust_us_ends_the_session(world: World) -> None:
    client = await world.greeted()
    with pytest.raises(ssl.SSLError):
        await client.starttls(ssl.create_default_context())
    client.close()

    await world.empty()
    assert world.errors == []


@pytest.mark.parametrize("how", ["reset", "eof"])
@dialogue()
async def test_a_client_that_leaves_in_the_middle_of_the_handshake_leaves_nothing(
    world: World, how: str
) -> None:
    client = await world.greeted()
    await client.say("STARTTLS")
    client.send(b"\x16\x03\x01\x02")
    await asyncio.sleep(0)

    if how == "reset":
        client.reset()
    else:
        client.writer.write_eof()

    await world.empty()
    assert world.count("tls_handshakes") == {"failed": 1}
    assert sum(world.count("closed_sessions").values()) == 1
    assert world.errors == []


@dialogue(timed=True)
async def test_a_handshake_that_hangs_is_cut_after_30_s(world: World) -> None:
    client = await world.greeted()
    await client.say("STARTTLS")
    await world.advance(29)
    assert world.listener.sessions

    await world.advance(2)

    await world.empty()
    assert world.count("tls_handshakes") == {"failed": 1}


@dialogue()
async def test_implicit_tls_begins_with_the_handshake(world: World) -> None:
    client = await world.connect(tls=certificates()[1])
    await client.begin()
    client.send(MESSAGE + b".\r\n")
    assert await client.reply() == "250 2.0.0 Stored as 1"
    assert await client.say("STARTTLS", "QUIT") == ["503 5.5.1", "221 2.0.0"]

    assert b"with ESMTPS" in world.relay.delivered[0].prefix
    await world.empty()


@dialogue(timed=True)
async def test_there_need_be_no_tls_and_a_listener_need_not_be_started(world: World) -> None:
    plain = Listener(
        world.listener.settings, ServerSettings("mx.example.org"), world.gate, world.services, None
    )
    await plain.drain(0)
    await plain.start([], [])
    await world.advance(3)
    await plain.drain(0)


@dialogue(timed=True)
async def test_the_certificate_is_looked_at_each_second(world: World) -> None:
    await world.advance(3)

    assert world.tls.looked == 3


# --- time -----------------------------------------------------------------------------------------------------


@dialogue(timed=True)
async def test_an_idle_session_is_closed_after_300_s(world: World) -> None:
    client = await world.greeted()
    await world.advance(299)
    assert await client.say("NOOP") == ["250 2.0.0"]
    await world.advance(299)
    assert world.listener.sessions

    await world.advance(4)

    assert (await client.rest()).startswith("421 4.4.2")
    await world.empty()
    assert world.count("closed_sessions") == {"timeout": 1}


@dialogue(timed=True)
async def test_a_command_has_60_s_however_often_an_octet_comes(world: World) -> None:
    client = await world.greeted()
    for _ in range(6):
        client.send(b"N")
        await world.advance(10)
    assert world.listener.sessions

    await world.advance(3)

    assert (await client.rest()).startswith("421 4.4.2")


@dialogue(timed=True)
async def test_content_has_180_s_for_each_block(world: World) -> None:
    client = await world.connect()
    await client.begin()
    for _ in range(3):
        client.send(b"x" * 5000 + b"\r\n" * 10_000)
        await world.advance(179)
    assert world.listener.sessions

    await world.advance(4)

    assert (await client.rest()).startswith("421 4.4.2")
    await world.empty()
    assert world.messages == []
    assert world.count("transactions") == {"aborted": 1}


@dialogue(timed=True)
async def test_content_has_its_180_s_from_our_354_on(world: World) -> None:
    world.relay.verify_gate = asyncio.Event()
    client = await world.greeted()
    client.send(f"{MAIL}\r\n{RCPT}\r\nDATA\r\n".encode())
    await world.relay.called.wait()
    await world.advance(179)
    world.relay.verify_gate.set()
    for _ in range(3):
        await client.reply()

    await world.advance(55)
    client.send(MESSAGE + b".\r\n")

    assert await client.reply() == "250 2.0.0 Stored as 1"


@dialogue(timed=True)
async def test_content_that_trickles_is_not_waited_for(world: World) -> None:
    client = await world.connect()
    await client.begin()
    for _ in range(58):
        client.send(b"x")
        await world.advance(1)
    assert world.listener.sessions

    await world.advance(3)

    assert (await client.rest()).startswith("421 4.4.2")


@dialogue(timed=True, session_timeout_s=100.0)
async def test_a_session_has_its_time_but_content_and_answers_are_not_cut_by_it(world: World) -> None:
    world.relay.deliver_gate = asyncio.Event()
    talker = await world.greeted()
    sender = await world.connect()
    await sender.begin()
    for _ in range(4):
        await talker.say("NOOP")
        sender.send(b"x" * 5000 + b"\r\n")
        await world.advance(30)

    assert (await talker.rest()).startswith("421 4.4.2")
    sender.send(b".\r\n")
    await world.relay.called.wait()
    await world.advance(400)
    world.relay.deliver_gate.set()
    assert await sender.reply() == "250 2.0.0 Stored as 1"
    await world.advance(3)
    assert (await sender.rest()).startswith("421 4.4.2")


# --- back-pressure ----------------------------------------------------------------------------------------------


def transport_of(world: World) -> asyncio.ReadTransport:
    (connection,) = world.listener.sessions
    return connection._transport


@dialogue()
async def test_input_that_piles_up_while_an_answer_is_awaited_is_not_read(world: World) -> None:
    world.relay.verify_gate = asyncio.Event()
    client = await world.greeted()
    client.send(f"{MAIL}\r\n{RCPT}\r\n".encode())
    await world.relay.called.wait()
    client.send(b"DATA\r\n" + b"x" * 3_000_000)
    await world.until(lambda: not transport_of(world).is_reading())
    for _ in range(50):
        await asyncio.sleep(0)
    (connection,) = world.listener.sessions
    assert connection._server.buffered_bytes < 600_000

    world.relay.verify_gate.set()

    assert "554 5.5.1" in await client.rest()


@dialogue(max_commands_without_mail=10**9)
async def test_a_client_that_never_reads_is_not_read_either_and_loses_nothing(world: World) -> None:
    client = await world.connect()
    await client.greet()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a StreamWriter's is a Transport
    sent = 0
    while transport_of(world).is_reading() and sent < 1_000_000:
        client.send(b"HELP\r\n" * 1000)
        sent += 1000
        for _ in range(20):
            await asyncio.sleep(0)
    assert not transport_of(world).is_reading()

    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    client.send(b"QUIT\r\n")

    replies = (await client.rest()).splitlines()
    assert len(replies) == sent + 1
    assert {line[:3] for line in replies[:-1]} == {"214"}
    assert replies[-1].startswith("221")


@dialogue(timed=True, max_commands_without_mail=10**9)
async def test_a_client_that_never_reads_does_not_keep_its_session(world: World) -> None:
    client = await world.connect()
    await client.greet()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    while transport_of(world).is_reading():
        client.send(b"HELP\r\n" * 1000)
        for _ in range(20):
            await asyncio.sleep(0)

    await world.advance(300)
    assert world.listener.sessions
    await world.advance(40)

    await world.empty()
    assert world.count("closed_sessions") == {"timeout": 1}


@dialogue(timed=True, max_commands_without_mail=10**9)
async def test_a_client_that_reads_again_in_time_gets_all_replies_and_the_last_one(world: World) -> None:
    client = await world.connect()
    await client.greet()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    while transport_of(world).is_reading():
        client.send(b"HELP\r\n" * 1000)
        for _ in range(20):
            await asyncio.sleep(0)
    await world.advance(302)

    client.writer.transport.resume_reading()  # type: ignore[attr-defined]

    assert (await client.rest()).endswith("421 4.4.2 Timeout, closing the connection\r\n")
    await world.empty()


@dialogue(timed=True)
async def test_a_session_that_we_ended_lingers_for_a_moment_and_no_longer(world: World) -> None:
    client = await world.greeted()
    client.send(b"GET / HTTP/1.1\r\n")
    assert (await client.rest()).startswith("554 5.5.1")
    assert world.listener.sessions
    client.send(b"and so on\r\n" * 1000)
    await world.advance(2)
    assert world.listener.sessions

    await world.advance(3)

    await world.empty()


# --- drain --------------------------------------------------------------------------------------------------------


@dialogue()
async def test_drain_closes_idle_sessions_and_takes_no_new_ones(world: World) -> None:
    idle = await world.greeted()
    in_transaction = await world.greeted()
    await in_transaction.say(MAIL, RCPT)
    in_command = await world.greeted()
    in_command.send(b"NOO")
    await world.until(lambda: any(c._server.buffered_bytes for c in world.listener.sessions))

    await world.listener.drain(60)

    for client in (idle, in_transaction, in_command):
        assert await client.rest() == "421 4.3.2 Service is shutting down, try again later\r\n"
    with pytest.raises(OSError, match=r"refused|failed"):
        await world.connect()
    assert world.count("closed_sessions") == {"drain": 3}


@dialogue()
async def test_a_connection_that_was_accepted_while_we_drain_is_told_so(world: World) -> None:
    world.listener.draining_since = 0.0
    client = await world.connect()

    assert (await client.rest()).startswith("421 4.3.2")
    assert world.listener.sessions == set()


@dialogue()
async def test_drain_lets_content_and_delivery_finish(world: World) -> None:
    world.relay.deliver_gate = asyncio.Event()
    sending, delivering = await world.connect(), await world.connect()
    await sending.begin()
    sending.send(b"Subject: x\r\n")
    await delivering.begin()
    delivering.send(MESSAGE + b".\r\n")
    await world.relay.called.wait()
    draining = asyncio.ensure_future(world.listener.drain(60))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(world.listener.sessions) == 2

    sending.send(b"\r\nbody\r\n.\r\n")
    world.relay.deliver_gate.set()
    await draining

    for client in (sending, delivering):
        assert [line[:9] for line in (await client.rest()).splitlines()] == ["250 2.0.0", "421 4.3.2"]
    assert world.messages == [MESSAGE, MESSAGE]
    assert world.spool.used_bytes == 0


@dialogue(timed=True)
async def test_drain_waits_30_s_for_content(world: World) -> None:
    client = await world.connect()
    await client.begin()
    draining = asyncio.ensure_future(world.listener.drain(300))
    for _ in range(6):
        client.send(b"x" * 3000 + b"\r\n")
        await world.advance(5)
    assert world.listener.sessions

    await world.advance(2)
    await draining

    assert (await client.rest()).startswith("421 4.3.2")
    assert world.count("closed_sessions") == {"drain": 1}
    await world.empty()


@dialogue(timed=True, greeting_delay_s=2.0)
async def test_drain_ends_a_session_that_was_not_greeted_yet(world: World) -> None:
    client = await world.connect()
    await world.until(lambda: world.listener.sessions)
    draining = asyncio.ensure_future(world.listener.drain(300))

    await world.advance(3)
    await draining

    assert "421 4.3.2" in await client.rest()


@dialogue(timed=True)
async def test_drain_cuts_what_does_not_end_in_time(world: World) -> None:
    world.relay.deliver_gate = asyncio.Event()
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE + b".\r\n")
    await world.relay.called.wait()
    draining = asyncio.ensure_future(world.listener.drain(100))
    await world.advance(99)
    assert not draining.done()

    await world.advance(2)
    await draining

    await world.empty()
    assert await client.rest() == "", "nothing was confirmed"
    assert [line.event for line in world.services.log.of("warning")] == ["drain.timeout"]
    assert world.relay.cancelled == ["deliver"]


@dialogue(timed=True)
async def test_drain_does_not_wait_for_a_session_that_only_lingers(world: World) -> None:
    client = await world.greeted()
    client.send(b"GET / HTTP/1.1\r\n")
    await client.rest()
    assert world.listener.sessions

    await world.listener.drain(300)

    assert world.listener.sessions == set()


# --- defects of ours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), asyncio.CancelledError()], ids=["error", "cancelled"]
)
@pytest.mark.parametrize("suspends", [True, False])
@pytest.mark.parametrize("stage", Stage)
@dialogue()
async def test_a_defect_ends_its_session_with_a_421_and_no_other(
    world: World, stage: Stage, suspends: bool, error: BaseException
) -> None:
    other = await world.greeted()
    sound = world.gate.pipeline

    class Broken:
        """The pipeline with a defect at one stage."""

        plans_outcome = False

        def __getattr__(self, name: str) -> Any:
            return self._fail if name.removesuffix("_before") == stage else getattr(sound, name)

        async def _fail(self, *_: object) -> object:
            if suspends:
                await asyncio.sleep(0)
            raise error

    world.gate.pipeline = Broken()  # type: ignore[assignment]  # a stand-in
    client = await world.connect()
    said = [HELLO, MAIL, RCPT, "DATA", MESSAGE.decode() + "."][: list(Stage).index(stage)]
    if stage is Stage.EOM:
        said = [HELLO, MAIL, RCPT, "DATA", MESSAGE.decode() + "."]
    for line in said:
        await client.reply()
        client.send(f"{line}\r\n".encode())

    assert await client.reply() == "421 4.3.0 Temporary trouble here, try again later"
    assert await client.rest() == ""
    client.close()
    await world.until(lambda: len(world.listener.sessions) == 1)
    assert world.spool.used_bytes == 0
    assert world.errors == ["session.failed"]
    assert world.count("closed_sessions") == {"failed": 1}
    world.gate.pipeline = sound
    await other.say(MAIL, RCPT, "DATA")
    other.send(MESSAGE + b".\r\n")
    assert await other.reply() == "250 2.0.0 Stored as 1"


@dialogue()
async def test_a_defect_of_the_relay_is_no_250(world: World) -> None:
    world.relay.error = RuntimeError("a defect")
    client = await world.connect()
    await client.begin()

    client.send(MESSAGE + b".\r\n")

    assert (await client.rest()).startswith("421 4.3.0")
    assert "a defect" in world.services.log.of("error")[0].keys["error"]


@dialogue()
async def test_a_defect_in_a_session_that_is_gone_is_logged(world: World) -> None:
    gate = asyncio.Event()

    async def defect(*_: object) -> None:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            raise RuntimeError("a defect") from None

    world.gate.pipeline.mail = defect  # type: ignore[assignment,method-assign]
    client = await world.greeted()
    client.send(f"{MAIL}\r\n".encode())
    await world.until(lambda: any(c._task for c in world.listener.sessions))

    client.reset()

    await world.empty()
    await world.until(lambda: world.errors)
    assert world.errors == ["session.failed"]


@dialogue()
async def test_a_defect_behind_the_reply_is_logged(world: World) -> None:
    async def defect() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("a defect")

    world.listener.run_behind(defect())

    await world.until(lambda: world.errors)
    assert world.listener.background == set()


# --- connections that are lost --------------------------------------------------------------------------------------


async def to_greeting(world: World) -> Client:
    return await world.greeted()


async def to_command(world: World) -> Client:
    client = await world.greeted()
    client.send(b"MAIL FR")
    return client


async def to_transaction(world: World) -> Client:
    client = await world.greeted()
    await client.say(MAIL, RCPT)
    return client


async def to_verify(world: World) -> Client:
    world.relay.verify_gate = asyncio.Event()
    client = await world.greeted()
    client.send(f"{MAIL}\r\n{RCPT}\r\n".encode())
    await world.relay.called.wait()
    return client


async def to_content(world: World) -> Client:
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE)
    await world.until(lambda: world.spool.used_bytes)
    return client


async def to_file(world: World) -> Client:
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE + b"x" * 8000 + b"\r\n" + b"y" * 8000)
    await world.until(lambda: any(_is_spilled(c) for c in world.listener.sessions))
    return client


def _is_spilled(connection: Connection) -> bool:
    open_ = connection._conversation._open
    return open_ is not None and open_.body is not None and open_.body.is_spilled


async def to_chunk(world: World) -> Client:
    client = await world.greeted()
    await client.say(MAIL, RCPT)
    client.send(b"BDAT 100\r\n" + MESSAGE)
    await world.until(lambda: world.spool.used_bytes)
    return client


async def to_policies(world: World) -> Client:
    world.says.gate = asyncio.Event()
    client = await world.connect()
    await client.begin()
    client.send(MESSAGE + b".\r\n")
    await world.until(lambda: world.says.transactions[-1][0] is Stage.EOM)
    return client


async def to_deliver(world: World) -> Client:
    world.relay.deliver_gate = asyncio.Event()
    client = await world.connect()
    await client.begin()
    world.relay.called.clear()
    client.send(MESSAGE + b".\r\n")
    await world.relay.called.wait()
    return client


async def to_tls(world: World) -> Client:
    client = await world.greeted()
    await client.starttls()
    await client.say(HELLO)
    return client


async def to_deliver_in_tls(world: World) -> Client:
    world.relay.deliver_gate = asyncio.Event()
    client = await world.connect(tls=certificates()[1])
    await client.begin()
    world.relay.called.clear()
    client.send(MESSAGE + b".\r\n")
    await world.relay.called.wait()
    return client


PHASES = [
    to_greeting,
    to_command,
    to_transaction,
    to_verify,
    to_content,
    to_file,
    to_chunk,
    to_policies,
    to_deliver,
    to_tls,
    to_deliver_in_tls,
]


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
@dialogue()
async def test_a_lost_connection_leaves_nothing_behind(
    world: World, phase: Callable[[World], Coroutine[Any, Any, Client]], how: str
) -> None:
    client = await phase(world)
    assert world.listener.sessions

    if how == "reset":
        client.reset()
    else:
        client.writer.close()

    await world.empty()
    assert world.relay.delivered == []
    if phase is to_verify:
        await world.until(lambda: world.relay.cancelled == ["verify"])
    if phase in (to_deliver, to_deliver_in_tls):
        await world.until(lambda: world.relay.cancelled == ["deliver"])
    has_transaction = phase not in (to_greeting, to_command, to_tls)
    await world.until(lambda: world.count("transactions") == ({"aborted": 1} if has_transaction else {}))
    assert world.count("closed_sessions") == {"lost": 1}
    assert world.errors == []


@dialogue()
async def test_a_message_that_was_stored_while_its_client_left_is_accounted_for_as_stored(
    world: World,
) -> None:
    class Late(FakeRelay):
        async def deliver(self, tx: Any, content: Any, route: str = "") -> Any:
            try:
                return await super().deliver(tx, content)
            except asyncio.CancelledError:
                return self.delivery

    world.relay.__class__ = Late
    client = await to_deliver(world)

    client.reset()

    await world.until(lambda: world.count("transactions") == {"accepted": 1})
    await world.until(lambda: world.says.told)
    assert world.says.told[0][1] == Outcome(STORED, delivered=True)
    await world.empty()
