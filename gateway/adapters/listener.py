"""The listener: an asyncio.Protocol for each connection around smtp.server, driving one gatekeeper Conversation.

It owns what the pure core does not know: sockets, TLS, the clock, limits of connections, back-pressure and the end
of a session. A command's coroutine is stepped once and becomes a task only if it suspends; replies of a batch leave
in one write. One sweep a second serves the deadlines of all sessions, so a short session costs no timer.

Whose a connection is: the client's that the PROXY header of a listed balancer names, otherwise the socket's. Limits,
trust and log go by that address. Limits of connections are of all workers together (gateway.connection_counts).
While most clients seem to come from one private address, it is a balancer's that hides them (gateway.arrivals), and no
limit of single clients applies to it.

An exception in a session is a defect of ours: it is logged, the client gets a 4xx, nobody else notices.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import traceback
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from gateway.arrivals import Origin, SourceWatch, origin_of
from gateway.connection_counts import Client, ConnectionCounts, lone_counts
from gateway.services import Merge
from gateway.session import AddressSource, TlsInfo, client_address
from gateway.smtp import reply
from gateway.smtp.command import Verb
from gateway.smtp.proxy_protocol import (
    MAX_HEADER_BYTES,
    HeaderKind,
    ProxyHeader,
    ProxyHeaderError,
    read_header,
)
from gateway.smtp.reply import Reply
from gateway.smtp.server import INVALID, Phase, Server, ServerSettings
from gateway.smtp.tapped import TappedServer
from gateway.stepping import step

if TYPE_CHECKING:
    from gateway.debugging import Debugging, Dialogue
    from gateway.gatekeeper import Answer, Conversation, Gatekeeper, RcptAnswers
    from gateway.services import Counter, Counters, Services
    from gateway.session import Envelope, Recipient
    from gateway.smtp.content import Fault
    from gateway.smtp.sasl import Credentials

T = TypeVar("T")

BACKLOG = 511
# Sessions that end for what the client did have a line of their own, since there may be no transaction that has one
_TOLD_ENDS = frozenset(
    [
        *(
            "early_talker",
            "pipelining",
            "line_end",
            "line_too_long",
            "protocol",
            "plaintext_behind_starttls",
            "tls",
        ),
        *("content", "errors", "commands", "unknown_recipients"),
    ]
)
# Of such lines in a second; who floods the gateway must not flood the log
_MAX_TOLD = 20
# Input that piles up while an answer is awaited: a few pipelined groups, then reading pauses
_MAX_UNREAD_BYTES = 64 * 1024
_TLS_HANDSHAKE_S = 30.0
# A balancer sends its header as soon as it is connected; some send it late
_PROXY_HEADER_S = 10.0
_PROXY_OUTCOMES = (*map(str, HeaderKind), "invalid", "truncated", "timeout", "empty")
_TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")
# A part of OpenSSL's name of the cipher suite -> its family; all others of TLS 1.2 are in CBC mode, or nobody's
_CIPHER_FAMILIES = {"GCM": "aes_gcm", "CHACHA20": "chacha20_poly1305", "CCM": "aes_ccm", "-SHA": "cbc"}
# A sender this slow for this long is not worth a session (SECURITY.md 1.8)
_MIN_RATE_BYTES_S = 100
_MIN_RATE_AFTER_S = 60
# Drain: content that is still arriving is waited for this long (DESIGN.md section 8)
_DRAIN_CONTENT_S = 30
_SWEEP_S = 1.0
# A session that we ended is read and not listened to for this long, so that our last reply arrives
_LINGER_S = 3.0
_CLOSE_AT_ONCE = frozenset({"quit", "timeout", "drain", "tls"})
# What a client that does not read leaves unsent is dropped after this long: its session must not stay for ever
_UNSENT_S = 30.0


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """What the operator decides about connections; durations in seconds, see docs/configure.md."""

    max_connections: int = 2000
    max_connections_per_client: int = 50
    max_new_connections_per_client_per_minute: int = 0
    greeting_delay_s: float = 0.0
    command_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    data_timeout_s: float = 180.0
    session_timeout_s: float = 1200.0
    allow_bare_lf_from: tuple[IPv4Network | IPv6Network, ...] = ()
    proxy_protocol_from: tuple[IPv4Network | IPv6Network, ...] = ()


# The barrier around a session: what it raises ends that session only. It cannot be cancelled from outside while it is
# stepped, so a CancelledError out of it is a defect like any other.
_OWN_DEFECTS = (Exception, asyncio.CancelledError)


# A member that is asked of its class costs ten times what a name of the module does.
_CONTENT, _BUSY = Phase.CONTENT, Phase.BUSY
_SOCKET, _PROXY, _HIDDEN = AddressSource.SOCKET, AddressSource.PROXY, AddressSource.HIDDEN


class _Bound(dict[object, "Counter"]):
    """Counters of one label, bound when a value is first seen; the values come from closed sets."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def __missing__(self, value: object) -> Counter:
        counter = self[value] = self._counters.labels(str(value))
        return counter


class Reserve(Protocol):
    """What new connections may not use of this process (adapters/reserve.py)."""

    @property
    def short_of(self) -> str: ...

    def look(self) -> None: ...

    def taken(self) -> None: ...


class TlsSource(Protocol):
    """The server's certificate: a context for handshakes, and a look whether its files changed (adapters/tls.py)."""

    @property
    def context(self) -> ssl.SSLContext: ...

    def refresh(self) -> None: ...


class Listener:
    """All sessions of a worker on its listening sockets; `counts` is None where there is no other worker.

    `debugging` is told what its clients say.
    """

    def __init__(
        self,
        settings: ListenerSettings,
        server_settings: ServerSettings,
        gatekeeper: Gatekeeper,
        services: Services,
        tls: TlsSource | None,
        counts: ConnectionCounts | None = None,
        debugging: Debugging | None = None,
        reserve: Reserve | None = None,
    ) -> None:
        self.debugging = debugging or None
        self.settings = settings
        self.server_settings = server_settings
        self.gatekeeper = gatekeeper
        self.services = services
        self.tls = tls
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()  # as of the last sweep
        self.sessions: set[Connection] = set()
        self.arrivals: set[_Arrival] = set()
        self.counts = counts or lone_counts()
        self.reserve = reserve
        self._short_of = ""  # as of the last sweep
        self.watch = SourceWatch(services.clock.monotonic)
        self.draining_since: float | None = None
        self._is_hurried = False
        self.background: set[asyncio.Task[Any]] = set()
        self._servers: list[asyncio.Server] = []
        self._accepting: list[socket.socket] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        self._hidden_by: IPv4Address | IPv6Address | None = None  # as of the last sweep
        self._told = 0  # lines since the last sweep
        metrics = services.metrics
        role = gatekeeper.settings.role
        connections = metrics.counters(
            "mxgate_connections_total",
            "Connections by how they began: served, or refused for a limit of all, of a client, or of its rate",
            ("outcome", "role"),
        )
        outcomes = ("served", "limit", "client_limit", "client_rate", "descriptors", "memory")
        self.connections = {o: connections.labels(o, role) for o in outcomes}
        origins = metrics.counters(
            "mxgate_clients_total",
            "Connections that were served, by where the client's address belongs to; proxy: a balancer told it",
            ("origin",),
        )
        self.origins = {origin: origins.labels(origin.name.lower()) for origin in Origin}
        self.proxied = origins.labels("proxy")
        self.open_connections = metrics.gauges(
            "mxgate_open_connections",
            "Connections that are open, of all workers, by role of the listener",
            ("role",),
        ).labels(role)
        metrics.gauges(
            "mxgate_max_connections",
            "Connections that may be open, of all workers together, by role of the listener",
            ("role",),
            merge=Merge.MAX,
        ).labels(role).set(settings.max_connections)
        self.replies = _Bound(
            metrics.counters("mxgate_replies_total", "Replies to clients by code", ("code",))
        )
        commands = metrics.counters(
            "mxgate_commands_total",
            "Commands of clients by their verb; invalid: what is no command, or no good one",
            ("verb",),
        )
        self.verbs = {verb: commands.labels(verb.lower()) for verb in (*map(str, Verb), INVALID)}
        # counted here, and told once a second: there are several for each message
        self.codes: defaultdict[int, int] = defaultdict(int)
        self.commands: defaultdict[str, int] = defaultdict(int)
        self.closed = _Bound(
            metrics.counters("mxgate_closed_sessions_total", "Sessions by what ended them", ("reason",))
        )
        # there from the start, so that the first one is seen to come
        self.closed["failed"].inc(0)
        handshakes = metrics.counters(
            "mxgate_tls_handshakes_total", "TLS handshakes, of STARTTLS and of implicit TLS", ("outcome",)
        )
        self.handshakes = {o: handshakes.labels(o) for o in ("done", "failed")}
        encrypted = metrics.counters(
            "mxgate_tls_sessions_total",
            "Sessions under TLS by its version and the family of the cipher",
            ("version", "cipher"),
        )
        self.encrypted = {
            (version, family): encrypted.labels(version, family)
            for version in (*_TLS_VERSIONS, "other")
            for family in (*_CIPHER_FAMILIES.values(), "other")
        }
        headers = metrics.counters(
            "mxgate_proxy_headers_total", "Connections of balancers by their PROXY header", ("outcome",)
        )
        self.proxy_headers = {o: headers.labels(o) for o in _PROXY_OUTCOMES}
        self._source_hidden = metrics.gauges(
            "mxgate_source_hidden",
            "Workers for which a private address seems to be a balancer's that hides its clients",
            ("role",),
        ).labels(role)
        self._source_share = metrics.gauges(
            "mxgate_source_share",
            "Part (0 to 1) of the last 1000 clients that came from the commonest private address; the workers' largest",
            ("role",),
            merge=Merge.MAX,
        ).labels(role)

    async def start(self, sockets: Sequence[socket.socket], tls_sockets: Sequence[socket.socket]) -> None:
        """Accept connections on sockets that are bound already; those of `tls_sockets` begin with a handshake."""
        arriving = _Arrival if self.settings.proxy_protocol_from else Connection
        for sock in sockets:
            self._servers.append(
                await self.loop.create_server(lambda: arriving(self), sock=sock, backlog=BACKLOG)
            )
        for sock in tls_sockets:
            assert self.tls is not None
            self._servers.append(
                await self.loop.create_server(
                    lambda: arriving(self, implicit_tls=True), sock=sock, backlog=BACKLOG
                )
            )
        self._accepting = [*sockets, *tls_sockets]
        self._schedule_sweep()

    def is_balancer(self, host: str) -> bool:
        """Whether this peer has to send a PROXY header."""
        peer, _, _ = _client(host)
        return any(peer in network for network in self.settings.proxy_protocol_from)

    def state(self) -> dict[str, str]:
        """What /readyz shows of the clients: the balancer's address that seems to hide them, "" when none does."""
        hidden_by = self.watch.hidden_by
        return {"hidden_by": str(hidden_by or "")}

    async def stop_accepting(self) -> None:
        """Close the listening sockets; who is in their queues stays there for others who have them open."""
        for sock in self._accepting:
            # asyncio forgets whom it accepted in the turn in which its server is closed; uvloop knows no such reader
            self.loop.remove_reader(sock)
        self._accepting = []
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for accepting in self._servers:
            accepting.close()
        self._servers = []

    def hurry(self) -> None:
        """End the patience of a drain."""
        self._is_hurried = True
        self._drained.set()

    async def drain(self, timeout_s: float, patience_s: float = 0.0) -> None:
        """Stop accepting, let messages that are under way end, close the rest; returns when no session is left.

        Sessions go on for `patience_s` as if nothing were. What is still open `timeout_s` later is cut: its message was
        not confirmed to anybody.
        """
        patient_until = self.loop.time() + patience_s
        await self.stop_accepting()
        if patience_s:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(patient_until):
                    while (self.sessions or self.arrivals or self.background) and not self._is_hurried:
                        self._drained.clear()
                        await self._drained.wait()
        self.now = self.loop.time()
        self.draining_since = min(patient_until, self.now)
        for arrival in list(self.arrivals):
            arrival.drain()
        for connection in list(self.sessions):
            connection.drain()
        try:
            async with asyncio.timeout_at(self.draining_since + timeout_s):
                while self.sessions or self.background:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            self.services.log.warning("drain.timeout", sessions=len(self.sessions))
        for connection in list(self.sessions):
            connection.abort("drain")
        if self._sweep is not None:
            self._sweep.cancel()
        self._count_replies()

    def _count_replies(self) -> None:
        for code, count in self.codes.items():
            self.replies[code].inc(count)
        self.codes.clear()
        for verb, count in self.commands.items():
            self.verbs[verb].inc(count)
        self.commands.clear()

    def tell(self, event: str, **keys: object) -> None:
        """A line about a client that was turned away, unless there were many in this second."""
        self._told += 1
        if self._told <= _MAX_TOLD:
            self.services.log.info(event, **keys)

    def _tell_of_the_untold(self) -> None:
        if self._told > _MAX_TOLD:
            self.services.log.warning("session.untold", count=self._told - _MAX_TOLD)
        self._told = 0

    def count_closed(self, reason: str) -> None:
        """Account for the end of a session."""
        self.closed[reason].inc()

    def run_behind(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run what no client waits for; drain waits for it."""
        task = step(coro, self.loop)
        if isinstance(task, asyncio.Task):
            self.background.add(task)
            task.add_done_callback(self._behind_done)

    def session_ended(self) -> None:
        """Somebody left: drain may be done."""
        self._drained.set()

    def _behind_done(self, task: asyncio.Task[None]) -> None:
        self.background.discard(task)
        self._drained.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.services.log.error("session.failed", error=repr(exc))

    def _schedule_sweep(self) -> None:
        self._sweep = self.loop.call_later(_SWEEP_S, self._run_sweep)

    def _run_sweep(self) -> None:
        self.now = self.loop.time()
        for arrival in list(self.arrivals):
            arrival.check_deadlines()
        for connection in list(self.sessions):
            connection.check_deadlines()
        self._count_replies()
        self._tell_of_the_untold()
        self.counts.roll(self.now)
        self._look_at_the_reserve()
        if self.tls is not None:
            self.tls.refresh()
        self._tell_of_the_watch()
        self._schedule_sweep()

    def short_of(self) -> str:
        """What a connection that has just come may not use any more (Reserve.short_of)."""
        if self.reserve is None:
            return ""
        self.reserve.taken()
        return self.reserve.short_of

    def _look_at_the_reserve(self) -> None:
        if self.reserve is None:
            return
        self.reserve.look()
        before, self._short_of = self._short_of, self.reserve.short_of
        if self._short_of and self._short_of != before:
            self.services.log.warning(
                "connections.refused", reason=self._short_of, sessions=len(self.sessions)
            )
        elif before and not self._short_of:
            self.services.log.info("connections.accepted", reason=before, sessions=len(self.sessions))

    def _tell_of_the_watch(self) -> None:
        watch, before = self.watch, self._hidden_by
        self._hidden_by = hidden_by = watch.look()
        self._source_hidden.set(hidden_by is not None)
        self._source_share.set(share := watch.share)
        if hidden_by == before:
            return
        if before is not None:
            self.services.log.info("client.visible", peer=str(before), share=round(share, 3))
        if hidden_by is not None:
            self.services.log.warning("client.hidden", peer=str(hidden_by), share=round(share, 3))


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_arrived",
        "_begun",
        "_client",
        "_content_begun",
        "_conversation",
        "_dialogue",
        "_implicit_tls",
        "_is_closed",
        "_listener",
        "_origin",
        "_phase",
        "_phase_since",
        "_reading_paused",
        "_received_bytes",
        "_server",
        "_task",
        "_transport",
        "_writing_paused",
    )

    _server: Server
    _conversation: Conversation
    _transport: asyncio.Transport

    def __init__(self, listener: Listener, *, implicit_tls: bool = False) -> None:
        self._listener = listener
        self._implicit_tls = implicit_tls
        self._task: asyncio.Task[Any] | None = None
        self._client: Client | None = None  # while it is counted
        self._is_closed = True
        self._origin: Origin | None = None  # what the source watch is yet to be told
        self._dialogue: Dialogue | None = None  # what is debugged of it
        self._reading_paused = False
        self._writing_paused = False
        self._begun = self._phase_since = self._arrived = listener.now
        self._phase = _BUSY
        self._received_bytes = 0  # of the content that is arriving
        self._content_begun = 0.0

    # --- asyncio.Protocol -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        # uvloop's transports are no subclasses of asyncio's
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        if not peer:  # it has gone already
            self._transport.abort()
            return
        client, key, self._origin = _client(peer[0])
        hidden_by = self._listener.watch.hidden_by
        is_hidden = hidden_by is not None and client == hidden_by
        self._begin(client, key, peer[1], _HIDDEN if is_hidden else _SOCKET)

    def take_over(
        self, transport: asyncio.Transport, header: ProxyHeader, peer: tuple[str, int], early: bytes
    ) -> None:
        """The connection of a balancer goes on as its client's, or as its own; `early` came behind the header."""
        self._transport = transport
        transport.set_protocol(self)
        if header.client is None:
            client, key, _ = _client(peer[0])
            # A client that the balancer cannot name is hidden by it
            source = _SOCKET if header.kind is HeaderKind.LOCAL else _HIDDEN
            self._begin(client, key, peer[1], source, early)
            return
        client, port = header.client
        self._begin(client, _key(client), port, _PROXY, early)
        if not self._is_closed:
            session = self._conversation.session
            self._listener.services.log.info(
                "client.proxied", session=session.id, client=str(client), peer=peer[0]
            )

    def _begin(
        self,
        client: IPv4Address | IPv6Address,
        key: int,
        port: int,
        source: AddressSource,
        early: bytes = b"",
    ) -> None:
        """It is known whose connection this is: refuse it or serve it."""
        listener = self._listener
        settings, counts = listener.settings, listener.counts
        counted = counts.client(key)
        rate = settings.max_new_connections_per_client_per_minute
        refusal, outcome = None, "served"
        if listener.draining_since is not None:
            refusal = reply.SHUTTING_DOWN
        elif counts.total >= settings.max_connections:
            refusal, outcome = reply.TOO_MANY_CONNECTIONS, "limit"
        elif short_of := listener.short_of():
            refusal, outcome = reply.TOO_MANY_CONNECTIONS, short_of
        elif source is _HIDDEN:
            pass  # no limit of single clients can be meant for all of them together
        elif counts.has(counted, settings.max_connections_per_client):
            refusal, outcome = reply.TOO_MANY_FROM_CLIENT, "client_limit"
        elif rate and not counts.admits(counted, rate, listener.now):
            refusal, outcome = reply.TOO_MANY_FROM_CLIENT, "client_rate"
        listener.connections[outcome].inc()
        if refusal is not None:
            if outcome != "served":
                listener.tell("connection.refused", client=str(client), reason=outcome)
            _turn_away(self._transport, refusal, implicit_tls=self._implicit_tls)
            return
        (listener.proxied if self._origin is None else listener.origins[self._origin]).inc()
        self._is_closed = False
        self._client = counted
        counts.client_opened(counted)
        counts.opened()
        listener.sessions.add(self)
        listener.open_connections.inc()
        bare_lf = settings.allow_bare_lf_from
        self._conversation = listener.gatekeeper.open(client, port, None, source)
        # an address that hides its clients is nobody's own device
        allow_bare_lf = (
            bool(bare_lf) and source is not _HIDDEN and any(client in network for network in bare_lf)
        )
        if listener.debugging is not None:
            self._dialogue = listener.debugging.dialogue(self._conversation.session.id, client)
        smtp, codes, commands = listener.server_settings, listener.codes, listener.commands
        self._server = (
            Server(smtp, self, codes, commands, tls_active=self._implicit_tls, allow_bare_lf=allow_bare_lf)
            if self._dialogue is None
            else TappedServer(
                smtp,
                self,
                codes,
                commands,
                self._dialogue.heard,
                tls_active=self._implicit_tls,
                allow_bare_lf=allow_bare_lf,
            )
        )
        if self._implicit_tls:
            # the ClientHello is the TLS layer's
            self._transport.pause_reading()
            self._await(self._handshake(), self._handshake_ended)
            return
        if early:
            self._server.receive(early)
        self._connect_later()

    def _connect_later(self) -> None:
        """Greet the client, after a pause where the operator wants one."""
        delay_s = self._listener.settings.greeting_delay_s
        if delay_s:
            self._listener.loop.call_later(delay_s, self._connect)
        else:
            self._connect()

    def data_received(self, data: bytes) -> None:
        """The client said something."""
        if self._is_closed:
            return
        self._arrived = self._listener.now
        self._received_bytes += len(data)
        try:
            self._server.receive(data)
        except _OWN_DEFECTS as exc:  # the barrier around a session
            self._fail(exc)
        else:
            self._settle()

    def eof_received(self) -> bool:
        """The client will say no more: what it has not finished is given up."""
        return False

    def pause_writing(self) -> None:
        """The client does not read its replies: it is not listened to either."""
        self._writing_paused = True
        self._balance()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing_paused = False
        self._balance()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, from whichever side."""
        if self._client is None:
            return
        listener = self._listener
        if not self._is_closed:
            self._is_closed = True
            listener.count_closed("lost")
        counted, self._client = self._client, None
        listener.counts.client_closed(counted)
        listener.counts.closed()
        listener.sessions.discard(self)
        listener.open_connections.dec()
        if self._task is not None:
            # the relay goes on by itself once the dot is sent
            self._task.cancel()
        else:
            self._conversation.reset()
        # The two know each other, and sessions should not be left for the garbage collector to find.
        del self._server
        listener.session_ended()

    # --- deadlines and drain ----------------------------------------------------------------------------

    def check_deadlines(self) -> None:
        """Once a second: close the session if it waited too long for the client."""
        now, settings = self._listener.now, self._listener.settings
        waited = now - self._phase_since
        if self._is_closed:
            if waited > _UNSENT_S:
                self._transport.abort()
            elif waited > _LINGER_S:
                self._transport.close()
            return
        match self._phase:
            case Phase.CONTENT:
                draining = self._listener.draining_since
                if draining is not None and now - draining > _DRAIN_CONTENT_S:
                    self._server.close("drain", reply.SHUTTING_DOWN)
                    return
                # the client waited for our 354, however long that took
                late = now - max(self._arrived, self._content_begun) > settings.data_timeout_s
                taken = now - self._content_begun
                if taken > _MIN_RATE_AFTER_S and self._received_bytes < taken * _MIN_RATE_BYTES_S:
                    late = True
            case Phase.COMMAND:
                late = waited > settings.command_timeout_s or self._is_over(now)
            case Phase.IDLE:
                late = waited > settings.idle_timeout_s or self._is_over(now)
            case _:
                late = False
        if late:
            self._server.close("timeout", reply.COMMAND_TIMEOUT)

    def _is_over(self, now: float) -> bool:
        """Whether the session has had its time; content that arrives and answers of ours are not cut by it."""
        return now - self._begun > self._listener.settings.session_timeout_s

    def drain(self) -> None:
        """Close now if no message is under way."""
        if self._is_closed:
            self._transport.close()
        elif self._phase in (Phase.IDLE, Phase.COMMAND):
            self._server.close("drain", reply.SHUTTING_DOWN)

    def abort(self, reason: str) -> None:
        """Cut the connection."""
        if not self._is_closed:
            self._is_closed = True
            self._listener.count_closed(reason)
        self._transport.abort()

    # --- the dialogue -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._is_closed:
            return
        try:
            if self._listener.gatekeeper.pipeline.plans_connect:
                self._await(self._conversation.connect(), self._connected)
            else:
                self._server.open()
        except _OWN_DEFECTS as exc:
            self._fail(exc)
        else:
            self._settle()

    def _connected(self, refusal: Answer | None) -> None:
        self._server.open(refusal.reply if refusal else None)

    def _settle(self) -> None:
        """Write the replies, see what is awaited now."""
        if self._is_closed:
            return
        smtp = self._server
        if output := smtp.take_output():
            self._write(output)
        phase = smtp.phase
        listener = self._listener
        if output or phase is not self._phase:
            if phase is _CONTENT and self._phase is not _CONTENT:
                self._received_bytes = 0
                self._content_begun = listener.now
            self._phase, self._phase_since = phase, listener.now
            if listener.draining_since is not None and phase in (Phase.IDLE, Phase.COMMAND):
                smtp.close("drain", reply.SHUTTING_DOWN)
                return
        if phase is _BUSY or self._reading_paused:
            self._balance()

    def _flush(self) -> None:
        """Write the replies that are due."""
        if output := self._server.take_output():
            self._write(output)

    def _write(self, output: bytes) -> None:
        if self._dialogue is not None:
            self._dialogue.said(output)
        self._transport.write(output)

    def _balance(self) -> None:
        """Read only while replies go out and input does not pile up."""
        if self._transport.is_closing():
            return
        pause = not self._is_closed and (
            self._writing_paused or self._server.buffered_bytes > _MAX_UNREAD_BYTES
        )
        if pause != self._reading_paused:
            self._reading_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _await(self, coro: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        """Run a coroutine of the conversation; `then` gets its result now, or later when it had to wait."""
        stepped = step(coro, self._listener.loop)
        if isinstance(stepped, asyncio.Task):
            self._task = stepped
            stepped.add_done_callback(lambda task: self._resume(task, then))
        else:
            then(stepped)

    def _resume(self, task: asyncio.Task[T], then: Callable[[T], None]) -> None:
        self._task = None
        if self._client is None:  # the connection was lost meanwhile
            self._conversation.reset()
            if (told := self._conversation.outcome()) is not None:
                self._listener.run_behind(told)
            if not task.cancelled() and (exc := task.exception()) is not None:
                self._listener.services.log.error("session.failed", error=repr(exc))
            return
        server = self._server  # a handshake that failed ends in connection_lost
        try:
            then(task.result())
            server.run()
        except _OWN_DEFECTS as exc:  # the barrier around a session
            self._fail(exc)
        else:
            self._settle()

    def _fail(self, exc: BaseException) -> None:
        """A defect of ours: the client gets a 4xx and the connection ends, since its state is not known any more."""
        self._listener.services.log.error(
            "session.failed",
            session=self._conversation.session.id,
            error="".join(traceback.format_exception(exc)),
        )
        self._server.close("failed", reply.INTERNAL_CLOSING)

    # --- gateway.smtp.server.Handler ------------------------------------------------------------------------

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        """EHLO or HELO."""
        conversation, gatekeeper = self._conversation, self._listener.gatekeeper
        if self._origin is not None:
            self._listener.watch.saw(conversation.session.client, self._origin)
            self._origin = None
        if gatekeeper.pipeline.plans_ehlo:
            self._await(conversation.ehlo(domain, esmtp=esmtp), self._greet)
        else:
            conversation.greeted(domain, esmtp=esmtp)
            self._server.greet(gatekeeper.extensions() if esmtp else None)

    def _greet(self, refusal: Answer | None) -> None:
        if refusal is not None:
            self._server.answer(refusal.reply, close=refusal.close)
        else:
            extensions = self._listener.gatekeeper.extensions()
            self._server.greet(extensions if self._conversation.session.esmtp else None)

    def auth(self, credentials: Credentials) -> None:
        """The end of an exchange of AUTH."""
        self._await(self._conversation.authenticate(credentials), self._authenticated)

    def _authenticated(self, answer: Answer) -> None:
        self._server.answer_auth(answer.reply, close=answer.close)

    def mail(self, envelope: Envelope) -> None:
        """MAIL."""
        if self._listener.gatekeeper.pipeline.plans_mail:
            self._await(self._conversation.mail(envelope), self._answer)
        else:
            self._conversation.begin(envelope)
            self._server.answer(reply.SENDER_OK)

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        """RCPTs."""
        if self._dialogue is not None:
            self._dialogue.rcpts(rcpts)
        self._await(self._conversation.rcpt(rcpts), self._answer_rcpts)

    def _answer(self, answer: Answer) -> None:
        self._server.answer(answer.reply, close=answer.close)
        if (told := self._conversation.outcome()) is not None:
            self._flush()
            self._listener.run_behind(told)

    def _answer_rcpts(self, answers: RcptAnswers) -> None:
        self._server.answer_rcpts(answers.replies, unknown=answers.unknown, close=answers.close)

    def content_begins(self, *, is_stuffed: bool) -> None:
        """DATA or the first BDAT."""
        self._conversation.begin_content(is_stuffed=is_stuffed)
        self._server.accept_content()

    def content(self, block: bytes) -> None:
        """A piece of content."""
        self._conversation.content(block)

    def content_ends(self, fault: Fault | None) -> None:
        """The end of the content."""
        if self._dialogue is not None:
            self._dialogue.content(self._received_bytes)
        self._await(self._conversation.eom(fault), self._answer)

    def reset(self) -> None:
        """The transaction was given up."""
        self._conversation.reset()

    def closing(self, reason: str) -> None:
        """The session is over."""
        self._flush()
        self._is_closed = True
        self._phase_since = self._listener.now
        self._listener.count_closed(reason)
        if reason in _TOLD_ENDS:
            session = self._conversation.session
            self._listener.tell(
                "session.ended",
                session=session.id,
                client=str(session.client),
                helo=session.helo,
                reason=reason,
            )
        if reason in _CLOSE_AT_ONCE or not self._transport.can_write_eof():
            self._transport.close()
            return
        # Input that nobody reads would make the kernel send RST, which can overtake our last reply.
        self._transport.write_eof()
        self._balance()

    def starttls(self) -> None:
        """STARTTLS: its 220 is in the output."""
        # the ClientHello must not be read as a command
        self._transport.pause_reading()
        self._flush()
        if self._writing_paused:
            # nobody who wants TLS leaves so many replies unread; and this transport will not tell when they are read
            self._server.close("tls")
            return
        self._await(self._handshake(), self._handshake_ended)

    async def _handshake(self) -> bool:
        listener = self._listener
        assert listener.tls is not None
        try:
            transport = await listener.loop.start_tls(
                self._transport,
                self,
                listener.tls.context,
                server_side=True,
                ssl_handshake_timeout=_TLS_HANDSHAKE_S,
            )
        except (OSError, ssl.SSLError):
            transport = None
        if transport is None:
            listener.handshakes["failed"].inc()
            return False
        listener.handshakes["done"].inc()
        tls = _describe(transport.get_extra_info("ssl_object"))
        listener.encrypted[_tls_class(tls)].inc()
        self._transport = transport
        self._writing_paused = self._reading_paused = False
        self._conversation.reset()
        self._conversation.tls_started(tls)
        return True

    def _handshake_ended(self, is_done: bool) -> None:  # noqa: FBT001  # a callback
        if is_done:
            if self._implicit_tls:
                self._connect_later()
            else:
                self._server.tls_started()
            return
        self._server.close("tls")
        # asyncio does not tell a protocol of a connection that was lost in the middle of start_tls
        self._transport.abort()
        self.connection_lost(None)


class _Arrival(asyncio.BufferedProtocol):
    """A new connection where some peers are balancers: reads the header that these have to send before all else.

    Then the client's Connection takes over; for all other peers it does so at once. What is no header is answered
    with nothing. A buffered protocol says how much is read: no octet of a ClientHello behind the header.
    """

    __slots__ = (
        "_begun",
        "_buffer",
        "_connection",
        "_filled",
        "_implicit_tls",
        "_is_waiting",
        "_listener",
        "_missing",
        "_peer",
        "_transport",
    )

    _transport: asyncio.Transport

    def __init__(self, listener: Listener, *, implicit_tls: bool = False) -> None:
        self._listener = listener
        self._implicit_tls = implicit_tls
        self._connection = Connection(listener, implicit_tls=implicit_tls)
        self._peer = ("", 0)
        self._is_waiting = False
        self._begun = listener.loop.time()
        self._buffer = bytearray()
        self._filled = 0
        self._missing = 0

    # --- asyncio.BufferedProtocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected."""
        listener = self._listener
        self._transport = transport  # type: ignore[assignment]  # as in Connection
        peer = transport.get_extra_info("peername")
        if not peer or not listener.is_balancer(peer[0]):
            transport.set_protocol(self._connection)
            self._connection.connection_made(transport)
            return
        self._peer = (peer[0], peer[1])
        if listener.draining_since is not None:
            _turn_away(self._transport, reply.SHUTTING_DOWN, implicit_tls=self._implicit_tls)
            return
        if listener.counts.total >= listener.settings.max_connections:
            listener.connections["limit"].inc()
            _turn_away(self._transport, reply.TOO_MANY_CONNECTIONS, implicit_tls=self._implicit_tls)
            return
        self._buffer = bytearray(MAX_HEADER_BYTES)
        self._missing = cast("int", read_header(b""))
        self._is_waiting = True
        listener.arrivals.add(self)
        listener.counts.opened()
        listener.open_connections.inc()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next octets go; without TLS more than the header may be read, in fewer steps."""
        end = self._filled + self._missing if self._implicit_tls else MAX_HEADER_BYTES
        return memoryview(self._buffer)[self._filled : end]

    def buffer_updated(self, nbytes: int) -> None:
        """The balancer said something."""
        self._filled += nbytes
        received = bytes(memoryview(self._buffer)[: self._filled])
        try:
            found = read_header(received)
        except ProxyHeaderError as exc:
            self._refuse("invalid", str(exc))
            return
        if isinstance(found, int):
            self._missing = found
            return
        if found.client is not None and found.client[0] == _client(self._peer[0])[0]:
            # version 1 has no LOCAL: the health checks of HAProxy name itself there
            found = ProxyHeader(HeaderKind.LOCAL, None, found.size)
        self._leave(found.kind)
        self._connection.take_over(self._transport, found, self._peer, received[found.size :])

    def eof_received(self) -> bool:
        """The peer will say no more."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone before its header came."""
        if not self._is_waiting:
            return
        if self._filled:
            self._refuse("truncated", f"the connection ended behind {self._filled} octets")
        else:
            self._leave("empty")  # a port check that does not know the protocol: nobody's mail

    # --- what the listener does with all connections ------------------------------------------------------

    def check_deadlines(self) -> None:
        """Once a second: the header has its time."""
        if self._listener.now - self._begun > _PROXY_HEADER_S:
            self._refuse("timeout", f"{self._filled} octets came")

    def drain(self) -> None:
        """Nobody was greeted here."""
        self._leave("empty")
        self._transport.close()

    # --- the end ------------------------------------------------------------------------------------------

    def _refuse(self, outcome: str, detail: str) -> None:
        self._leave(outcome)
        self._listener.services.log.warning("proxy.refused", peer=self._peer[0], error=outcome, detail=detail)
        self._transport.abort()

    def _leave(self, outcome: str) -> None:
        """No header is awaited any more."""
        listener = self._listener
        self._is_waiting = False
        listener.proxy_headers[outcome].inc()
        listener.arrivals.discard(self)
        listener.counts.closed()
        listener.open_connections.dec()
        listener.session_ended()


def _turn_away(transport: asyncio.Transport, refusal: Reply, *, implicit_tls: bool) -> None:
    """Say it and close; where TLS comes first there is no way to say it."""
    if not implicit_tls:
        transport.write(refusal.wire)
    transport.close()


@lru_cache(maxsize=4096)  # most connections of an hour come from few addresses
def _client(host: str) -> tuple[IPv4Address | IPv6Address, int, Origin]:
    """A client's address, what its connections are counted by, and where it can belong to."""
    client = client_address(host)
    return client, _key(client), origin_of(client)


def _key(client: IPv4Address | IPv6Address) -> int:
    """What a client's connections are counted by: IPv6 by /64, which one client has for the asking."""
    return int(client) if isinstance(client, IPv4Address) else -(int(client) >> 64)


def _describe(ssl_object: ssl.SSLObject) -> TlsInfo:
    """Version and cipher of a finished handshake."""
    cipher = ssl_object.cipher()
    return TlsInfo(ssl_object.version() or "", cipher[0] if cipher else "")


def _tls_class(tls: TlsInfo) -> tuple[str, str]:
    """Version and family of the cipher, each a word of a closed set."""
    version = tls.version if tls.version in _TLS_VERSIONS else "other"
    name = tls.cipher.replace("_", "-")
    families = (family for mark, family in _CIPHER_FAMILIES.items() if mark in name)
    return version, next(families, "other")
